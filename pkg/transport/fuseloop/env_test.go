package fuseloop

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"runtime/pprof"
	"strings"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/snapmerge/snapmerge/pkg/transport"
	"github.com/snapmerge/snapmerge/test/machine"
)

// patience is how long a test waits for what must come, and slack what a slow
// machine may add to what has a bound of its own.
const (
	patience = 3 * time.Minute
	slack    = 30 * time.Second
)

// BLKDISCARD and BLKZEROOUT of linux/fs.h.
const (
	ioctlDiscard = 0x1277
	ioctlZeroOut = 0x127f
)

func needRoot(t testing.TB) {
	t.Helper()
	machine.NeedDevices(t, machine.FUSE, machine.Loop)
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
			// Others who look at new devices, as udev does, may have one open yet.
			stale, err := staleLoops(v)
			for end := time.Now().Add(slack); err == nil && len(stale) > 0 && time.Now().Before(end); time.Sleep(time.Millisecond) {
				stale, err = staleLoops(v)
			}
			if err != nil || len(stale) > 0 {
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
		after := openFiles(t)
		for end := time.Now().Add(slack); len(after) > before && time.Now().Before(end); time.Sleep(time.Millisecond) {
			after = openFiles(t) // of connections that are being closed
		}
		if len(after) > before {
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

// closeBusy closes a device in use, which must be refused, and in time: it may
// take a slow machine more than one try to find that out.
func closeBusy(t testing.TB, d transport.Device) {
	t.Helper()
	for end := time.Now().Add(patience); ; {
		err := d.Close(within(t, 50*time.Millisecond))
		if errors.Is(err, transport.ErrBusy) {
			return
		}
		if !errors.Is(err, context.DeadlineExceeded) || time.Now().After(end) {
			t.Errorf("close of a device in use: %v", err)
			return
		}
	}
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

func mkfsExt4(t testing.TB, dev string) {
	t.Helper()
	machine.NeedFS(t, "ext4")
	if out, err := exec.Command("mkfs.ext4", "-q", dev).CombinedOutput(); err != nil {
		t.Fatalf("mkfs.ext4: %v: %s", err, out)
	}
}
