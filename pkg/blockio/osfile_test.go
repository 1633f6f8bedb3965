package blockio

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

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
	for _, value := range []string{"", "short", strings.Repeat("long", 200)} {
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

// TestDeviceInUse makes sure that nobody writes below a mounted file system, and
// no two owners to one device.
func TestDeviceInUse(t *testing.T) {
	dev := loopDevice(t, 16<<20, 512)
	needRoot(t, "mkfs.ext4")
	command(t, "mkfs.ext4", "-q", dev)
	refused := func(why string) {
		t.Helper()
		for _, flag := range []Flag{0, Direct} {
			if f, err := openFile(dev, flag); !errors.Is(err, ErrLocked) || !errors.Is(err, syscall.EBUSY) {
				t.Errorf("%s, flag %d: %v", why, flag, err)
				if err == nil {
					f.Close()
				}
			}
		}
		f, err := openFile(dev, ReadOnly)
		if err != nil {
			t.Errorf("%s, for reading: %v", why, err)
			return
		}
		ok(t, f.Close())
	}
	dir := t.TempDir()
	ok(t, unix.Mount(dev, dir, "ext4", 0, ""))
	refused("mounted")
	ok(t, unix.Unmount(dir, 0))
	f := open(t, dev, Direct)
	refused("owned")
	ok(t, f.Close())
	open(t, dev, 0)
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
		"lock": f.Lock(), "links": second(f.Links()), "id": second(f.ID()), "xattr": second(f.Xattr("user.x")),
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
		f, err := OS().Open(test.name, test.flag)
		if f != nil {
			t.Errorf("%s: a file comes with the error: %#v", test.name, f) // callers close what is not nil
		}
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
	id, err := f.ID()
	ok(t, err)
	for name, same := range map[string]bool{"a": true, "other": false} {
		g, err := fsys.Open(filepath.Join(dir, name), Create)
		ok(t, err)
		if other, err := g.ID(); (other == id) != same || err != nil {
			t.Errorf("%s: %+v, not the same as %+v, %v", name, other, id, err)
		}
		ok(t, g.Close())
	}
	ok(t, fsys.Remove(filepath.Join(dir, "other")))
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

func TestArena(t *testing.T) {
	for _, size := range []int{10000, hugePage - 1, hugePage, 3*hugePage + 10000} {
		a, err := NewArena(size)
		ok(t, err)
		b := a.Bytes()
		if len(b) != size || cap(b) != size || address(b)%4096 != 0 || b[size-1] != 0 {
			t.Errorf("arena of %d bytes: %d of %d at %#x", size, len(b), cap(b), address(b))
		}
		if size >= hugePage && address(b)%hugePage != 0 {
			t.Errorf("arena of %d bytes at %#x cannot have huge pages", size, address(b))
		}
		b[size-1] = 1
		ok(t, a.Close())
		ok(t, a.Close())
	}
	for _, size := range []int{0, -1, 1 << 62} {
		if a, err := NewArena(size); err == nil {
			t.Errorf("%d bytes: %v", size, a)
		}
	}
}

// TestArenaClose looks for address space that closed arenas leave behind.
func TestArenaClose(t *testing.T) {
	const size, count = 16 << 20, 64
	before := addressSpace(t)
	for range count {
		a, err := NewArena(size)
		ok(t, err)
		ok(t, a.Close())
	}
	if grown := addressSpace(t) - before; grown > size*count/4 {
		t.Errorf("%d bytes of address space more after %d arenas of %d", grown, count, size)
	}
}

// addressSpace is all that the process has mapped, in bytes (proc(5), statm).
func addressSpace(t *testing.T) int {
	t.Helper()
	statm, err := os.ReadFile("/proc/self/statm")
	ok(t, err)
	var pages int
	ok(t, second(fmt.Sscan(string(statm), &pages)))
	return pages * os.Getpagesize()
}

// TestLend: what is lent cannot be closed, and a write excludes those of part of a block.
func TestLend(t *testing.T) {
	f := open(t, filepath.Join(t.TempDir(), "f"), Create|Direct)
	ok(t, f.Truncate(4*BlockSize))
	for _, write := range []bool{false, true} {
		fd, back, lent := f.Lend(BlockSize, BlockSize, write)
		if !lent || fd != f.fd {
			t.Fatalf("lent %d: %v", fd, lent)
		}
		if f.use.TryLock() {
			t.Error("it could be closed")
		}
		if free := f.content.TryLock(); free == write {
			t.Errorf("a write of part of a block may begin: %v", free)
		} else if free {
			f.content.Unlock()
		}
		back()
		if !f.content.TryLock() {
			t.Fatal("not given back")
		}
		if _, back, lent := f.Lend(0, BlockSize, write); lent == write {
			t.Errorf("lent during a write of part of a block: %v", lent)
		} else if lent {
			back()
		}
		f.content.Unlock()
	}
	if f.align == 1 {
		t.Log("no direct I/O on the file system of the temporary directory")
	} else if _, _, lent := f.Lend(int64(f.align/2), BlockSize, false); lent {
		t.Error("lent for what direct I/O cannot do")
	}
	ok(t, f.Close())
	if _, _, lent := f.Lend(0, BlockSize, false); lent {
		t.Error("lent after it was closed")
	}
}
