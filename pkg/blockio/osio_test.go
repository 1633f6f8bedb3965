package blockio

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"path/filepath"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// TestAgainstMemory runs random operations on all kinds of targets and on a
// slice.
func TestAgainstMemory(t *testing.T) {
	const size = 256 << 10
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	targets(t, size, func(t *testing.T, f *osFile) {
		rng := rand.New(rand.NewPCG(seed, 0))
		want := make([]byte, size)
		for i := range 400 {
			off := rng.IntN(len(want))
			n := rng.IntN(min(len(want)-off, 20000) + 1)
			if rng.IntN(2) == 0 { // make both ends aligned often
				unit := 512 << rng.IntN(4)
				off, n = off/unit*unit, n/unit*unit
			}
			mem := make([]byte, n+8)[rng.IntN(8):]
			buf := mem[:n]
			switch op := rng.IntN(10); {
			case op < 4:
				for k := range buf {
					buf[k] = byte(rng.Uint32())
				}
				got, err := f.WriteAt(buf, int64(off))
				if got != n || err != nil {
					t.Fatalf("step %d: write %d+%d: %d, %v", i, off, n, got, err)
				}
				copy(want[off:], buf)
			case op < 8:
				got, err := f.ReadAt(buf, int64(off))
				if got != n || err != nil {
					t.Fatalf("step %d: read %d+%d: %d, %v", i, off, n, got, err)
				}
				if !bytes.Equal(buf, want[off:off+n]) {
					t.Fatalf("step %d: read %d+%d: wrong data", i, off, n)
				}
			case op == 8:
				off, n := off&^511, n&^511
				if err := f.Zero(int64(off), int64(n)); err != nil {
					t.Fatalf("step %d: zero %d+%d: %v", i, off, n, err)
				}
				clear(want[off : off+n])
			case f.block:
				ok(t, f.Flush())
			default: // change the length
				n := rng.IntN(size) + 1
				ok(t, f.Truncate(int64(n)))
				if n < len(want) {
					clear(want[n:])
				}
				want = want[:n]
				end := rng.IntN(size/512) * 512
				if rng.IntN(2) == 0 && end > n {
					from := n &^ 511
					ok(t, f.Zero(int64(from), int64(end-from)))
					want = want[:end]
					clear(want[from:])
				} else if end > n {
					// A write that starts in the last block or beyond the end.
					from := min(n+rng.IntN(9000), size-1)
					_, err := f.WriteAt([]byte{7}, int64(from))
					ok(t, err)
					want = want[:from+1]
					want[from] = 7
				}
			}
			if got := f.Size(); got != int64(len(want)) {
				t.Fatalf("step %d: size %d, want %d", i, got, len(want))
			}
		}
		ok(t, f.Flush())
		got := make([]byte, len(want)+100)
		if n, err := f.ReadAt(got, 0); n != len(want) || err != io.EOF {
			t.Fatalf("read past the end: %d, %v", n, err)
		}
		if !bytes.Equal(got[:len(want)], want) {
			t.Fatal("wrong data at the end")
		}
		// A second look past all caches of this handle.
		again := open(t, f.name, ReadOnly|Direct)
		if _, err := again.ReadAt(got[:len(want)], 0); err != nil || !bytes.Equal(got[:len(want)], want) {
			t.Fatalf("wrong data through another handle: %v", err)
		}
	})
}

func TestEnds(t *testing.T) {
	const size = 64 << 10
	targets(t, size, func(t *testing.T, f *osFile) {
		arena, err := NewArena(8192)
		ok(t, err)
		defer arena.Close()
		for _, buf := range [][]byte{arena.Bytes(), arena.Bytes()[:4096], arena.Bytes()[1:778], make([]byte, 512)} {
			for _, off := range []int64{size - 4096, size - 512, size - 1, size, size + 1, size + 8192} {
				want := int(max(min(size-off, int64(len(buf))), 0))
				n, err := f.ReadAt(buf, off)
				if n != want || (n < len(buf)) != (err == io.EOF) || err != nil && err != io.EOF {
					t.Errorf("read %d at %d: %d, %v, want %d", len(buf), off, n, err, want)
				}
			}
		}
		if n, err := f.ReadAt(nil, size+1); n != 0 || err != nil {
			t.Errorf("read nothing: %d, %v", n, err)
		}
		for _, err := range []error{second(f.ReadAt(make([]byte, 1), -1)), second(f.WriteAt(make([]byte, 1), -1)),
			f.Zero(-512, 512), f.Zero(1, 512), f.Zero(512, 1), f.Allocate(-1, 5), f.Allocate(0, 0), f.Truncate(-1)} {
			if !errors.Is(err, syscall.EINVAL) || !errors.As(err, new(*fs.PathError)) {
				t.Errorf("bad argument: %v", err)
			}
		}
		if !f.block {
			return
		}
		for _, err := range []error{second(f.WriteAt(make([]byte, 4096), size)), second(f.WriteAt(make([]byte, 4097), size-512)),
			f.Zero(size-512, 1024), f.Zero(size, 512), f.Allocate(size-1, 2)} {
			if !errors.Is(err, syscall.ENOSPC) {
				t.Errorf("beyond the end of a device: %v", err)
			}
		}
		ok(t, f.Allocate(size-1, 1))
		if err := f.Truncate(100); !errors.Is(err, syscall.EINVAL) {
			t.Errorf("truncate a device: %v", err)
		}
		if start, end, err := f.NextData(5); start != 5 || end != size || err != nil {
			t.Errorf("next data of a device: %d, %d, %v", start, end, err)
		}
		if _, err := f.Xattr("user.x"); !errors.Is(err, errors.ErrUnsupported) {
			t.Errorf("attribute of a device: %v", err)
		}
		if err := f.SetXattr("user.x", nil); !errors.Is(err, errors.ErrUnsupported) {
			t.Errorf("set attribute of a device: %v", err)
		}
	})
}

// TestPartialBlocks has goroutines write to neighbouring parts of the same
// blocks; a read-modify-write that doesn't exclude the others loses some.
func TestPartialBlocks(t *testing.T) {
	const size = 32 << 10
	targets(t, size, func(t *testing.T, f *osFile) {
		const writers = 8
		want := make([]byte, size)
		for i := range want {
			want[i] = byte('a' + i/700%writers)
		}
		for range 10 {
			ok(t, f.Zero(0, size))
			var wg sync.WaitGroup
			for w := range writers {
				wg.Go(func() {
					for off := w * 700; off < size; off += writers * 700 {
						if _, err := f.WriteAt(want[off:min(off+700, size)], int64(off)); err != nil {
							t.Error(err)
						}
					}
				})
			}
			wg.Wait()
			got := make([]byte, size)
			if _, err := f.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
				t.Fatalf("lost writes: %v", err)
			}
		}
	})
}

// TestAlignedBesidePartial is the same with one writer of whole sectors.
func TestAlignedBesidePartial(t *testing.T) {
	targets(t, 4096, func(t *testing.T, f *osFile) {
		arena, err := NewArena(4096)
		ok(t, err)
		defer arena.Close()
		whole := arena.Bytes()[:f.align]
		if f.align == 1 {
			whole = arena.Bytes()[:512]
		}
		var wg sync.WaitGroup
		stop := make(chan struct{})
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
					ok(t, second(f.WriteAt([]byte{'p'}, 5)))
				}
			}
		})
		for i := range 300 {
			for k := range whole {
				whole[k] = byte(i)
			}
			ok(t, second(f.WriteAt(whole, 0)))
			got := make([]byte, len(whole))
			ok(t, second(f.ReadAt(got, 0)))
			got[5] = byte(i) // the other writer's
			if !bytes.Equal(got, whole) {
				t.Errorf("round %d: an old block came back", i)
				break
			}
		}
		close(stop)
		wg.Wait()
	})
}

// TestZeroBesidePartial does the same with zeroing and allocating.
func TestZeroBesidePartial(t *testing.T) {
	f := open(t, filepath.Join(t.TempDir(), "f"), Create|Direct)
	if f.align == 1 {
		t.Skip("no direct I/O on the file system of the temporary directory")
	}
	f.align = BlockSize
	ok(t, second(f.WriteAt(make([]byte, 1000), 0)))
	var wg sync.WaitGroup
	stop := make(chan struct{})
	wg.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
				ok(t, second(f.WriteAt([]byte{'p'}, 700)))
			}
		}
	})
	defer wg.Wait()
	defer close(stop)
	got := make([]byte, 512)
	for i := range 300 {
		ok(t, second(f.WriteAt(bytes.Repeat([]byte{'x'}, 512), 0)))
		ok(t, f.Zero(0, 512))
		ok(t, second(f.WriteAt([]byte{'q'}, 701))) // comes after any that was under way
		ok(t, second(f.ReadAt(got, 0)))
		if !bytes.Equal(got, make([]byte, 512)) {
			t.Fatalf("round %d: zeroed data came back", i)
		}
		ok(t, f.Allocate(0, 1<<20))
		if n := f.Size(); n != 1<<20 {
			t.Fatalf("round %d: size %d after allocating", i, n)
		}
		ok(t, f.Truncate(1000))
	}
}

func TestFullDisk(t *testing.T) {
	for _, kind := range []string{"tmpfs", "ext4"} {
		for _, flag := range []Flag{0, Direct} {
			t.Run(fmt.Sprintf("%s flag %d", kind, flag), func(t *testing.T) {
				dir := smallFS(t, kind, 16<<20)
				kept := open(t, filepath.Join(dir, "kept"), Create|flag)
				ok(t, kept.Allocate(0, 2<<20))
				if kept.Size() != 2<<20 {
					t.Errorf("size %d after allocating", kept.Size())
				}
				f := open(t, filepath.Join(dir, "f"), Create|flag)
				if err := f.Allocate(0, 1<<30); !errors.Is(err, syscall.ENOSPC) {
					t.Errorf("allocate too much: %v", err)
				}
				ok(t, f.Truncate(0))
				ok(t, second(f.WriteAt([]byte("end"), 997)))
				if err := Extend(f, 4096, 1<<30); !errors.Is(err, syscall.ENOSPC) || f.Size() != 1000 {
					t.Errorf("extend too much: %v, and there are %d bytes", err, f.Size())
				}
				ok(t, Extend(f, 4096, 4<<20)) // there still is room
				ok(t, f.Truncate(0))
				n, err := f.WriteAt(make([]byte, 32<<20), 0)
				if !errors.Is(err, syscall.ENOSPC) || n > 16<<20 {
					t.Errorf("fill the disk: %d, %v", n, err)
				}
				ok(t, second(kept.WriteAt(bytes.Repeat([]byte{7}, 2<<20), 0)))
				ok(t, kept.Flush())
				_ = f.Close()
			})
		}
	}
}

// TestDirectDropsCache writes through the page cache and reads past it.
func TestDirectDropsCache(t *testing.T) {
	name := filepath.Join(t.TempDir(), "f")
	buffered := open(t, name, Create)
	data := bytes.Repeat([]byte("cached"), 4096)
	ok(t, second(buffered.WriteAt(data, 0)))
	direct := open(t, name, Direct)
	var fs unix.Statfs_t
	ok(t, unix.Fstatfs(direct.fd, &fs))
	if direct.align == 1 || fs.Type == unix.TMPFS_MAGIC {
		t.Skip("no direct I/O past the page cache on the file system of the temporary directory")
	}
	mem, err := unix.Mmap(direct.fd, 0, len(data), unix.PROT_READ, unix.MAP_SHARED)
	ok(t, err)
	defer unix.Munmap(mem)
	resident := make([]byte, (len(data)+4095)/4096)
	ok(t, mincore(mem, resident))
	if n := bytes.Count(resident, []byte{1}); n > 0 {
		t.Errorf("%d pages are still in the cache", n)
	}
	got := make([]byte, len(data))
	if _, err := direct.ReadAt(got, 0); err != nil || !bytes.Equal(got, data) {
		t.Errorf("direct read: %v", err)
	}
}

// TestNoDirect asks for direct I/O where there is none.
func TestNoDirect(t *testing.T) {
	dir := t.TempDir()
	needRoot(t, "losetup", "mkfs.ext4")
	dev := loopDevice(t, 16<<20, 512)
	command(t, "mkfs.ext4", "-q", dev)
	ok(t, unix.Mount(dev, dir, "ext4", 0, "data=journal"))
	defer func() { ok(t, unix.Unmount(dir, 0)) }()
	f := open(t, filepath.Join(dir, "f"), Create|Direct)
	if f.align != 1 {
		t.Errorf("alignment %d with journalled data", f.align)
	}
	ok(t, second(f.WriteAt([]byte("hello"), 3)))
	got := make([]byte, 5)
	if _, err := f.ReadAt(got, 3); err != nil || string(got) != "hello" {
		t.Errorf("%q, %v", got, err)
	}
	ok(t, f.Flush())
	ok(t, f.Close())
}

func mincore(mem, resident []byte) error {
	_, _, errno := unix.Syscall(unix.SYS_MINCORE, address(mem), uintptr(len(mem)), address(resident))
	if errno != 0 {
		return errno
	}
	return nil
}
