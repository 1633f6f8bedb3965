package blockio

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

func ok(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func second[T any](_ T, err error) error { return err }

// needRoot skips without root, or without the tools.
func needRoot(t testing.TB, tools ...string) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root for loop devices and mounts")
	}
	for _, tool := range tools {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("needs %s: %v", tool, err)
		}
	}
}

func command(t testing.TB, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(string(out))
}

// loopDevice makes a block device of the size with the logical block size.
func loopDevice(t testing.TB, size int64, sector int) string {
	t.Helper()
	needRoot(t, "losetup")
	img := filepath.Join(t.TempDir(), "disk.img")
	ok(t, os.WriteFile(img, nil, 0o600))
	ok(t, os.Truncate(img, size))
	dev := command(t, "losetup", "--find", "--show", "--sector-size", fmt.Sprint(sector), img)
	t.Cleanup(func() { command(t, "losetup", "--detach", dev) })
	return dev
}

// smallFS mounts a new file system of the size.
func smallFS(t testing.TB, kind string, size int64) string {
	t.Helper()
	dir := t.TempDir()
	if kind == "tmpfs" {
		needRoot(t)
		ok(t, unix.Mount("tmpfs", dir, "tmpfs", 0, fmt.Sprintf("size=%d", size)))
	} else {
		needRoot(t, "losetup", "mkfs."+kind)
		dev := loopDevice(t, size, 512)
		command(t, "mkfs."+kind, "-q", dev)
		ok(t, unix.Mount(dev, dir, kind, 0, ""))
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Errorf("unmount %s: %v", dir, err)
		}
	})
	return dir
}

func open(t testing.TB, name string, flag Flag) *osFile {
	t.Helper()
	f, err := openFile(name, flag)
	ok(t, err)
	t.Cleanup(func() { _ = f.Close() })
	return f
}

// targets are all kinds of things to do I/O on. Each is size bytes of zeros.
func targets(t *testing.T, size int64, test func(t *testing.T, f *osFile)) {
	file := func(t *testing.T, flag Flag) *osFile {
		f := open(t, filepath.Join(t.TempDir(), "f"), Create|flag)
		ok(t, f.Truncate(size))
		return f
	}
	t.Run("buffered file", func(t *testing.T) { test(t, file(t, 0)) })
	t.Run("direct file", func(t *testing.T) {
		f := file(t, Direct)
		if f.align == 1 {
			t.Skip("no direct I/O on the file system of the temporary directory")
		}
		test(t, f)
	})
	// The same with coarser units, which no disk at hand may have.
	t.Run("direct file by 4096", func(t *testing.T) {
		f := file(t, Direct)
		if f.align == 1 {
			t.Skip("no direct I/O on the file system of the temporary directory")
		}
		f.align = 4096
		test(t, f)
	})
	t.Run("buffered device", func(t *testing.T) { test(t, open(t, loopDevice(t, size, 512), 0)) })
	for _, sector := range []int{512, 4096} {
		t.Run(fmt.Sprintf("direct device by %d", sector), func(t *testing.T) {
			f := open(t, loopDevice(t, size, sector), Direct)
			if fd, align := f.Raw(); fd != f.fd || align != sector {
				t.Errorf("descriptor %d, alignment %d", fd, align)
			}
			test(t, f)
		})
	}
}

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

func TestNextData(t *testing.T) {
	f := open(t, filepath.Join(t.TempDir(), "f"), Create)
	const mib = 1 << 20
	ok(t, f.Truncate(8*mib))
	for _, at := range []int64{2 * mib, 4 * mib} {
		ok(t, second(f.WriteAt(bytes.Repeat([]byte{1}, mib), at)))
	}
	for _, want := range [][3]int64{{0, 2 * mib, 3 * mib}, {2*mib + 9, 2*mib + 9, 3 * mib}, {3 * mib, 4 * mib, 5 * mib}} {
		start, end, err := f.NextData(want[0])
		if err != nil || start != want[1] || end != want[2] {
			t.Errorf("from %d: [%d, %d), %v", want[0], start, end, err)
		}
	}
	for _, off := range []int64{5 * mib, 8 * mib, 9 * mib} {
		if _, _, err := f.NextData(off); err != io.EOF {
			t.Errorf("from %d: %v", off, err)
		}
	}
	before := blocks(t, f)
	ok(t, f.Zero(2*mib, mib))
	if after := blocks(t, f); before-after < mib/512 {
		t.Errorf("%d sectors before, %d after: the space was not given back", before, after)
	}
	if start, _, err := f.NextData(0); start != 4*mib || err != nil {
		t.Errorf("after zeroing: %d, %v", start, err)
	}
}

// blocks is the space that a file takes, in sectors.
func blocks(t *testing.T, f *osFile) int64 {
	t.Helper()
	ok(t, f.Flush())
	var st unix.Stat_t
	ok(t, unix.Fstat(f.fd, &st))
	return st.Blocks
}

func TestXattr(t *testing.T) {
	f := open(t, filepath.Join(t.TempDir(), "f"), Create)
	if err := f.SetXattr("user.snapmerge.test", []byte("x")); errors.Is(err, errors.ErrUnsupported) {
		t.Skip("no attributes on the file system of the temporary directory")
	}
	for _, value := range []string{"", "short", strings.Repeat("long", 700)} {
		ok(t, f.SetXattr("user.snapmerge.test", []byte(value)))
		got, err := f.Xattr("user.snapmerge.test")
		if err != nil || string(got) != value {
			t.Errorf("%d bytes: got %d, %v", len(value), len(got), err)
		}
		ok(t, f.Flush())
	}
	ok(t, f.RemoveXattr("user.snapmerge.test"))
	ok(t, f.RemoveXattr("user.snapmerge.test"))
	if _, err := f.Xattr("user.snapmerge.test"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("removed: %v", err)
	}
	if f.meta.Load() == f.metaSynced.Load() {
		t.Error("the removal is taken for durable")
	}
	ok(t, f.Flush())
	if f.meta.Load() != f.metaSynced.Load() {
		t.Error("the flush did not count")
	}
}

func TestLock(t *testing.T) {
	name := filepath.Join(t.TempDir(), "f")
	a, b := open(t, name, Create), open(t, name, 0)
	ok(t, a.Lock())
	ok(t, a.Lock())
	if err := b.Lock(); !errors.Is(err, ErrLocked) {
		t.Errorf("second handle: %v", err)
	}
	ok(t, a.Close())
	ok(t, b.Lock())
}

func TestFailedFlushSticks(t *testing.T) {
	f := open(t, filepath.Join(t.TempDir(), "f"), Create)
	broken := f.fail("flush", syscall.EIO)
	f.failed.Store(&broken)
	if err := f.Flush(); !errors.Is(err, syscall.EIO) {
		t.Errorf("flush after a failed one: %v", err)
	}
	// A real failure: the descriptor of a pipe cannot be synced.
	g := open(t, filepath.Join(t.TempDir(), "g"), Create)
	var pipe [2]int
	ok(t, unix.Pipe2(pipe[:], unix.O_CLOEXEC))
	defer unix.Close(pipe[0])
	ok(t, unix.Dup2(pipe[1], g.fd))
	unix.Close(pipe[1])
	for range 2 {
		if err := g.Flush(); !errors.Is(err, syscall.EINVAL) {
			t.Errorf("flush of a pipe: %v", err)
		}
	}
	if g.failed.Load() == nil {
		t.Error("the failure was forgotten")
	}
}

func TestClosed(t *testing.T) {
	f := open(t, filepath.Join(t.TempDir(), "f"), Create)
	ok(t, f.Close())
	for name, err := range map[string]error{
		"read": second(f.ReadAt(make([]byte, 1), 0)), "write": second(f.WriteAt(make([]byte, 1), 0)),
		"flush": f.Flush(), "zero": f.Zero(0, 512), "truncate": f.Truncate(0), "allocate": f.Allocate(0, 1),
		"lock": f.Lock(), "links": second(f.Links()), "xattr": second(f.Xattr("user.x")),
		"set xattr": f.SetXattr("user.x", nil), "remove xattr": f.RemoveXattr("user.x"), "close": f.Close(),
	} {
		if !errors.Is(err, fs.ErrClosed) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, _, err := f.NextData(0); !errors.Is(err, fs.ErrClosed) {
		t.Error(err)
	}
	if f.Size() != 0 {
		t.Error("size of a closed file")
	}
}

func TestOpenErrors(t *testing.T) {
	dir := t.TempDir()
	fifo := filepath.Join(dir, "fifo")
	ok(t, unix.Mkfifo(fifo, 0o600))
	ok(t, os.WriteFile(filepath.Join(dir, "f"), []byte("x"), 0o600))
	for _, test := range []struct {
		name string
		flag Flag
		want error // nil: any
	}{
		{filepath.Join(dir, "none"), 0, fs.ErrNotExist},
		{filepath.Join(dir, "none", "f"), Create, fs.ErrNotExist},
		{filepath.Join(dir, "f"), Create | Excl, fs.ErrExist},
		{dir, 0, syscall.EISDIR},
		{dir, ReadOnly, nil},
		{fifo, ReadOnly, nil},
		{"/dev/null", 0, nil},
	} {
		_, err := OS().Open(test.name, test.flag)
		if err == nil || test.want != nil && !errors.Is(err, test.want) || !strings.Contains(err.Error(), test.name) {
			t.Errorf("%s: %v", test.name, err)
		}
	}
	ro := open(t, filepath.Join(dir, "f"), ReadOnly)
	if fl, err := unix.FcntlInt(uintptr(ro.fd), unix.F_GETFL, 0); err != nil || fl&unix.O_NONBLOCK != 0 {
		t.Errorf("flags %#x, %v: io_uring would answer EAGAIN", fl, err)
	}
	if _, err := ro.WriteAt([]byte("y"), 0); !errors.Is(err, syscall.EBADF) {
		t.Errorf("write to a read-only file: %v", err)
	}
}

func TestNames(t *testing.T) {
	fsys := OS()
	dir := filepath.Join(t.TempDir(), "d")
	ok(t, fsys.Mkdir(dir))
	f, err := fsys.Open(filepath.Join(dir, "b"), Create)
	ok(t, err)
	defer f.Close()
	ok(t, second(f.WriteAt([]byte("hello"), 0)))
	ok(t, fsys.Link(filepath.Join(dir, "b"), filepath.Join(dir, "a")))
	if n, err := f.Links(); n != 2 || err != nil {
		t.Errorf("%d links, %v", n, err)
	}
	ok(t, fsys.Rename(filepath.Join(dir, "b"), filepath.Join(dir, "c")))
	ok(t, fsys.SyncDir(dir))
	if names, err := fsys.ReadDir(dir); fmt.Sprint(names) != "[a c]" || err != nil {
		t.Errorf("%v, %v", names, err)
	}
	if data, err := fsys.ReadFile(filepath.Join(dir, "a")); string(data) != "hello" || err != nil {
		t.Errorf("%q, %v", data, err)
	}
	for name, want := range map[string]bool{"a": true, "b": false, "c": true} {
		if got, err := fsys.Exists(filepath.Join(dir, name)); got != want || err != nil {
			t.Errorf("%s exists: %v, %v", name, got, err)
		}
	}
	if err := fsys.Remove(dir); !errors.Is(err, syscall.ENOTEMPTY) {
		t.Errorf("remove a full directory: %v", err)
	}
	if _, err := fsys.Exists(filepath.Join(dir, "a", "b")); !errors.Is(err, syscall.ENOTDIR) {
		t.Errorf("exists below a file: %v", err)
	}
	if err := fsys.SyncDir(filepath.Join(dir, "a")); !errors.Is(err, syscall.ENOTDIR) {
		t.Errorf("sync a file as a directory: %v", err)
	}
	ok(t, fsys.Remove(filepath.Join(dir, "a")))
	ok(t, fsys.RemoveAll(dir))
	ok(t, fsys.RemoveAll(dir))
	if _, err := fsys.ReadDir(dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("list an absent directory: %v", err)
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

func TestArena(t *testing.T) {
	a, err := NewArena(10000)
	ok(t, err)
	if b := a.Bytes(); len(b) != 10000 || cap(b) != 10000 || address(b)%4096 != 0 || b[9999] != 0 {
		t.Errorf("%d bytes of %d at %#x", len(b), cap(b), address(b))
	}
	ok(t, a.Close())
	ok(t, a.Close())
	for _, size := range []int{0, -1, 1 << 62} {
		if a, err := NewArena(size); err == nil {
			t.Errorf("%d bytes: %v", size, a)
		}
	}
}

func mincore(mem, resident []byte) error {
	_, _, errno := unix.Syscall(unix.SYS_MINCORE, address(mem), uintptr(len(mem)), address(resident))
	if errno != 0 {
		return errno
	}
	return nil
}
