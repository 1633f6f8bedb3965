package fuseloop

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/snapmerge/snapmerge/pkg/keeper"
	"github.com/snapmerge/snapmerge/test/devicetest"
	"github.com/snapmerge/snapmerge/test/machine"
)

// needResend skips on kernels that cannot send requests again.
func needResend(t *testing.T) {
	t.Helper()
	needRoot(t)
	features, err := handshake()
	if err != nil {
		t.Fatal(err)
	}
	if features&featHasResend == 0 {
		t.Skip("needs FUSE_NOTIFY_RESEND (kernel 6.9)")
	}
}

// load is fio verify on a device, again and again.
type load struct {
	dev     string
	stop    chan struct{}
	ended   chan struct{}
	longest time.Duration // that any request took; valid once ended is closed
}

// verifyLoop begins a load. It ends with the test at the latest.
func verifyLoop(t *testing.T, dev, blocks string) *load {
	t.Helper()
	l := &load{dev: dev, stop: make(chan struct{}), ended: make(chan struct{})}
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(func() {
		cancel()
		<-l.ended
	})
	go func() {
		defer close(l.ended)
		for pass := 1; ; pass++ {
			// Not by io_uring, which containers forbid.
			out, err := exec.CommandContext(ctx, "fio", "--name=v", "--filename="+dev, "--direct=1", "--ioengine=libaio",
				"--rw=randwrite", "--bsrange="+blocks, "--iodepth=32", "--verify=crc32c", "--do_verify=1",
				"--verify_fatal=1", "--verify_state_save=0", "--randrepeat=0", "--output-format=json").CombinedOutput()
			if ctx.Err() != nil {
				return // the test has failed already
			}
			if err != nil {
				t.Errorf("fio pass %d on %s: %v: %s", pass, dev, err, out)
				return
			}
			r, err := parseFio(out)
			if err != nil {
				t.Error(err)
				return
			}
			if r.Jobs[0].Error != 0 || r.Jobs[0].Read.IOBytes == 0 || r.Jobs[0].Write.IOBytes == 0 {
				t.Errorf("fio pass %d on %s: error %d, %d bytes written, %d verified", pass, dev,
					r.Jobs[0].Error, r.Jobs[0].Write.IOBytes, r.Jobs[0].Read.IOBytes)
			}
			l.longest = max(l.longest, r.longest())
			select {
			case <-l.stop:
				t.Logf("fio verify on %s: %d passes without an error", dev, pass)
				return
			default:
			}
		}
	}()
	return l
}

// finish lets the pass under way end. On a slow disk that may take long, but some
// request is answered all the time.
func (l *load) finish(t *testing.T) time.Duration {
	t.Helper()
	close(l.stop)
	for last := ""; ; {
		now := answered(t, l.dev)
		if now == last {
			t.Fatal("fio does not end: a request got no answer")
		}
		last = now
		select {
		case <-l.ended:
			return l.longest
		case <-time.After(patience):
		}
	}
}

// answered is what changes with each request of a device that ends: the numbers of
// reads and writes in its stat file (Documentation/block/stat.rst of the kernel).
func answered(t *testing.T, dev string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("/sys/class/block", filepath.Base(dev), "stat"))
	f := strings.Fields(string(b))
	if err != nil || len(f) < 5 {
		t.Fatalf("stat of %s: %q, %v", dev, b, err)
	}
	return f[0] + " " + f[4]
}

// abortIfFailed makes whatever still waits for an answer at the end of a failed
// test fail, so that the test ends.
func abortIfFailed(t *testing.T, k *keeper.Client, volumes ...string) {
	t.Helper()
	var conns []uint32
	for _, v := range volumes {
		raw, fds, err := k.Get(t.Context(), keyPrefix+v)
		if err != nil {
			t.Fatal(err)
		}
		keeper.CloseAll(fds)
		m, err := parseMeta(raw, len(fds))
		if err != nil {
			t.Fatal(err)
		}
		conns = append(conns, m.Conn)
	}
	t.Cleanup(func() {
		for _, id := range conns {
			if !t.Failed() {
				continue // closed, and the number may be somebody else's now
			}
			if err := abortConn(id); err != nil {
				t.Error(err)
			}
		}
	})
}

// TestKillUnderLoad kills the serving process with SIGKILL ten times or more, and the
// keeper once, while fio writes and verifies two volumes.
func TestKillUnderLoad(t *testing.T) {
	needResend(t)
	needFio(t)
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	images := []string{imageFile(t, 48<<20), imageFile(t, 48<<20)}
	noLeftovers(t, filepath.Base(images[0]), filepath.Base(images[1]))
	socket := machine.SocketPath(t, "keeper.sock")
	k := startKeeper(t, socket)
	observer := dialKeeper(t, socket)
	args := append([]string{socket}, images...)
	server := startHelper(t, "server", args...)
	devices := server.line(t, "ready")

	var loads []*load
	for i, blocks := range []string{"4k-64k", "1m-1m"} {
		loads = append(loads, verifyLoop(t, devices[i], blocks))
	}
	abortIfFailed(t, observer, filepath.Base(images[0]), filepath.Base(images[1]))
	var outages []time.Duration
	kill := func() {
		time.Sleep(time.Duration(rng.IntN(400)) * time.Millisecond) // some load
		begin := time.Now()
		server.kill(t)
		server = startHelper(t, "server", args...)
		if again := server.line(t, "adopted"); !slices.Equal(again, devices) {
			t.Fatalf("adopted %v, had %v", again, devices)
		}
		outages = append(outages, time.Since(begin))
	}
	for range max(10, devicetest.Kills(t)) {
		kill()
	}
	// A new keeper gets everything from the server, and serves the next one.
	k.kill(t)
	startKeeper(t, socket)
	for _, image := range images {
		key := keyPrefix + filepath.Base(image)
		eventually(t, "the server fills the new keeper", func() bool {
			keys, err := observer.List(t.Context())
			return err == nil && slices.Contains(keys, key)
		})
	}
	kill()
	for _, l := range loads {
		t.Logf("longest stall of a request: %v", l.finish(t))
	}
	t.Logf("%d kills; from kill to service at most %v", len(outages), slices.Max(outages))
	server.finish(t)
	if keys, err := observer.List(t.Context()); err != nil || len(keys) != 0 {
		t.Errorf("the keeper still has %v, %v", keys, err)
	}
}

// TestKillWithMount kills the server under a mounted file system that is being
// written, and checks the file system afterwards.
func TestKillWithMount(t *testing.T) {
	needResend(t)
	image := imageFile(t, 64<<20)
	noLeftovers(t, filepath.Base(image))
	socket := machine.SocketPath(t, "keeper.sock")
	startKeeper(t, socket)
	server := startHelper(t, "server", socket, image)
	dev := server.line(t, "ready")[0]
	mkfsExt4(t, dev)
	dir := t.TempDir()
	if err := unix.Mount(dev, dir, "ext4", 0, ""); err != nil {
		t.Fatal(err)
	}
	mounted := true
	unmount := func() {
		if mounted {
			if err := unix.Unmount(dir, 0); err != nil {
				t.Error(err)
			}
			mounted = false
		}
	}
	defer unmount()
	stop, written := make(chan struct{}), make(chan int, 1)
	content := bytes.Repeat([]byte("0123456789abcdef"), 8<<10) // 128 KiB
	write := func(n int) error {
		f, err := os.Create(filepath.Join(dir, string(rune('a'+n%26))))
		if err != nil {
			return err
		}
		_, err = f.Write(content)
		return errors.Join(err, f.Sync(), f.Close())
	}
	go func() {
		n := 0
		defer func() { written <- n }()
		for ; ; n++ {
			select {
			case <-stop:
				return
			default:
			}
			if err := write(n); err != nil {
				t.Errorf("file %d: %v", n, err)
				return
			}
		}
	}()
	for range 5 {
		time.Sleep(50 * time.Millisecond) // some load
		server.kill(t)
		server = startHelper(t, "server", socket, image)
		server.line(t, "adopted")
	}
	close(stop)
	n := <-written
	t.Logf("%d files written and synced", n)
	for i := range min(n, 26) {
		if got, err := os.ReadFile(filepath.Join(dir, string(rune('a'+i)))); err != nil || !bytes.Equal(got, content) {
			t.Errorf("file %d: %d bytes, %v", i, len(got), err)
		}
	}
	unmount()
	if out, err := exec.Command("e2fsck", "-fn", dev).CombinedOutput(); err != nil {
		t.Errorf("e2fsck: %v: %s", err, out)
	}
	server.finish(t)
}

// TestKillWhileFrozen kills the server while it has its own volume frozen. The
// keeper's thaw has to write to the dead device and ends when the next server
// has adopted it.
func TestKillWhileFrozen(t *testing.T) {
	needResend(t)
	image := imageFile(t, 64<<20)
	noLeftovers(t, filepath.Base(image))
	socket := machine.SocketPath(t, "keeper.sock")
	startKeeper(t, socket)
	server := startHelper(t, "server", socket, image)
	dev := server.line(t, "ready")[0]
	mkfsExt4(t, dev)
	dir := t.TempDir()
	if err := unix.Mount(dev, dir, "ext4", 0, ""); err != nil {
		t.Fatal(err)
	}
	for i := range 3 {
		dirty := filepath.Join(dir, string(rune('a'+i)))
		if err := os.WriteFile(dirty, make([]byte, 1<<20), 0o600); err != nil {
			t.Fatal(err)
		}
		server.tell(t, "freeze "+dir)
		server.line(t, "frozen")
		written := make(chan error, 1)
		go func() { written <- os.WriteFile(filepath.Join(dir, "late"), []byte("x"), 0o600) }()
		server.kill(t)
		server = startHelper(t, "server", socket, image)
		server.line(t, "adopted")
		select {
		case err := <-written:
			if err != nil {
				t.Error(err)
			}
		case <-time.After(watchdog / 2):
			t.Fatal("still frozen though the server that froze is dead")
		}
	}
	// The keeper's descriptor of the directory may live a moment longer.
	eventually(t, "unmount", func() bool { return unix.Unmount(dir, 0) == nil })
	server.finish(t)
}

// TestKillAnytime kills the server at moments of its start and of its end.
func TestKillAnytime(t *testing.T) {
	needResend(t)
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	image := imageFile(t, 4<<20)
	noLeftovers(t, filepath.Base(image))
	socket := machine.SocketPath(t, "keeper.sock")
	startKeeper(t, socket)
	states := make(map[string]int)
	for range 25 {
		server := startHelper(t, "server", socket, image)
		if rng.IntN(2) == 0 {
			line, err := server.out.ReadString('\n')
			if err != nil {
				t.Fatal(err)
			}
			states[strings.Fields(line)[0]]++
			server.tell(t, "close")
			time.Sleep(time.Duration(rng.IntN(5000)) * time.Microsecond)
		} else {
			time.Sleep(time.Duration(rng.IntN(40)) * time.Millisecond)
		}
		server.kill(t)
	}
	t.Logf("starts that got far enough: %v", states)
	server := startHelper(t, "server", socket, image)
	if line, err := server.out.ReadString('\n'); err != nil || strings.HasPrefix(line, "error") {
		t.Fatalf("%q, %v", line, err)
	}
	server.finish(t)
	if keys, err := dialKeeper(t, socket).List(t.Context()); err != nil || len(keys) != 0 {
		t.Errorf("the keeper still has %v, %v", keys, err)
	}
}

// TestKillInsideClose: a process that dies between asking the kernel to detach a
// device in use and taking that back must not leave a device that vanishes with
// its last user.
func TestKillInsideClose(t *testing.T) {
	needResend(t)
	image := imageFile(t, 4<<20)
	noLeftovers(t, filepath.Base(image))
	socket := machine.SocketPath(t, "keeper.sock")
	startKeeper(t, socket)
	server := startHelper(t, "server", socket, image)
	dev := server.line(t, "ready")[0]
	server.kill(t)
	f := openGuest(t, dev, os.O_RDWR)
	g := openGuest(t, dev, os.O_RDWR) // with one opener it would be detached at once
	if err := unix.IoctlSetInt(int(g.Fd()), unix.LOOP_CLR_FD, 0); err != nil {
		t.Fatal(err)
	}
	g.Close()
	server = startHelper(t, "server", socket, image)
	server.line(t, "adopted")
	f.Close()
	f = openGuest(t, dev, os.O_RDWR)
	if _, err := f.WriteAt(aligned(t, blockSize), 0); err != nil {
		t.Errorf("the device is gone: %v", err)
	}
	f.Close()
	server.finish(t)
}

// TestBothDie: when keeper and server are dead the guest gets errors at once,
// and a new pair can serve the volume again while the dead device is in use.
func TestBothDie(t *testing.T) {
	needResend(t)
	image := imageFile(t, 4<<20)
	noLeftovers(t, filepath.Base(image))
	socket := machine.SocketPath(t, "keeper.sock")
	k := startKeeper(t, socket)
	server := startHelper(t, "server", socket, image)
	f := openGuest(t, server.line(t, "ready")[0], os.O_RDWR)
	buf := aligned(t, blockSize)
	copy(buf, "kept")
	if _, err := f.WriteAt(buf, 0); err != nil {
		t.Fatal(err)
	}
	k.kill(t)
	server.kill(t)
	if _, err := f.ReadAt(buf, 0); !errors.Is(err, unix.EIO) {
		t.Errorf("guest gets %v", err)
	}
	startKeeper(t, socket)
	server = startHelper(t, "server", socket, image)
	g := openGuest(t, server.line(t, "ready")[0], os.O_RDWR)
	if _, err := g.ReadAt(buf, 0); err != nil || string(buf[:4]) != "kept" {
		t.Errorf("read %q, %v", buf[:4], err)
	}
	if g.Name() == f.Name() {
		t.Error("the dead device is in use and was reused")
	}
	f.Close() // the dead device goes now
	g.Close()
	server.finish(t)
}

// TestDiesWithoutKeeper: the next process sweeps up.
func TestDiesWithoutKeeper(t *testing.T) {
	needRoot(t)
	image := imageFile(t, 4<<20)
	noLeftovers(t, filepath.Base(image))
	server := startHelper(t, "server", "", image)
	dev := server.line(t, "ready")[0]
	server.kill(t)
	if stale, err := staleLoops(filepath.Base(image)); err != nil || len(stale) != 1 || stale[0].path() != dev {
		t.Errorf("stale devices %v, %v; want %s", stale, err, dev)
	}
	server = startHelper(t, "server", "", image)
	server.line(t, "ready")
	if stale, err := staleLoops(filepath.Base(image)); err != nil || len(stale) != 1 {
		t.Errorf("devices %v, %v; want the new one alone", stale, err)
	}
	server.finish(t)
}
