package fuseloop

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"runtime/pprof"
	"strings"
	"sync"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/snapmerge/snapmerge/pkg/transport"
)

const patience = 30 * time.Second

// BLKDISCARD, BLKZEROOUT and BLKFLSBUF of linux/fs.h.
const (
	ioctlDiscard = 0x1277
	ioctlZeroOut = 0x127f
)

func needRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
}

// eventually waits for something that has no event to wait for.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("never happened: %s", what)
		}
	}
}

func within(t testing.TB, limit time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	t.Cleanup(cancel)
	return ctx
}

func closeDevice(t testing.TB, d transport.Device) {
	t.Helper()
	if err := d.Close(within(t, patience)); err != nil {
		t.Error(err)
	}
}

// noLeftovers makes the test fail if it leaves descriptors, goroutines or loop
// devices of the volumes behind.
func noLeftovers(t *testing.T, volumes ...string) {
	t.Helper()
	needRoot(t)
	before := len(openFiles(t))
	t.Cleanup(func() {
		for _, v := range volumes {
			if stale, err := staleLoops(v); err != nil || len(stale) > 0 {
				t.Errorf("loop devices of volume %s left: %v, %v", v, stale, err)
				for _, l := range stale {
					l.discard()
				}
			}
		}
		eventually(t, "goroutines end", func() bool {
			var b bytes.Buffer
			pprof.Lookup("goroutine").WriteTo(&b, 1)
			return !strings.Contains(b.String(), "fuseloop.(*readerSet)") &&
				!strings.Contains(b.String(), "fuseloop.(*device)")
		})
		if after := openFiles(t); len(after) > before {
			t.Errorf("descriptors left: had %d, now %v", before, after)
		}
	})
}

// openFiles is what this process has open.
func openFiles(t testing.TB) []string {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		if name, err := os.Readlink("/proc/self/fd/" + e.Name()); err == nil {
			names = append(names, name)
		}
	}
	return names
}

// create makes a device that is closed at the end of the test.
func create(t testing.TB, tr *Transport, volume string, b transport.Backend, o transport.Options) *device {
	t.Helper()
	d, err := tr.Create(within(t, patience), volume, b, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { closeDevice(t, d) })
	return d.(*device)
}

// openGuest opens the device as a guest with direct I/O.
func openGuest(t testing.TB, path string, flags int) *os.File {
	t.Helper()
	f, err := os.OpenFile(path, flags|unix.O_DIRECT, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// aligned is memory for direct I/O.
func aligned(t testing.TB, n int) []byte {
	t.Helper()
	b, err := unix.Mmap(-1, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Munmap(b) })
	return b
}

// rangeIoctl is BLKDISCARD or BLKZEROOUT.
func rangeIoctl(f *os.File, request uintptr, off, n int64) error {
	r := [2]uint64{uint64(off), uint64(n)}
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), request, uintptr(unsafe.Pointer(&r)))
	if errno != 0 {
		return errno
	}
	return nil
}

// TestRandomIO works on two devices at once and compares with a model.
func TestRandomIO(t *testing.T) {
	volumes := []string{"random-a", "random-b"}
	noLeftovers(t, volumes...)
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	tr := New(nil)
	var wg sync.WaitGroup
	defer wg.Wait()
	for i, v := range volumes {
		m := newMemBackend(8 << 20)
		d := create(t, tr, v, m, transport.Options{})
		f := openGuest(t, d.Path(), os.O_RDWR)
		buf := aligned(t, 1<<20)
		wg.Go(func() { randomIO(t, f, m, buf, rand.New(rand.NewPCG(seed, uint64(i)))) })
	}
	wg.Wait()
}

func randomIO(t *testing.T, f *os.File, m *memBackend, buf []byte, rng *rand.Rand) {
	const blocks = 8 << 20 / blockSize
	model := make([]byte, 8<<20)
	for i := range 400 {
		n := 1 + rng.IntN(len(buf)/blockSize)
		if rng.IntN(2) == 0 {
			n = 1 + rng.IntN(4)
		}
		off := int64(rng.IntN(blocks-n+1)) * blockSize
		p, want := buf[:n*blockSize], model[off:off+int64(n)*blockSize]
		var err error
		switch rng.IntN(6) {
		case 0, 1:
			for j := range p {
				p[j] = byte(rng.Uint32())
			}
			copy(want, p)
			_, err = f.WriteAt(p, off)
		case 2:
			clear(want)
			err = rangeIoctl(f, ioctlDiscard, off, int64(len(p)))
		case 3:
			clear(want)
			err = rangeIoctl(f, ioctlZeroOut, off, int64(len(p)))
		case 4:
			flushes := m.flushes.Load()
			if err = f.Sync(); err == nil && m.flushes.Load() == flushes {
				t.Errorf("step %d: a flush did not reach the backend", i)
			}
		default:
			_, err = f.ReadAt(p, off)
			if err == nil && !bytes.Equal(p, want) {
				t.Errorf("step %d: read %d blocks at %d wrong", i, n, off)
			}
		}
		if err != nil {
			t.Errorf("step %d: %v", i, err)
			return
		}
	}
	if !bytes.Equal(m.content(0, m.Size()), model) {
		t.Error("the backend has not what was written")
	}
	if m.zeros.Load() == 0 {
		t.Error("discards did not reach the backend")
	}
	if n := m.unaligned.Load(); n > 0 {
		t.Errorf("%d transfers with memory that is not page aligned", n)
	}
}

// TestLargeIO checks that the kernel splits large transfers no further than it
// must: a request has 128 segments, which for scattered pages is 512 KiB.
func TestLargeIO(t *testing.T) {
	noLeftovers(t, "large")
	m := newMemBackend(8 << 20)
	d := create(t, New(nil), "large", m, transport.Options{})
	f := openGuest(t, d.Path(), os.O_RDWR)
	for _, mib := range []int{1, 8} {
		buf := aligned(t, mib<<20)
		reads, writes := m.reads.Load(), m.writes.Load()
		if _, err := f.WriteAt(buf, 0); err != nil {
			t.Fatal(err)
		}
		if _, err := f.ReadAt(buf, 0); err != nil {
			t.Fatal(err)
		}
		reads, writes = m.reads.Load()-reads, m.writes.Load()-writes
		t.Logf("%d MiB became %d reads and %d writes, the largest of %d bytes", mib, reads, writes, m.largest.Load())
		if most := int64(2*mib + 1); reads > most || writes > most {
			t.Errorf("%d MiB became %d reads and %d writes, want at most %d", mib, reads, writes, most)
		}
	}
}

func TestDeviceShape(t *testing.T) {
	noLeftovers(t, "shape")
	d := create(t, New(nil), "shape", newMemBackend(1<<20), transport.Options{})
	name := filepath.Base(d.Path())
	for file, want := range map[string]string{
		"size":                      "2048",
		"ro":                        "0",
		"queue/logical_block_size":  "4096",
		"queue/discard_granularity": "4096",
		"loop/dio":                  "1",
		"loop/backing_file":         "/disk-" + volumeHash("shape"),
	} {
		b, err := os.ReadFile(filepath.Join("/sys/block", name, file))
		if got := strings.TrimSpace(string(b)); err != nil || got != want {
			t.Errorf("%s is %q, want %q (%v)", file, got, want, err)
		}
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil || bytes.Contains(mounts, []byte("snapmerge")) {
		t.Errorf("visible in the mount table: %v\n%s", err, mounts)
	}
}

// TestHoldsNothing checks what must never be open in a serving process, and that
// a child inherits nothing.
func TestHoldsNothing(t *testing.T) {
	noLeftovers(t, "nothing")
	d := create(t, New(nil), "nothing", newMemBackend(1<<20), transport.Options{})
	for _, name := range openFiles(t) {
		if strings.Contains(name, "/disk-") || name == d.Path() {
			t.Errorf("holds %s", name)
		}
	}
	out, err := exec.Command("ls", "-l", "/proc/self/fd").CombinedOutput()
	if err != nil {
		t.Fatal(err)
	}
	if s := string(out); strings.Contains(s, "fuse") || strings.Contains(s, "eventpoll") || strings.Contains(s, "-> /\n") {
		t.Errorf("a child has inherited descriptors:\n%s", s)
	}
}

func TestErrorsReachTheGuest(t *testing.T) {
	noLeftovers(t, "errors")
	m := newMemBackend(1 << 20)
	d := create(t, New(nil), "errors", m, transport.Options{})
	f := openGuest(t, d.Path(), os.O_RDWR)
	buf := aligned(t, blockSize)
	for _, tt := range []struct{ give, want error }{
		{unix.ENOSPC, unix.ENOSPC},
		{fmt.Errorf("write log: %w", unix.ENOSPC), unix.ENOSPC},
		{unix.EIO, unix.EIO},
		{errors.New("no errno at all"), unix.EIO},
		{unix.ENOSYS, unix.EIO},
		{unix.EINTR, unix.EIO},
		{unix.EAGAIN, unix.EIO},
	} {
		m.failWith(tt.give)
		if _, err := f.WriteAt(buf, 0); !errors.Is(err, tt.want) {
			t.Errorf("backend's %v: write gives %v, want %v", tt.give, err, tt.want)
		}
		if _, err := f.ReadAt(buf, 0); !errors.Is(err, tt.want) {
			t.Errorf("backend's %v: read gives %v, want %v", tt.give, err, tt.want)
		}
		if err := f.Sync(); !errors.Is(err, unix.EIO) { // the loop driver knows no other
			t.Errorf("backend's %v: flush gives %v", tt.give, err)
		}
		if err := rangeIoctl(f, ioctlDiscard, 0, blockSize); err == nil {
			t.Errorf("backend's %v: discard succeeds", tt.give)
		}
		m.failWith(nil)
		// No error may have taught the kernel not to ask any more.
		flushes, zeros := m.flushes.Load(), m.zeros.Load()
		if err := errors.Join(f.Sync(), rangeIoctl(f, ioctlDiscard, 0, blockSize)); err != nil {
			t.Errorf("after %v: %v", tt.give, err)
		}
		if m.flushes.Load() == flushes || m.zeros.Load() == zeros {
			t.Errorf("after %v flush or discard do not arrive any more", tt.give)
		}
	}
}

func TestReadOnly(t *testing.T) {
	noLeftovers(t, "ro")
	m := newMemBackend(1 << 20)
	copy(m.data[blockSize:], "hello")
	d := create(t, New(nil), "ro", m, transport.Options{ReadOnly: true})
	f := openGuest(t, d.Path(), os.O_RDONLY)
	buf := aligned(t, blockSize)
	if _, err := f.ReadAt(buf, blockSize); err != nil || string(buf[:5]) != "hello" {
		t.Errorf("read %q, %v", buf[:5], err)
	}
	if w, err := os.OpenFile(d.Path(), os.O_RDWR, 0); err == nil {
		if _, err := w.WriteAt(make([]byte, blockSize), 0); err == nil {
			err = w.Sync()
			t.Errorf("write to a read-only device succeeds, sync says %v", err)
		}
		w.Close()
	}
	if m.writes.Load()+m.zeros.Load() != 0 {
		t.Error("the backend was written")
	}
	if b, err := os.ReadFile("/sys/block/" + filepath.Base(d.Path()) + "/ro"); err != nil || string(b) != "1\n" {
		t.Errorf("ro is %q, %v", b, err)
	}
	f.Close()
}

func TestResizeUnderIO(t *testing.T) {
	noLeftovers(t, "resize")
	const first, step, steps = 4 << 20, 4096 * 3, 40
	m := newMemBackend(first)
	d := create(t, New(nil), "resize", m, transport.Options{})
	f := openGuest(t, d.Path(), os.O_RDWR)
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	for i := range 3 {
		buf := aligned(t, 64<<10)
		wg.Go(func() {
			for off := int64(i) << 20; ctx.Err() == nil; off = (off + 64<<10) % first {
				if _, err := f.WriteAt(buf, off); err != nil {
					t.Errorf("write during resize: %v", err)
					return
				}
			}
		})
	}
	buf := aligned(t, blockSize)
	for i := range steps {
		size := int64(first + (i+1)*step)
		m.grow(size)
		if err := d.Resize(); err != nil {
			t.Fatal(err)
		}
		copy(buf, fmt.Sprint(size))
		if _, err := f.WriteAt(buf, size-blockSize); err != nil {
			t.Fatalf("last block of %d: %v", size, err)
		}
		if !bytes.HasPrefix(m.content(size-blockSize, blockSize), []byte(fmt.Sprint(size))) {
			t.Fatal("written elsewhere")
		}
	}
	cancel()
	wg.Wait()
	if err := d.Resize(); err != nil {
		t.Errorf("resize to the same size: %v", err)
	}
	m.grow(first + steps*step + 512)
	if err := d.Resize(); err == nil {
		t.Error("resize to half a block succeeds")
	}
	m.mu.Lock()
	m.data = m.data[:first]
	m.mu.Unlock()
	if err := d.Resize(); err == nil {
		t.Error("shrinking succeeds")
	}
	f.Close()
	closeDevice(t, d)
	if err := d.Resize(); err == nil {
		t.Error("resize of a closed device succeeds")
	}
}

func TestBusyOpen(t *testing.T) {
	noLeftovers(t, "busy")
	m := newMemBackend(1 << 20)
	d := create(t, New(nil), "busy", m, transport.Options{})
	f := openGuest(t, d.Path(), os.O_RDWR)
	buf := aligned(t, blockSize)
	for range 3 {
		if err := d.Close(within(t, 50*time.Millisecond)); !errors.Is(err, transport.ErrBusy) {
			t.Fatalf("close of an open device: %v", err)
		}
		if _, err := f.WriteAt(buf, 0); err != nil {
			t.Fatalf("does not go on: %v", err)
		}
	}
	// The last user going away must not take the device with it now.
	f.Close()
	f = openGuest(t, d.Path(), os.O_RDWR)
	if _, err := f.ReadAt(buf, 0); err != nil {
		t.Errorf("the device is gone: %v", err)
	}
	// A user who leaves in time, as udev does, is no obstacle.
	go func() {
		time.Sleep(5 * pollLoop)
		f.Close()
	}()
	closeDevice(t, d)
	select {
	case <-d.Failed():
		t.Error("an orderly end counts as a failure")
	default:
	}
	if m.flushes.Load() == 0 {
		t.Error("closed without a flush")
	}
	closeDevice(t, d) // again is no error
}

func mkfsExt4(t testing.TB, dev string) {
	t.Helper()
	if _, err := exec.LookPath("mkfs.ext4"); err != nil {
		t.Skip("needs mkfs.ext4")
	}
	if out, err := exec.Command("mkfs.ext4", "-q", dev).CombinedOutput(); err != nil {
		t.Fatalf("mkfs.ext4: %v: %s", err, out)
	}
}

func TestBusyMounted(t *testing.T) {
	noLeftovers(t, "mounted")
	d := create(t, New(nil), "mounted", newMemBackend(16<<20), transport.Options{})
	mkfsExt4(t, d.Path())
	dir := t.TempDir()
	if err := unix.Mount(d.Path(), dir, "ext4", 0, ""); err != nil {
		t.Fatal(err)
	}
	text := []byte(strings.Repeat("some text ", 10000))
	err := os.WriteFile(filepath.Join(dir, "file"), text, 0o600)
	if err == nil {
		if cerr := d.Close(within(t, 50*time.Millisecond)); !errors.Is(cerr, transport.ErrBusy) {
			t.Errorf("close of a mounted device: %v", cerr)
		}
		err = os.WriteFile(filepath.Join(dir, "file2"), text, 0o600)
	}
	if uerr := unix.Unmount(dir, 0); uerr != nil {
		t.Fatal(uerr)
	}
	if err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("e2fsck", "-fn", d.Path()).CombinedOutput(); err != nil {
		t.Errorf("e2fsck: %v: %s", err, out)
	}
}

// TestAbortHung aborts a device whose backend does not return.
func TestAbortHung(t *testing.T) {
	noLeftovers(t, "hung")
	m := newMemBackend(1 << 20)
	d := create(t, New(nil), "hung", m, transport.Options{})
	f := openGuest(t, d.Path(), os.O_RDWR)
	hang := make(chan struct{})
	m.hang.Store(hang)
	var wg sync.WaitGroup
	for range 2 * maxReaders {
		buf := aligned(t, blockSize)
		wg.Go(func() {
			if _, err := f.ReadAt(buf, 0); !errors.Is(err, unix.EIO) {
				t.Errorf("guest of a hung backend gets %v", err)
			}
		})
	}
	eventually(t, "all readers hang", func() bool { return d.srv.inBackend.Load() == maxReaders })
	begin := time.Now()
	if err := d.Abort(); err != nil {
		t.Error(err)
	}
	t.Logf("abort took %v", time.Since(begin))
	if took := time.Since(begin); took > 2*abortEnd {
		t.Errorf("abort took %v", took)
	}
	wg.Wait()
	if _, err := f.WriteAt(aligned(t, blockSize), 0); err == nil {
		t.Error("write to an aborted device succeeds")
	}
	f.Close()
	if stale, err := staleLoops("hung"); err != nil || len(stale) > 0 {
		t.Errorf("the last user has closed, yet there is %v, %v", stale, err)
	}
	closeDevice(t, d) // no error after Abort
	// The same volume can be served again though readers are still stuck.
	again := create(t, d.t, "hung", newMemBackend(1<<20), transport.Options{})
	closeDevice(t, again)
	close(hang)
}

func TestAbortIsNoFailure(t *testing.T) {
	noLeftovers(t, "aborted")
	d := create(t, New(nil), "aborted", newMemBackend(1<<20), transport.Options{})
	if err := d.Abort(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the end is noticed", func() bool {
		d.mu.Lock()
		defer d.mu.Unlock()
		return d.dead
	})
	select {
	case <-d.Failed():
		t.Error("an abort of ours counts as a failure")
	default:
	}
	if err := d.Abort(); err != nil {
		t.Errorf("second abort: %v", err)
	}
}

// TestCloseHung: Close of a device whose backend does not return ends with its
// context, and Abort finishes it.
func TestCloseHung(t *testing.T) {
	noLeftovers(t, "closehung")
	m := newMemBackend(1 << 20)
	d := create(t, New(nil), "closehung", m, transport.Options{})
	hang := make(chan struct{})
	m.hang.Store(hang)
	defer close(hang)
	// The device is detached, but the last flush does not return.
	if err := d.Close(within(t, 100*time.Millisecond)); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("close: %v", err)
	}
	if err := d.Abort(); err != nil {
		t.Error(err)
	}
	closeDevice(t, d)
}

func TestCloseReportsFailedFlush(t *testing.T) {
	noLeftovers(t, "lastflush")
	m := newMemBackend(1 << 20)
	d, err := New(nil).Create(within(t, patience), "lastflush", m, transport.Options{})
	if err != nil {
		t.Fatal(err)
	}
	m.failWith(unix.ENOSPC)
	if err := d.Close(within(t, patience)); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("close: %v", err)
	}
}

// TestFailed ends devices behind our back.
func TestFailed(t *testing.T) {
	noLeftovers(t, "failed")
	for name, kill := range map[string]func(*device) error{
		"fusectl abort": func(d *device) error { return abortConn(d.conn.id) },
		"losetup -d": func(d *device) error {
			return exec.Command("losetup", "-d", d.Path()).Run()
		},
	} {
		t.Run(name, func(t *testing.T) {
			d := create(t, New(nil), "failed", newMemBackend(1<<20), transport.Options{})
			if err := kill(d); err != nil {
				t.Fatal(err)
			}
			select {
			case <-d.Failed():
			case <-time.After(patience):
				t.Error("not noticed")
			}
			closeDevice(t, d)
		})
	}
}

func TestCreateRefuses(t *testing.T) {
	noLeftovers(t, "a")
	tr := New(nil)
	create(t, tr, "a", newMemBackend(1<<20), transport.Options{})
	over, cancel := context.WithCancel(context.Background())
	cancel()
	for _, tt := range []struct {
		name, volume string
		size         int64
		ctx          context.Context
		want         string
	}{
		{"no size", "b", 0, t.Context(), "not a multiple"},
		{"half a block", "b", 4096 + 512, t.Context(), "not a multiple"},
		{"no id", "", 4096, t.Context(), "empty volume id"},
		{"twice", "a", 4096, t.Context(), "already"},
	} {
		if _, err := tr.Create(tt.ctx, tt.volume, newMemBackend(tt.size), transport.Options{}); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v", tt.name, err)
		}
	}
	// With an ended context it works or not, but leaves nothing.
	if d, err := tr.Create(over, "b", newMemBackend(4096), transport.Options{}); err == nil {
		closeDevice(t, d)
	}
	create(t, tr, "b", newMemBackend(4096), transport.Options{})
	if _, err := tr.Adopt(t.Context(), "c", newMemBackend(4096)); !errors.Is(err, transport.ErrNotFound) {
		t.Errorf("adopt without a keeper: %v", err)
	}
}

// TestIdleVolumesAreCheap looks at the locked memory of many idle devices.
func TestIdleVolumesAreCheap(t *testing.T) {
	const n = 20
	var volumes []string
	for i := range n {
		volumes = append(volumes, fmt.Sprint("idle-", i))
	}
	noLeftovers(t, volumes...)
	tr := New(nil)
	before := statusKiB(t, "VmRSS")
	for _, v := range volumes {
		create(t, tr, v, newMemBackend(4096), transport.Options{})
	}
	busy := statusKiB(t, "VmRSS")
	eventually(t, "idle readers give their memory back", func() bool { return statusKiB(t, "VmRSS") < before+n*100 })
	eventually(t, "readers that are not needed end", func() bool { return countReaders() == n*minReaders })
	t.Logf("resident memory: %d KiB, with %d new volumes %d, idle %d", before, n, busy, statusKiB(t, "VmRSS"))
}

// TestReadersGrow checks that a busy volume gets more readers, and loses them.
func TestReadersGrow(t *testing.T) {
	noLeftovers(t, "grow")
	m := newMemBackend(1 << 20)
	d := create(t, New(nil), "grow", m, transport.Options{})
	f := openGuest(t, d.Path(), os.O_RDONLY)
	defer f.Close()
	hang := make(chan struct{})
	m.hang.Store(hang)
	var wg sync.WaitGroup
	for i := range int64(maxReaders) {
		buf := aligned(t, blockSize)
		wg.Go(func() {
			if _, err := f.ReadAt(buf, i*blockSize); err != nil {
				t.Error(err)
			}
		})
	}
	eventually(t, "all requests in service", func() bool { return d.srv.inBackend.Load() == maxReaders })
	close(hang)
	wg.Wait()
	eventually(t, "readers that are not needed end", func() bool { return countReaders() == minReaders })
	if _, err := f.ReadAt(aligned(t, blockSize), 0); err != nil {
		t.Error(err)
	}
}

// countReaders counts the readers of this process.
func countReaders() int {
	buf := make([]byte, 1<<20)
	return strings.Count(string(buf[:runtime.Stack(buf, true)]), "fuseloop.(*readerSet).serve(")
}

func statusKiB(t *testing.T, key string) (kib int) {
	t.Helper()
	b, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(line, key+":"); ok {
			fmt.Sscan(v, &kib)
		}
	}
	return kib
}

func TestProbe(t *testing.T) {
	noLeftovers(t)
	tr := New(nil)
	if err := tr.Probe(); err != nil {
		t.Fatal(err)
	}
	if err := tr.SurvivesRestart(); err == nil {
		t.Error("survives a restart without a keeper")
	}
	n, err := tr.MaxVolumes()
	if err != nil || n < 1 {
		t.Errorf("at most %d volumes, %v", n, err)
	}
	t.Logf("at most %d volumes", n)
}
