package devicetest

import (
	"bytes"
	"math/rand/v2"
	"os"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// BLKDISCARD and BLKZEROOUT of linux/fs.h, for RangeIoctl.
const (
	Discard = 0x1277
	ZeroOut = 0x127f
)

// RangeIoctl is BLKDISCARD or BLKZEROOUT of n bytes.
func RangeIoctl(f *os.File, request uintptr, off, n int64) error {
	r := [2]uint64{uint64(off), uint64(n)}
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), request, uintptr(unsafe.Pointer(&r)))
	if errno != 0 {
		return errno
	}
	return nil
}

// Open opens a device for direct I/O, until the end of the test.
func Open(t testing.TB, path string, flags int) *os.File {
	t.Helper()
	f, err := os.OpenFile(path, flags|unix.O_DIRECT, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// Aligned is memory for direct I/O, until the end of the test.
func Aligned(t testing.TB, n int) []byte {
	t.Helper()
	b, err := unix.Mmap(-1, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Munmap(b) })
	return b
}

// RandomIO reads, writes, discards (if the device can), zeroes and flushes, and
// compares everything with a model; m is what the device serves and begins as
// zeros.
func RandomIO(t testing.TB, f *os.File, m *Memory, buf []byte, rng *rand.Rand, steps int, discards bool) {
	size := m.Size()
	blocks := int(size / BlockSize)
	model := make([]byte, size)
	for i := range steps {
		n := 1 + rng.IntN(len(buf)/BlockSize)
		if rng.IntN(2) == 0 {
			n = 1 + rng.IntN(4)
		}
		off := int64(rng.IntN(blocks-n+1)) * BlockSize
		p, want := buf[:n*BlockSize], model[off:off+int64(n)*BlockSize]
		var err error
		switch rng.IntN(6) {
		case 0, 1:
			for j := 0; j < len(p); j += 8 {
				p[j], p[j+1], p[j+7] = byte(rng.Uint32()), byte(i), byte(j>>9)
			}
			copy(want, p)
			_, err = f.WriteAt(p, off)
		case 2:
			clear(want)
			request := uintptr(ZeroOut)
			if discards {
				request = Discard
			}
			err = RangeIoctl(f, request, off, int64(len(p)))
		case 3:
			clear(want)
			err = RangeIoctl(f, ZeroOut, off, int64(len(p)))
		case 4:
			flushes := m.Flushes.Load()
			if err = f.Sync(); err == nil && m.Flushes.Load() == flushes {
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
	if !bytes.Equal(m.Content(), model) {
		t.Error("the backend has not what was written")
	}
	if discards && m.Zeros.Load() == 0 {
		t.Error("discards did not reach the backend")
	}
}
