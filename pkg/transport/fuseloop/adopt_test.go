package fuseloop

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/snapmerge/snapmerge/pkg/keeper"
	"github.com/snapmerge/snapmerge/pkg/transport"
	"github.com/snapmerge/snapmerge/test/machine"
)

// inProcess is a keeper and its client in this process.
func inProcess(t *testing.T) *keeper.Client {
	t.Helper()
	socket := machine.SocketPath(t, "keeper.sock")
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- keeper.Serve(ctx, socket, Tasks()) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	return dialKeeper(t, socket)
}

func TestLeftovers(t *testing.T) {
	noLeftovers(t, "one", "two")
	k := inProcess(t)
	tr := New(k)
	one := create(t, tr, "one", newMemBackend(4096), transport.Options{})
	create(t, tr, "two", newMemBackend(4096), transport.Options{})
	if err := k.Put(t.Context(), "dmuser/three", meta{}, 0); err != nil {
		t.Fatal(err)
	}
	if v, err := tr.Leftovers(t.Context()); err != nil || len(v) != 0 {
		t.Errorf("devices of our own are leftovers: %v, %v", v, err)
	}
	other := New(k) // as a new process would
	if v, err := other.Leftovers(t.Context()); err != nil || !slices.Equal(v, []string{"one", "two"}) {
		t.Errorf("leftovers %v, %v", v, err)
	}
	if _, err := other.Create(t.Context(), "one", newMemBackend(4096), transport.Options{}); err == nil || !strings.Contains(err.Error(), "must be adopted") {
		t.Errorf("created over a leftover: %v", err)
	}
	if _, err := other.Adopt(t.Context(), "three", newMemBackend(4096)); !errors.Is(err, transport.ErrNotFound) {
		t.Errorf("adopt of nothing: %v", err)
	}
	closeDevice(t, one)
	if v, err := other.Leftovers(t.Context()); err != nil || !slices.Equal(v, []string{"two"}) {
		t.Errorf("leftovers %v, %v", v, err)
	}
}

// TestAdoptRefuses checks that a refused Adopt does no harm to the device.
func TestAdoptRefuses(t *testing.T) {
	noLeftovers(t, "v")
	k := inProcess(t)
	d := create(t, New(k), "v", newMemBackend(1<<20), transport.Options{})
	f := openGuest(t, d.Path(), os.O_RDWR)
	defer f.Close()
	other := New(k)
	if _, err := other.Adopt(t.Context(), "v", newMemBackend(1<<20+512)); err == nil {
		t.Error("adopted with half a block")
	}
	for name, entry := range map[string]any{
		"other version": meta{Version: 2, Tag: "x"},
		"no tag":        meta{Version: metaVersion},
		"wrong types":   map[string]any{"version": "one"},
	} {
		if err := k.Put(t.Context(), keyPrefix+"odd", entry, d.conn.mount, d.conn.mount); err != nil {
			t.Fatal(err)
		}
		if _, err := other.Adopt(t.Context(), "odd", newMemBackend(4096)); err == nil || errors.Is(err, transport.ErrNotFound) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := k.Drop(t.Context(), keyPrefix+"odd"); err != nil {
		t.Error(err)
	}
	if _, err := f.WriteAt(aligned(t, blockSize), 0); err != nil {
		t.Errorf("the device suffered: %v", err)
	}
}

// TestAdoptShorterBackend serves a device on with a backend that does not know
// how long it is: there are errors, but nobody waits for ever.
func TestAdoptShorterBackend(t *testing.T) {
	needResend(t)
	image := imageFile(t, 1<<20)
	volume := filepath.Base(image)
	noLeftovers(t, volume)
	socket := machine.SocketPath(t, "keeper.sock")
	startKeeper(t, socket)
	k := dialKeeper(t, socket)
	server := startHelper(t, "server", socket, image)
	dev := server.line(t, "ready")[0]
	abortIfFailed(t, k, volume)
	f := openGuest(t, dev, os.O_RDWR)
	defer f.Close()
	server.kill(t)
	b := newMemBackend(blockSize)
	b.failWith(unix.EIO)
	d, err := New(k).Adopt(t.Context(), volume, b)
	if err != nil {
		t.Fatal(err)
	}
	for _, off := range []int64{0, 512 << 10} {
		if _, err := f.WriteAt(aligned(t, blockSize), off); !errors.Is(err, unix.EIO) {
			t.Errorf("write at %d: %v", off, err)
		}
	}
	if b.writes.Load() != 2 {
		t.Errorf("%d writes got to the backend", b.writes.Load())
	}
	f.Close()
	b.failWith(nil)
	closeDevice(t, d)
}

// TestAdoptByTag: the directory of the volumes need not be the same as when the
// device was made: on overlayfs the kernel numbers directories anew.
func TestAdoptByTag(t *testing.T) {
	needResend(t)
	image := imageFile(t, 1<<20)
	volume := filepath.Base(image)
	noLeftovers(t, volume)
	socket := machine.SocketPath(t, "keeper.sock")
	startKeeper(t, socket)
	k := dialKeeper(t, socket)
	server := startHelper(t, "server", socket, image)
	dev := server.line(t, "ready")[0]
	abortIfFailed(t, k, volume)
	f := openGuest(t, dev, os.O_RDWR)
	defer f.Close()
	server.kill(t)
	buf, written := aligned(t, blockSize), make(chan error, 1)
	go func() {
		_, err := f.WriteAt(buf, 1<<20-blockSize)
		written <- err
	}()
	d, err := New(k).Within(t.TempDir()).Adopt(t.Context(), volume, newMemBackend(1<<20))
	if err != nil {
		t.Fatal(err)
	}
	if err := <-written; err != nil {
		t.Errorf("the guest's write: %v", err)
	}
	if size, err := d.(*device).loop.sysfsSize(d.(*device).srv.name); err != nil || size != 1<<20 {
		t.Errorf("the device is taken for one of %d bytes: %v", size, err)
	}
	f.Close()
	closeDevice(t, d)
}

// halfMade leaves in the keeper what a process leaves that is killed in Create
// before the loop device is set up, and ends its readers. Somebody else may have
// taken the loop device since.
func halfMade(t *testing.T, k *keeper.Client, resend bool, loop int) {
	t.Helper()
	c, err := openConn()
	if err != nil {
		t.Fatal(err)
	}
	m := meta{Version: metaVersion, Conn: c.id, Resend: resend, Loop: loop, Tag: newTag("half")}
	if err := k.Put(t.Context(), keyPrefix+"half", m, c.fuse, c.mount); err != nil {
		t.Fatal(err)
	}
	unix.Close(c.fuse)
	unix.Close(c.mount)
}

func TestAdoptOfNoDevice(t *testing.T) {
	noLeftovers(t, "half", "else")
	k := inProcess(t)
	other := create(t, New(nil), "else", newMemBackend(1<<20), transport.Options{})
	for name, leave := range map[string]func(){
		"killed inside Create": func() { halfMade(t, k, true, other.loop.index) },
		"connection aborted": func() {
			d := create(t, New(k), "half", newMemBackend(4096), transport.Options{})
			if err := abortConn(d.conn.id); err != nil {
				t.Fatal(err)
			}
			<-d.Failed()
		},
	} {
		t.Run(name, func(t *testing.T) {
			leave()
			tr := New(k)
			if _, err := tr.Adopt(within(t, patience), "half", newMemBackend(4096)); !errors.Is(err, transport.ErrNotFound) {
				t.Errorf("adopt: %v", err)
			}
			if keys, err := k.List(t.Context()); err != nil || len(keys) != 0 {
				t.Errorf("the keeper still has %v, %v", keys, err)
			}
			create(t, tr, "half", newMemBackend(4096), transport.Options{})
		})
	}
	f := openGuest(t, other.Path(), os.O_RDWR)
	defer f.Close()
	if _, err := f.WriteAt(aligned(t, blockSize), 0); err != nil {
		t.Errorf("somebody else's device suffered: %v", err)
	}
}

// TestAdoptWithoutResend: on an old kernel Adopt must not leave guests waiting
// for ever.
func TestAdoptWithoutResend(t *testing.T) {
	noLeftovers(t, "half")
	k := inProcess(t)
	halfMade(t, k, false, 0)
	if _, err := New(k).Adopt(within(t, patience), "half", newMemBackend(4096)); err == nil || !strings.Contains(err.Error(), "6.9") {
		t.Errorf("adopt: %v", err)
	}
	if keys, err := k.List(t.Context()); err != nil || len(keys) != 0 {
		t.Errorf("the keeper still has %v, %v", keys, err)
	}
}

// TestAdoptGrows: the backend was grown, but its process did not live to tell
// the kernel.
func TestAdoptGrows(t *testing.T) {
	needResend(t)
	image := imageFile(t, 4<<20)
	noLeftovers(t, filepath.Base(image))
	socket := machine.SocketPath(t, "keeper.sock")
	startKeeper(t, socket)
	server := startHelper(t, "server", socket, image)
	dev := server.line(t, "ready")[0]
	server.kill(t)
	if err := os.Truncate(image, 6<<20); err != nil {
		t.Fatal(err)
	}
	server = startHelper(t, "server", socket, image)
	server.line(t, "adopted")
	f := openGuest(t, dev, os.O_RDWR)
	if _, err := f.WriteAt(aligned(t, blockSize), 6<<20-blockSize); err != nil {
		t.Error(err)
	}
	f.Close()
	server.finish(t)
}
