package crashfs

import (
	"bytes"
	"errors"
	"io"
	"io/fs"
	"math/rand/v2"
	"slices"
	"sync"
	"syscall"
	"testing"

	"github.com/snapmerge/snapmerge/pkg/blockio"
)

func open(t *testing.T, fsys *FS, name string, flag blockio.Flag) blockio.File {
	t.Helper()
	f, err := fsys.Open(name, flag)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func write(t *testing.T, f blockio.File, data string, off int64) {
	t.Helper()
	if n, err := f.WriteAt([]byte(data), off); n != len(data) || err != nil {
		t.Fatalf("write %d bytes at %d: %d, %v", len(data), off, n, err)
	}
}

func ok(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// content is a file's content, or the error in <>.
func readAll(fsys *FS, name string) string {
	data, err := fsys.ReadFile(name)
	if errors.Is(err, fs.ErrNotExist) {
		return "<absent>"
	}
	if err != nil {
		return "<" + err.Error() + ">"
	}
	return string(data)
}

func TestDurability(t *testing.T) {
	tests := []struct {
		name     string
		do       func(t *testing.T, fsys *FS)
		file     string
		nothing  string // content of file if nothing unsynced survives
		all      string // and if everything does
		killOnly bool
	}{
		{name: "unsynced create", file: "/d/f", nothing: "<absent>", all: "x", do: func(t *testing.T, fsys *FS) {
			write(t, open(t, fsys, "/d/f", blockio.Create), "x", 0)
		}},
		{name: "flushed without a durable name", file: "/d/f", nothing: "<absent>", all: "x", do: func(t *testing.T, fsys *FS) {
			f := open(t, fsys, "/d/f", blockio.Create)
			write(t, f, "x", 0)
			ok(t, f.Flush())
		}},
		{name: "durable name without a flush", file: "/d/f", nothing: "", all: "x", do: func(t *testing.T, fsys *FS) {
			write(t, open(t, fsys, "/d/f", blockio.Create), "x", 0)
			ok(t, fsys.SyncDir("/d"))
		}},
		{name: "both", file: "/d/f", nothing: "x", all: "xy", do: func(t *testing.T, fsys *FS) {
			f := open(t, fsys, "/d/f", blockio.Create)
			write(t, f, "x", 0)
			ok(t, f.Flush())
			ok(t, fsys.SyncDir("/d"))
			write(t, f, "y", 1)
		}},
		{name: "rename over an old file", file: "/d/old", nothing: "old", all: "new", do: func(t *testing.T, fsys *FS) {
			f := open(t, fsys, "/d/f", blockio.Create)
			write(t, f, "new", 0)
			ok(t, f.Flush())
			ok(t, fsys.Rename("/d/f", "/d/old"))
		}},
		{name: "unsynced removal", file: "/d/old", nothing: "old", all: "<absent>", do: func(t *testing.T, fsys *FS) {
			ok(t, fsys.Remove("/d/old"))
		}},
		{name: "synced removal", file: "/d/old", nothing: "<absent>", all: "<absent>", do: func(t *testing.T, fsys *FS) {
			ok(t, fsys.Remove("/d/old"))
			ok(t, fsys.SyncDir("/d"))
		}},
		{name: "truncate", file: "/d/old", nothing: "old", all: "o", do: func(t *testing.T, fsys *FS) {
			ok(t, open(t, fsys, "/d/old", 0).Truncate(1))
		}},
		{name: "rename to another directory, that one synced", file: "/e/new", nothing: "old", all: "old", do: func(t *testing.T, fsys *FS) {
			ok(t, fsys.Rename("/d/old", "/e/new"))
			ok(t, fsys.SyncDir("/e"))
		}},
		{name: "and gone from the first", file: "/d/old", nothing: "<absent>", all: "<absent>", do: func(t *testing.T, fsys *FS) {
			ok(t, fsys.Rename("/d/old", "/e/new"))
			ok(t, fsys.SyncDir("/e"))
		}},
		{name: "new directory not synced in its parent", file: "/d/new/f", nothing: "<absent>", all: "x", do: func(t *testing.T, fsys *FS) {
			ok(t, fsys.Mkdir("/d/new"))
			f := open(t, fsys, "/d/new/f", blockio.Create)
			write(t, f, "x", 0)
			ok(t, f.Flush())
			ok(t, fsys.SyncDir("/d/new"))
		}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			fsys := New("/d", "/e")
			ok(t, fsys.Put("/d/old", []byte("old")))
			test.do(t, fsys)
			if got := readAll(fsys.Crash(Nothing), test.file); got != test.nothing {
				t.Errorf("nothing survives: %q, want %q", got, test.nothing)
			}
			if got := readAll(fsys.Crash(Everything), test.file); got != test.all {
				t.Errorf("everything survives: %q, want %q", got, test.all)
			}
			if got := readAll(fsys.Crash(Everything).Crash(Nothing), test.file); got != test.all {
				t.Errorf("everything survives, then a second crash: %q, want %q", got, test.all)
			}
			killed := fsys.Kill()
			if got := readAll(killed, test.file); got != test.all {
				t.Errorf("killed: %q, want %q", got, test.all)
			}
			if got := readAll(killed.Crash(Nothing), test.file); got != test.nothing {
				t.Errorf("killed, then power cut: %q, want %q", got, test.nothing)
			}
		})
	}
}

func TestTornRename(t *testing.T) {
	fsys := New("/d", "/e")
	ok(t, fsys.Put("/d/f", []byte("x")))
	ok(t, fsys.Rename("/d/f", "/e/f"))
	for name, img := range fsys.CrashImages(0, nil) {
		old, now := readAll(img, "/d/f"), readAll(img, "/e/f")
		if (old == "x") == (now == "x") {
			t.Errorf("%s: old name %q, new name %q", name, old, now)
		}
	}
}

func TestHook(t *testing.T) {
	fsys := New("/d")
	var steps []string
	refuse := Op("")
	fsys.OnStep(func(s Step) error {
		steps = append(steps, s.String())
		_ = fsys.Kill() // the hook may use the file system
		if s.Op == refuse {
			return syscall.EIO
		}
		return nil
	})
	f := open(t, fsys, "/d/f", blockio.Create)
	write(t, f, "12345", 3)
	ok(t, f.Allocate(0, 4096))
	ok(t, f.Zero(512, 512))
	ok(t, f.Truncate(9))
	ok(t, f.SetXattr("user.x", nil))
	ok(t, f.RemoveXattr("user.x"))
	ok(t, f.Flush())
	ok(t, fsys.Link("/d/f", "/d/g"))
	ok(t, fsys.Mkdir("/d/sub"))
	ok(t, fsys.Rename("/d/g", "/d/sub/h"))
	ok(t, fsys.SyncDir("/d"))
	ok(t, fsys.RemoveAll("/d/sub"))
	if _, err := fsys.Open("/d/none", 0); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
	if err := fsys.Remove("/d/none"); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
	want := []string{
		"create /d/f", "write /d/f 3+5", "allocate /d/f 0+4096", "zero /d/f 512+512", "truncate /d/f 9",
		"set xattr /d/f user.x", "remove xattr /d/f user.x", "flush /d/f", "link /d/f /d/g", "mkdir /d/sub",
		"rename /d/g /d/sub/h", "sync dir /d", "remove /d/sub/h", "remove /d/sub",
	}
	if !slices.Equal(steps, want) {
		t.Errorf("steps %q\nwant %q", steps, want)
	}
	if n := fsys.Steps(); n != int64(len(want)) {
		t.Errorf("%d steps, want %d", n, len(want))
	}

	refuse = OpWrite
	if n, err := f.WriteAt([]byte("y"), 0); n != 0 || !errors.Is(err, syscall.EIO) {
		t.Errorf("refused write: %d, %v", n, err)
	}
	if got := readAll(fsys, "/d/f"); got[0] != 0 {
		t.Errorf("refused write happened: %q", got)
	}
	refuse = OpFlush
	write(t, f, "z", 0)
	if err := f.Flush(); !errors.Is(err, syscall.EIO) {
		t.Errorf("refused flush: %v", err)
	}
	refuse = ""
	if err := f.Flush(); !errors.Is(err, syscall.EIO) {
		t.Errorf("a failed flush was forgotten: %v", err)
	}
	if got := readAll(fsys.Crash(Nothing), "/d/f"); got[0] != 0 {
		t.Errorf("failed flush made %q durable", got)
	}
	ok(t, open(t, fsys, "/d/f", 0).Flush())
	if got := readAll(fsys.Crash(Nothing), "/d/f"); got[0] != 'z' {
		t.Errorf("flush through a new handle left %q", got)
	}
}

func TestLock(t *testing.T) {
	fsys := New()
	a := open(t, fsys, "f", blockio.Create)
	b := open(t, fsys, "f", 0)
	ok(t, a.Lock())
	ok(t, a.Lock())
	if err := b.Lock(); !errors.Is(err, blockio.ErrLocked) {
		t.Errorf("second handle: %v", err)
	}
	ok(t, open(t, fsys.Kill(), "f", 0).Lock())
	ok(t, a.Close())
	ok(t, b.Lock())
	if _, err := a.ReadAt(make([]byte, 1), 0); !errors.Is(err, fs.ErrClosed) {
		t.Errorf("read after close: %v", err)
	}
	if err := a.Close(); !errors.Is(err, fs.ErrClosed) {
		t.Errorf("second close: %v", err)
	}
}

func TestErrors(t *testing.T) {
	fsys := New("/d/sub")
	ok(t, fsys.Put("/d/f", []byte("x")))
	ro := open(t, fsys, "/d/f", blockio.ReadOnly)
	for name, test := range map[string]struct {
		err, want error
	}{
		"open absent":      {second(fsys.Open("/d/none", 0)), fs.ErrNotExist},
		"open below file":  {second(fsys.Open("/d/f/g", blockio.Create)), syscall.ENOTDIR},
		"create in absent": {second(fsys.Open("/none/g", blockio.Create)), fs.ErrNotExist},
		"open directory":   {second(fsys.Open("/d", blockio.ReadOnly)), syscall.EISDIR},
		"exclusive":        {second(fsys.Open("/d/f", blockio.Create|blockio.Excl)), fs.ErrExist},
		"write read-only":  {second(ro.WriteAt([]byte("y"), 0)), syscall.EBADF},
		"negative read":    {second(ro.ReadAt([]byte("y"), -1)), syscall.EINVAL},
		"odd zero":         {open(t, fsys, "/d/f", 0).Zero(1, 512), syscall.EINVAL},
		"remove full dir":  {fsys.Remove("/d"), syscall.ENOTEMPTY},
		"rename absent":    {fsys.Rename("/d/none", "/d/x"), fs.ErrNotExist},
		"rename to dir":    {fsys.Rename("/d/f", "/d/sub"), syscall.EISDIR},
		"rename dir over":  {fsys.Rename("/d/sub", "/d/f"), syscall.ENOTDIR},
		"rename into self": {fsys.Rename("/d", "/d/sub/d"), syscall.EINVAL},
		"link over":        {fsys.Link("/d/f", "/d/sub"), fs.ErrExist},
		"link dir":         {fsys.Link("/d/sub", "/d/x"), syscall.EPERM},
		"mkdir over":       {fsys.Mkdir("/d/f"), fs.ErrExist},
		"sync file":        {fsys.SyncDir("/d/f"), syscall.ENOTDIR},
		"list absent":      {second(fsys.ReadDir("/none")), fs.ErrNotExist},
		"absent xattr":     {second(ro.Xattr("user.x")), fs.ErrNotExist},
		"put over":         {fsys.Put("/d/f", nil), fs.ErrExist},
		"remove root":      {New().Remove("/"), syscall.EINVAL},
	} {
		if !errors.Is(test.err, test.want) {
			t.Errorf("%s: %v, want %v", name, test.err, test.want)
		}
	}
	ok(t, fsys.Rename("/d/f", "/d/f"))
	ok(t, fsys.RemoveAll("/none"))
	if links, err := ro.Links(); links != 1 || err != nil {
		t.Errorf("%d links, %v", links, err)
	}
	ok(t, fsys.RemoveAll("/d"))
	if links, err := ro.Links(); links != 0 || err != nil {
		t.Errorf("%d links of a removed file, %v", links, err)
	}
	if got, err := io.ReadAll(io.NewSectionReader(ro, 0, 10)); string(got) != "x" || err != nil {
		t.Errorf("removed file reads %q, %v", got, err)
	}
}

func second[T any](_ T, err error) error { return err }

func TestCapacity(t *testing.T) {
	fsys := New()
	fsys.SetCapacity(4 * pageSize)
	f := open(t, fsys, "f", blockio.Create)
	g := open(t, fsys, "g", blockio.Create)
	ok(t, g.Allocate(0, 2*pageSize))
	if err := f.Allocate(0, 3*pageSize); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("allocate too much: %v", err)
	}
	if f.Size() != 2*pageSize || second(g.WriteAt([]byte{1}, 2*pageSize)) == nil {
		t.Errorf("size %d, and room is left, after too much was allocated", f.Size())
	}
	ok(t, f.Truncate(0))
	if n, err := f.WriteAt(make([]byte, 3*pageSize), 0); n != 2*pageSize || !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("write too much: %d, %v", n, err)
	}
	if f.Size() != 2*pageSize {
		t.Errorf("size %d after a write that was cut short", f.Size())
	}
	if n, err := f.WriteAt(make([]byte, 1), 3*pageSize); n != 0 || !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("write to a full disk: %d, %v", n, err)
	}
	write(t, f, "again", 10)
	for _, full := range []*FS{fsys, fsys.Kill(), fsys.Crash(Everything)} {
		g := open(t, full, "g", 0)
		write(t, g, "reserved", pageSize+5)
		write(t, g, "reserved", 0)
		if second(g.WriteAt([]byte{1}, 2*pageSize)) == nil {
			t.Error("no limit")
		}
	}
	ok(t, g.Zero(0, pageSize)) // gives a page back
	write(t, f, "x", 2*pageSize)
	ok(t, f.Truncate(pageSize))
	ok(t, g.Allocate(0, 3*pageSize))
	ok(t, fsys.Remove("f"))
	if second(g.WriteAt([]byte{1}, 3*pageSize)) == nil {
		t.Error("space of a removed file is free though it is open")
	}
	ok(t, f.Close())
	write(t, g, "x", 3*pageSize)
}

func TestNextData(t *testing.T) {
	fsys := New()
	f := open(t, fsys, "f", blockio.Create)
	ok(t, f.Truncate(10*pageSize+5))
	ok(t, f.Allocate(0, pageSize))
	write(t, f, "x", 2*pageSize+7)
	write(t, f, "x", 3*pageSize)
	write(t, f, "x", 10*pageSize+4)
	for _, want := range [][3]int64{
		{0, 2 * pageSize, 4 * pageSize},
		{2*pageSize + 9, 2*pageSize + 9, 4 * pageSize},
		{4 * pageSize, 10 * pageSize, 10*pageSize + 5},
	} {
		start, end, err := f.NextData(want[0])
		if start != want[1] || end != want[2] || err != nil {
			t.Errorf("from %d: [%d, %d), %v, want [%d, %d)", want[0], start, end, err, want[1], want[2])
		}
	}
	if _, _, err := f.NextData(10*pageSize + 5); err != io.EOF {
		t.Errorf("past the end: %v", err)
	}
}

func TestConcurrentUse(t *testing.T) {
	fsys := New()
	var wg sync.WaitGroup
	for g := range 4 {
		wg.Go(func() {
			name := string(rune('a' + g))
			f := open(t, fsys, name, blockio.Create)
			rng := rand.New(rand.NewPCG(uint64(g), 0))
			for i := range 300 {
				data := bytes.Repeat([]byte{byte(i)}, 1+rng.IntN(3*pageSize))
				off := rng.Int64N(4 * pageSize)
				if _, err := f.WriteAt(data, off); err != nil {
					t.Error(err)
				}
				got := make([]byte, len(data))
				if _, err := f.ReadAt(got, off); err != nil || !bytes.Equal(got, data) {
					t.Errorf("read back: %v", err)
				}
				switch i % 50 {
				case 10:
					ok(t, f.Flush())
				case 20:
					for _, img := range fsys.CrashImages(20, rng) {
						_ = readAll(img, name)
					}
				}
			}
		})
	}
	wg.Wait()
}

func BenchmarkKill(b *testing.B) {
	fsys := New()
	for _, name := range []string{"a", "b", "c", "d"} {
		if err := fsys.Put(name, make([]byte, 1<<20)); err != nil {
			b.Fatal(err)
		}
	}
	f, err := fsys.Open("a", 0)
	if err != nil {
		b.Fatal(err)
	}
	block := make([]byte, 4096)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := f.WriteAt(block, 8192); err != nil {
			b.Fatal(err)
		}
		_ = fsys.Kill()
		if err := f.Flush(); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkImages is the cost of one image of four files of 1 MiB with 64
// unsynced writes of 16 KiB.
func BenchmarkImages(b *testing.B) {
	fsys := New()
	for _, name := range []string{"a", "b", "c", "d"} {
		if err := fsys.Put(name, make([]byte, 1<<20)); err != nil {
			b.Fatal(err)
		}
		f, err := fsys.Open(name, 0)
		if err != nil {
			b.Fatal(err)
		}
		for i := range 16 {
			if _, err := f.WriteAt(make([]byte, 16<<10), int64(i)<<16); err != nil {
				b.Fatal(err)
			}
		}
	}
	b.ReportAllocs()
	for b.Loop() {
		for range fsys.CrashImages(100, nil) {
		}
	}
	b.ReportMetric(float64(b.Elapsed().Microseconds())/float64(100*b.N), "µs/image")
}
