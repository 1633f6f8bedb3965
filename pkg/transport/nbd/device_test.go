package nbd

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/snapmerge/snapmerge/pkg/transport"
	"github.com/snapmerge/snapmerge/test/devicetest"
)

const blockSize = transport.BlockSize

// needDriver skips where no devices are to be made, and fails the test if it
// leaves some.
func needDriver(t testing.TB) {
	t.Helper()
	if os.Getenv("SNAPMERGE_VM_GUEST") == "" {
		t.Skip("makes NBD devices, as root; `make test-vm` runs it in a virtual machine (SNAPMERGE_VM_GUEST=1 runs it here)")
	}
	t.Cleanup(func() {
		if left, err := devicesByTag(); err != nil || len(left) > 0 {
			t.Errorf("devices left: %v, %v", left, err)
		}
	})
}

// create makes a device that is closed at the end of the test.
func create(t testing.TB, tr *Transport, volume string, b transport.Backend, o transport.Options) *device {
	t.Helper()
	d, err := tr.Create(t.Context(), volume, b, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { closeDevice(t, d) })
	return d.(*device)
}

func closeDevice(t testing.TB, d transport.Device) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if err := d.Close(ctx); err != nil {
		t.Error(err)
	}
}

func TestRandomIO(t *testing.T) {
	needDriver(t)
	seed, _ := devicetest.Seeded(t)
	tr := New(t.TempDir())
	var wg sync.WaitGroup
	defer wg.Wait()
	for i := range 2 {
		m := devicetest.NewMemory(8 << 20)
		d := create(t, tr, fmt.Sprint("random-", i), m, transport.Options{})
		f := devicetest.Open(t, d.Path(), os.O_RDWR)
		buf := devicetest.Aligned(t, 1<<20)
		wg.Go(func() { devicetest.RandomIO(t, f, m, buf, rand.New(rand.NewPCG(seed, uint64(i))), 400, true) })
	}
	wg.Wait()
}

func TestBusyLoad(t *testing.T) {
	needDriver(t)
	d := create(t, New(t.TempDir()), "busy", devicetest.NewMemory(80<<20), transport.Options{})
	l := devicetest.StartLoad(t, d.Path(), 40, 1)
	time.Sleep(time.Second) // some load
	ops, longest := l.Finish()
	t.Logf("%d requests, the slowest took %v", ops, longest)
}

func TestShapeAndResize(t *testing.T) {
	needDriver(t)
	m := devicetest.NewMemory(1 << 20)
	d := create(t, New(t.TempDir()), "shape", m, transport.Options{})
	for file, want := range map[string]string{
		"size": "2048", "ro": "0", "queue/logical_block_size": "4096", "queue/write_cache": "write back", "queue/fua": "1",
	} {
		if got, err := attribute(d.index, file); got != want || err != nil {
			t.Errorf("%s is %q, want %q (%v)", file, got, want, err)
		}
	}
	if n, err := attribute(d.index, "queue/discard_max_bytes"); n == "0" || err != nil {
		t.Errorf("no discards: %v", err)
	}
	f := devicetest.Open(t, d.Path(), os.O_RDWR)
	m.Grow(2 << 20)
	if err := d.Resize(); err != nil {
		t.Error(err)
	}
	if _, err := f.WriteAt(devicetest.Aligned(t, blockSize), 2<<20-blockSize); err != nil {
		t.Errorf("write to what is new: %v", err)
	}
	f.Close()
}

func TestReadOnlyDevice(t *testing.T) {
	needDriver(t)
	m := devicetest.NewMemory(1 << 20)
	d := create(t, New(t.TempDir()), "ro", m, transport.Options{ReadOnly: true})
	if ro, err := attribute(d.index, "ro"); ro != "1" || err != nil {
		t.Errorf("ro is %q, %v", ro, err)
	}
	if w, err := os.OpenFile(d.Path(), os.O_RDWR|unix.O_DIRECT, 0); err == nil {
		if _, err := w.WriteAt(devicetest.Aligned(t, blockSize), 0); err == nil {
			t.Error("write to a read-only device succeeds")
		}
		w.Close()
	}
	if m.Writes.Load() != 0 {
		t.Error("the backend was written")
	}
}

// TestErrors: a request that fails fails, and the next one is served.
func TestErrors(t *testing.T) {
	needDriver(t)
	m := devicetest.NewMemory(1 << 20)
	d := create(t, New(t.TempDir()), "errors", m, transport.Options{})
	f := devicetest.Open(t, d.Path(), os.O_RDWR)
	buf := devicetest.Aligned(t, blockSize)
	for range 2 {
		m.FailWith(unix.ENOSPC)
		_, writeErr := f.WriteAt(buf, 0)
		_, readErr := f.ReadAt(buf, 0)
		for what, err := range map[string]error{"write": writeErr, "read": readErr, "flush": f.Sync(), "discard": devicetest.RangeIoctl(f, devicetest.Discard, 0, blockSize)} {
			if !errors.Is(err, unix.EIO) {
				t.Errorf("%s: %v", what, err)
			}
		}
		m.FailWith(nil)
		zeros := m.Zeros.Load()
		if err := errors.Join(f.Sync(), devicetest.RangeIoctl(f, devicetest.Discard, 0, blockSize)); err != nil || m.Zeros.Load() == zeros {
			t.Errorf("afterwards: %v, %d discards", err, m.Zeros.Load()-zeros)
		}
	}
	f.Close()
}

func TestCloseBusy(t *testing.T) {
	needDriver(t)
	m := devicetest.NewMemory(16 << 20)
	tr := New(t.TempDir())
	d := create(t, tr, "busy", m, transport.Options{})
	if out, err := exec.Command("mkfs.ext4", "-q", d.Path()).CombinedOutput(); err != nil {
		t.Skipf("mkfs.ext4: %v: %s", err, out)
	}
	dir := t.TempDir()
	if err := unix.Mount(d.Path(), dir, "ext4", 0, ""); err != nil {
		t.Fatal(err)
	}
	if err := d.Close(t.Context()); !errors.Is(err, transport.ErrBusy) {
		t.Errorf("close of a mounted device: %v", err)
	}
	if err := os.WriteFile(dir+"/file", make([]byte, 1<<20), 0o600); err != nil {
		t.Errorf("it does not serve any more: %v", err)
	}
	if err := unix.Unmount(dir, 0); err != nil {
		t.Fatal(err)
	}
	flushes := m.Flushes.Load()
	closeDevice(t, d)
	if m.Flushes.Load() == flushes {
		t.Error("close did not flush the backend")
	}
	closeDevice(t, d)
	create(t, tr, "busy", m, transport.Options{}) // its record is free
}

// TestCloseWhileClosing closes the device while the close of its last user is writing
// what is dirty, which must not be lost.
func TestCloseWhileClosing(t *testing.T) {
	needDriver(t)
	m := devicetest.NewMemory(1 << 20)
	d := create(t, New(t.TempDir()), "closing", m, transport.Options{})
	left, release := closeDirty(t, d.Path(), m)
	defer release() // before the device's clean-up
	closed := make(chan error, 1)
	go func() { closed <- d.Close(t.Context()) }()
	select {
	case <-d.connsDone:
		t.Error("disconnected while a page was dirty")
	case err := <-closed:
		t.Errorf("closed while a page was dirty: %v", err)
		closed <- nil
	case <-time.After(time.Second): // it waits
	}
	release()
	if err := errors.Join(<-closed, <-left); err != nil || string(m.Content()[:blockSize]) != string(stamp(1)) {
		t.Error(err)
	}
}

// TestSlow: a backend that takes longer than the driver waits.
func TestSlow(t *testing.T) {
	needDriver(t)
	m := devicetest.NewMemory(1 << 20)
	d := create(t, New(t.TempDir()), "slow", m, transport.Options{})
	f := devicetest.Open(t, d.Path(), os.O_RDWR)
	release := m.Hang()
	done := make(chan error, 1)
	buf := devicetest.Aligned(t, blockSize)
	copy(buf, "late")
	go func() {
		_, err := f.WriteAt(buf, 0)
		done <- err
	}()
	time.Sleep(2*requestTimeout + requestTimeout/2) // the subject of the test
	release()
	select {
	case err := <-done:
		if err != nil {
			t.Errorf("slow write: %v", err)
		}
	case <-time.After(patience):
		t.Fatal("never answered")
	}
	clear(buf)
	if _, err := f.ReadAt(buf, 0); err != nil || string(buf[:4]) != "late" {
		t.Errorf("read %q, %v", buf[:4], err)
	}
	f.Close()
}

func TestAbortHung(t *testing.T) {
	needDriver(t)
	m := devicetest.NewMemory(1 << 20)
	tr := New(t.TempDir())
	d := create(t, tr, "hung", m, transport.Options{})
	files := make([]*os.File, 3) // opened first: the kernel looks for partitions then
	for i := range files {
		files[i] = devicetest.Open(t, d.Path(), os.O_RDWR)
	}
	release := m.Hang()
	defer release()
	errs := make(chan error, 3)
	for i, f := range files {
		buf := devicetest.Aligned(t, blockSize)
		go func() {
			_, err := f.WriteAt(buf, int64(i)*blockSize)
			errs <- err
			f.Close()
		}()
	}
	waitFor(t, "the writes arrive", func() bool { return m.Writes.Load() == 3 })
	begin := time.Now()
	if err := d.Abort(); err != nil {
		t.Error(err)
	}
	for range 3 {
		if err := <-errs; !errors.Is(err, unix.EIO) {
			t.Errorf("write gives %v", err)
		}
	}
	took := time.Since(begin)
	if took > 45*time.Second {
		t.Errorf("abort took %v", took)
	}
	t.Logf("abort took %v", took)
	select {
	case <-d.Failed():
		t.Error("an aborted device has failed")
	default:
	}
	release()
	create(t, tr, "hung", m, transport.Options{})
}

// TestDisconnectedByOthers: the number of a device that others have disconnected goes to
// the next one, which is not to be taken away in its place.
func TestDisconnectedByOthers(t *testing.T) {
	needDriver(t)
	tr := New(t.TempDir())
	d := create(t, tr, "stopped", devicetest.NewMemory(1<<20), transport.Options{})
	if err := disconnect(d.index); err != nil {
		t.Fatal(err)
	}
	select {
	case <-d.Failed():
	case <-time.After(patience):
		t.Error("nobody has noticed")
	}
	next := create(t, tr, "next", devicetest.NewMemory(1<<20), transport.Options{})
	if next.index != d.index {
		t.Errorf("the next device is %s, want %s", next.Path(), d.Path())
	}
	if err := d.Abort(); err != nil {
		t.Error(err)
	}
	f := devicetest.Open(t, next.Path(), os.O_RDWR)
	if _, err := f.ReadAt(devicetest.Aligned(t, blockSize), 0); err != nil {
		t.Errorf("the next device: %v", err)
	}
	f.Close()
	create(t, tr, "stopped", devicetest.NewMemory(1<<20), transport.Options{})
}

func TestCreateRefuses(t *testing.T) {
	needDriver(t)
	dir := t.TempDir()
	tr := New(dir)
	create(t, tr, "a", devicetest.NewMemory(1<<20), transport.Options{})
	for _, tt := range []struct {
		name, volume string
		size         int64
		tr           *Transport
		want         string
	}{
		{"no size", "b", 0, tr, "not a multiple"},
		{"no id", "", 4096, tr, "empty volume id"},
		{"twice", "a", 4096, tr, "already"},
		{"left by another process", "a", 4096, New(dir), "must be adopted"},
	} {
		if _, err := tt.tr.Create(t.Context(), tt.volume, devicetest.NewMemory(tt.size), transport.Options{}); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v", tt.name, err)
		}
	}
	if _, err := tr.Adopt(t.Context(), "c", devicetest.NewMemory(4096)); !errors.Is(err, transport.ErrNotFound) {
		t.Errorf("adopt of nothing: %v", err)
	}
	if left, err := New(dir).Leftovers(t.Context()); len(left) != 1 || left[0] != "a" || err != nil {
		t.Errorf("leftovers for another process: %v, %v", left, err)
	}
	if err := tr.Probe(); err != nil {
		t.Error(err)
	}
}

// starter starts servers whose records are in dir.
func starter(t testing.TB, dir string) func(image string) *devicetest.Server {
	return func(image string) *devicetest.Server { return devicetest.StartServer(t, image, dir) }
}

func TestKillUnderLoad(t *testing.T) {
	needDriver(t)
	devicetest.KillUnderLoad(t, 16, starter(t, t.TempDir()))
}

func TestKillFio(t *testing.T) {
	needDriver(t)
	devicetest.KillFio(t, starter(t, t.TempDir()))
}

func TestKillWithMount(t *testing.T) {
	needDriver(t)
	devicetest.KillWithMount(t, starter(t, t.TempDir()), "discard")
}
