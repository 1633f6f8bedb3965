package fuseloop

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/snapmerge/snapmerge/pkg/transport"
	"github.com/snapmerge/snapmerge/test/devicetest"
	"github.com/snapmerge/snapmerge/test/machine"
)

func needPassthrough(t testing.TB) {
	t.Helper()
	needRoot(t)
	if err := New(nil).Passthrough(); err != nil {
		t.Skip(err)
	}
}

// countedBase is the base in a file as the backend, which counts what comes to it.
type countedBase struct {
	*devicetest.File
	reads, writes, flushes, zeros atomic.Int64
	grown                         atomic.Int64 // its size, if it has changed
}

// Lend lends nothing, so that everything comes to b.
func (b *countedBase) Lend(int64, int64, bool) (fd int, back func(done bool), ok bool) {
	return -1, nil, false
}

func (b *countedBase) ReadAt(p []byte, off int64) (int, error) {
	b.reads.Add(1)
	return b.File.ReadAt(p, off)
}

func (b *countedBase) WriteAt(p []byte, off int64) (int, error) {
	b.writes.Add(1)
	return b.File.WriteAt(p, off)
}

func (b *countedBase) Flush() error {
	b.flushes.Add(1)
	return b.File.Flush()
}

func (b *countedBase) Zero(off, n int64) error {
	b.zeros.Add(1)
	return b.File.Zero(off, n)
}

func (b *countedBase) Size() int64 { return max(b.grown.Load(), b.File.Size()) }

func newCountedBase(t testing.TB, path string) *countedBase {
	t.Helper()
	f, err := devicetest.OpenFile(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return &countedBase{File: f}
}

func throughTo(path string) transport.Options {
	return transport.Options{Base: func() (string, error) { return path, nil }}
}

// at reads the file past all devices.
func at(t testing.TB, path string, off int64, n int) []byte {
	t.Helper()
	f := openGuest(t, path, os.O_RDONLY)
	defer f.Close()
	p := aligned(t, n)
	if _, err := f.ReadAt(p, off); err != nil {
		t.Fatal(err)
	}
	return p
}

// cached is how many pages of the file are in memory.
func cached(t testing.TB, path string) (pages int) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	mem, err := unix.Mmap(int(f.Fd()), 0, int(st.Size()), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(mem)
	vec := make([]byte, (len(mem)+os.Getpagesize()-1)/os.Getpagesize())
	if err := mincore(mem, vec); err != nil {
		t.Fatal(err)
	}
	for _, v := range vec {
		pages += int(v & 1)
	}
	return pages
}

func fill(p []byte, seed uint64) {
	rng := rand.New(rand.NewPCG(seed, seed))
	for i := range p {
		p[i] = byte(rng.Uint32())
	}
}

// TestPassthrough: reads and writes go to the base and nowhere else; flushes and
// discards come to the backend and reach the base from there.
func TestPassthrough(t *testing.T) {
	needPassthrough(t)
	path := imageFile(t, 8<<20)
	b := newCountedBase(t, path)
	noLeftovers(t, "v")
	d := create(t, New(nil), "v", b, throughTo(path))
	if !d.Native() {
		t.Fatal("does not pass through")
	}
	if dio, err := os.ReadFile("/sys/block/" + filepath.Base(d.Path()) + "/loop/dio"); err != nil || strings.TrimSpace(string(dio)) != "1" {
		t.Errorf("direct I/O of the loop device: %q, %v", dio, err)
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := errors.Join(f.Sync(), unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)); err != nil {
		t.Fatal(err)
	}
	g := openGuest(t, d.Path(), os.O_RDWR)
	defer g.Close()
	for i, c := range []struct {
		off int64
		n   int
	}{{0, 4096}, {12288, 4096}, {1 << 20, 1 << 20}, {8<<20 - 4096, 4096}, {3 << 20, 3 << 20}} {
		p := aligned(t, c.n)
		fill(p, uint64(i))
		if _, err := g.WriteAt(p, c.off); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(at(t, path, c.off, c.n), p) {
			t.Errorf("write of %d bytes at %d is not in the base", c.n, c.off)
		}
		back := aligned(t, c.n)
		if _, err := g.ReadAt(back, c.off); err != nil || !bytes.Equal(back, p) {
			t.Errorf("read of %d bytes at %d: %v", c.n, c.off, err)
		}
	}
	if r, w := b.reads.Load(), b.writes.Load(); r+w != 0 {
		t.Errorf("%d reads and %d writes came to the backend", r, w)
	}
	if n := cached(t, path); n != 0 {
		t.Errorf("%d pages of the base are in memory: no direct I/O", n)
	}

	flushes := b.flushes.Load()
	if err := g.Sync(); err != nil {
		t.Fatal(err)
	}
	if n := b.flushes.Load(); n != flushes+1 {
		t.Errorf("%d flushes for one fsync", n-flushes)
	}
	for i, request := range []uintptr{ioctlDiscard, ioctlZeroOut} {
		off := int64(3+i) << 20
		if err := rangeIoctl(g, request, off, 1<<20); err != nil {
			t.Fatal(err)
		}
		if got := at(t, path, off, 1<<20); !bytes.Equal(got, make([]byte, 1<<20)) {
			t.Errorf("%#x: the base has other things than zeros", request)
		}
		if hole, err := unix.Seek(int(f.Fd()), off, unix.SEEK_HOLE); err != nil || hole != off {
			t.Errorf("%#x: the next hole is at %d, want %d (%v)", request, hole, off, err)
		}
		back := aligned(t, 1<<20)
		if _, err := g.ReadAt(back, off); err != nil || !bytes.Equal(back, make([]byte, 1<<20)) {
			t.Errorf("%#x: the guest reads other things than zeros, %v", request, err)
		}
	}
	if n := b.zeros.Load(); n == 0 {
		t.Error("no zeroing came to the backend")
	}
}

// TestPassthroughGrow: a base that has grown can be used to its new end at once.
func TestPassthroughGrow(t *testing.T) {
	needPassthrough(t)
	const before, after = 4 << 20, 9 << 20
	path := imageFile(t, before)
	b := newCountedBase(t, path)
	noLeftovers(t, "v")
	d := create(t, New(nil), "v", b, throughTo(path))
	g := openGuest(t, d.Path(), os.O_RDWR)
	defer g.Close()
	p := aligned(t, 8192)
	fill(p, 1)
	if _, err := g.WriteAt(p, before-8192); err != nil { // makes the kernel's idea of the size old
		t.Fatal(err)
	}
	if err := unix.Truncate(path, after); err != nil {
		t.Fatal(err)
	}
	b.grown.Store(after)
	if err := d.Resize(); err != nil {
		t.Fatal(err)
	}
	if _, err := g.WriteAt(p, after-8192); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(at(t, path, after-8192, 8192), p) {
		t.Error("a write to the new end is not in the base")
	}
	if b.writes.Load() != 0 {
		t.Error("writes came to the backend")
	}
}

// TestPassthroughNot: where it cannot be, the backend serves everything.
func TestPassthroughNot(t *testing.T) {
	needPassthrough(t)
	no := errors.New("not now")
	for name, o := range map[string]transport.Options{
		"refused":       {Base: func() (string, error) { return "", no }},
		"no file":       throughTo("/nonexistent/base.img"),
		"not a regular": throughTo("/dev/null"),
	} {
		t.Run(name, func(t *testing.T) {
			noLeftovers(t, "v")
			b := newMemBackend(1 << 20)
			d := create(t, New(nil), "v", b, o)
			g := openGuest(t, d.Path(), os.O_RDWR)
			defer g.Close()
			p := aligned(t, blockSize)
			fill(p, 2)
			if _, err := g.WriteAt(p, 8192); err != nil || d.Native() || !bytes.Equal(b.content(8192, blockSize), p) {
				t.Errorf("%v, native %t", err, d.Native())
			}
		})
	}
	t.Run("read only", func(t *testing.T) {
		noLeftovers(t, "v")
		o := transport.Options{ReadOnly: true, Base: func() (string, error) { t.Error("asked"); return "", no }}
		if d := create(t, New(nil), "v", newMemBackend(1<<20), o); d.Native() {
			t.Error("passes through")
		}
	})
}

// TestPassthroughAbort: from the end of Abort on nothing reaches the base any more,
// whoever has the device open.
func TestPassthroughAbort(t *testing.T) {
	needPassthrough(t)
	path := imageFile(t, 4<<20)
	b := newCountedBase(t, path)
	noLeftovers(t, "v")
	d := create(t, New(nil), "v", b, throughTo(path))
	g := openGuest(t, d.Path(), os.O_RDWR)
	var writers [4]chan error
	for i := range writers {
		writers[i] = make(chan error, 1)
		p := aligned(t, blockSize)
		fill(p, uint64(i))
		go func() {
			for n := int64(0); ; n++ {
				if _, err := g.WriteAt(p, (n*4+int64(i))*blockSize%(4<<20)); err != nil {
					writers[i] <- err
					return
				}
			}
		}()
	}
	time.Sleep(20 * time.Millisecond) // some load
	if err := d.Abort(); err != nil {
		t.Fatal(err)
	}
	zeros := make([]byte, 4<<20)
	if err := os.WriteFile(path, zeros, 0o600); err != nil { // the base is somebody else's now
		t.Fatal(err)
	}
	for _, w := range writers {
		select {
		case err := <-w:
			t.Logf("a writer ends with %v", err)
		case <-time.After(patience):
			t.Fatal("a writer goes on")
		}
	}
	if _, err := g.WriteAt(aligned(t, blockSize), 0); err == nil {
		t.Error("a write after Abort succeeded")
	}
	if got := at(t, path, 0, 4<<20); !bytes.Equal(got, zeros) {
		t.Error("a write has reached the base after Abort")
	}
	g.Close()
}

// TestPassthroughWithoutServer: while the server is dead, reads and writes go on;
// a flush waits for the next server.
func TestPassthroughWithoutServer(t *testing.T) {
	needPassthrough(t)
	needResend(t)
	t.Setenv(helperBase, "1")
	image := imageFile(t, 4<<20)
	noLeftovers(t, filepath.Base(image))
	socket := machine.SocketPath(t, "keeper.sock")
	startKeeper(t, socket)
	server := startHelper(t, "server", socket, image)
	g := openGuest(t, server.line(t, "ready")[0], os.O_RDWR)
	defer g.Close()
	abortIfFailed(t, dialKeeper(t, socket), filepath.Base(image))
	p, back := aligned(t, blockSize), aligned(t, blockSize)
	for i := range 3 {
		server.kill(t)
		fill(p, uint64(i))
		served := make(chan error, 1)
		go func() {
			_, err := g.WriteAt(p, 8192)
			if err == nil {
				_, err = g.ReadAt(back, 8192)
			}
			served <- err
		}()
		select {
		case err := <-served:
			if err != nil || !bytes.Equal(back, p) || !bytes.Equal(at(t, image, 8192, blockSize), p) {
				t.Fatalf("without a server: %v", err)
			}
		case <-time.After(patience):
			t.Fatalf("reads and writes wait for a server, round %d", i)
		}
		synced := make(chan error, 1)
		go func() { synced <- g.Sync() }()
		select {
		case err := <-synced:
			t.Fatalf("a flush has ended without a server: %v", err)
		case <-time.After(50 * time.Millisecond):
		}
		server = startHelper(t, "server", socket, image)
		server.line(t, "adopted")
		select {
		case err := <-synced:
			if err != nil {
				t.Fatal(err)
			}
		case <-time.After(patience):
			t.Fatal("a flush does not end")
		}
	}
	g.Close()
	server.finish(t)
}

// TestPassthroughKillUnderLoad kills the server with SIGKILL ten times while fio writes
// and verifies.
func TestPassthroughKillUnderLoad(t *testing.T) {
	needPassthrough(t)
	needResend(t)
	needFio(t)
	t.Setenv(helperBase, "1")
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	image := imageFile(t, 48<<20)
	noLeftovers(t, filepath.Base(image))
	socket := machine.SocketPath(t, "keeper.sock")
	startKeeper(t, socket)
	server := startHelper(t, "server", socket, image)
	dev := server.line(t, "ready")[0]
	l := verifyLoop(t, dev, "4k-64k")
	abortIfFailed(t, dialKeeper(t, socket), filepath.Base(image))
	for range 10 {
		time.Sleep(time.Duration(rng.IntN(300)) * time.Millisecond) // some load
		server.kill(t)
		time.Sleep(time.Duration(rng.IntN(300)) * time.Millisecond) // some load without a server
		server = startHelper(t, "server", socket, image)
		if got := server.line(t, "adopted")[0]; got != dev {
			t.Errorf("adopted %s, want %s", got, dev)
		}
	}
	t.Logf("the longest wait of a request was %v", l.finish(t))
	server.finish(t)
}

// TestPassthroughBothDie: without keeper and server, flushes fail, and the next server
// ends what still is written before it serves the volume.
func TestPassthroughBothDie(t *testing.T) {
	needPassthrough(t)
	needResend(t)
	t.Setenv(helperBase, "1")
	image := imageFile(t, 4<<20)
	noLeftovers(t, filepath.Base(image))
	socket := machine.SocketPath(t, "keeper.sock")
	k := startKeeper(t, socket)
	server := startHelper(t, "server", socket, image)
	f := openGuest(t, server.line(t, "ready")[0], os.O_RDWR)
	old, fresh := aligned(t, blockSize), aligned(t, blockSize)
	fill(old, 1)
	fill(fresh, 2)
	k.kill(t)
	server.kill(t)
	if _, err := f.WriteAt(old, 0); err != nil || !bytes.Equal(at(t, image, 0, blockSize), old) {
		t.Errorf("the kernel's own way to the base: %v", err)
	}
	if err := f.Sync(); err == nil {
		t.Error("a flush that nobody has carried out succeeded")
	}
	startKeeper(t, socket)
	server = startHelper(t, "server", socket, image)
	g := openGuest(t, server.line(t, "ready")[0], os.O_RDWR)
	if _, err := g.WriteAt(fresh, 0); err != nil {
		t.Error(err)
	}
	if _, err := f.WriteAt(old, 0); err == nil {
		t.Error("a write by the dead device succeeded")
	}
	if !bytes.Equal(at(t, image, 0, blockSize), fresh) {
		t.Error("the dead device has written to the base")
	}
	f.Close() // the dead device goes now
	g.Close()
	server.finish(t)
}

// TestPassthroughOpen: what the kernel is told.
func TestPassthroughOpen(t *testing.T) {
	s := newServer("disk", newMemBackend(volSize), false)
	s.want |= featPassthrough
	f, msg := testFrame(initMsg(7, 45, ^uint32(0), ^uint32(0)))
	b := s.handle(msg, f)[outHeaderSize:]
	if native.Uint32(b[32:])&(featPassthrough>>32) == 0 || native.Uint32(b[36:]) != stackDepth {
		t.Errorf("INIT reply %x", b)
	}
	for backing, want := range map[int32]struct {
		flags uint32
		errno unix.Errno
	}{
		0:              {openNoFlush, 0},
		7:              {openNoFlush | openPassthrough, 0},
		backingUnknown: {0, unix.EIO},
	} {
		s.backing.Store(backing)
		f, msg := testFrame(message(opOpen, diskNode, make([]byte, 8)))
		reply := s.handle(msg, f)
		if errno := checkReply(t, reply); errno != int(want.errno) {
			t.Errorf("backing %d: errno %d", backing, errno)
		} else if errno == 0 && (native.Uint32(reply[outHeaderSize+8:]) != want.flags || int32(native.Uint32(reply[outHeaderSize+12:])) != backing) {
			t.Errorf("backing %d: %x", backing, reply)
		}
	}
	if n := s.opens.Load(); n != 2 {
		t.Errorf("open %d times", n)
	}
	// A kernel without it, and one that was not asked.
	for name, s := range map[string]*server{"kernel": newServer("disk", newMemBackend(volSize), false), "not asked": newServer("disk", newMemBackend(volSize), false)} {
		flags2 := ^uint32(0)
		if name == "kernel" {
			s.want |= featPassthrough
			flags2 &^= featPassthrough >> 32
		}
		f, msg := testFrame(initMsg(7, 45, ^uint32(0), flags2))
		b := s.handle(msg, f)[outHeaderSize:]
		if native.Uint32(b[32:])&(featPassthrough>>32) != 0 || native.Uint32(b[36:]) != 0 || s.features.Load()&featPassthrough != 0 {
			t.Errorf("%s: INIT reply %x", name, b)
		}
	}
}

func TestTag(t *testing.T) {
	plain := newTag("v")
	for tag, want := range map[string]struct{ ok, through bool }{
		plain:                  {true, false},
		plain + baseMark:       {true, true},
		plain + ":other":       {false, false},
		plain + baseMark + ":": {false, false},
		"":                     {false, false},
		baseMark:               {false, true},
	} {
		name, ok := fileOf(tag)
		if through := (loopDev{tag: tag}).passesThrough(); ok != want.ok || through != want.through || ok && name != fileName("v") {
			t.Errorf("%q: %q, %t, passes through %t", tag, name, ok, through)
		}
	}
	if n := len(plain + baseMark); n > len(unix.LoopInfo64{}.File_name)-1 {
		t.Errorf("tag of %d bytes", n)
	}
}

func mincore(mem, vec []byte) error {
	_, _, errno := unix.Syscall(unix.SYS_MINCORE, uintptr(unsafe.Pointer(unsafe.SliceData(mem))), uintptr(len(mem)), uintptr(unsafe.Pointer(unsafe.SliceData(vec))))
	if errno != 0 {
		return errno
	}
	return nil
}
