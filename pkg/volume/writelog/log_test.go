package writelog

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/snapmerge/snapmerge/pkg/blockio"
	"github.com/snapmerge/snapmerge/pkg/blockio/crashfs"
)

const testSegment = 16 << 10

// memory is what lies below the log.
type memory []byte

func (m memory) ReadAt(p []byte, off int64) (int, error) { return copy(p, m[off:]), nil }

func create(t testing.TB, fs blockio.FS) {
	t.Helper()
	if err := Create(fs, "/l/log", 7, [16]byte{1}, testSegment); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(fs.SyncDir("/l"), fs.SyncDir("/")); err != nil {
		t.Fatal(err)
	}
}

func open(fs blockio.FS, info Info) (*Log, error) {
	f, err := fs.Open("/l/log", 0)
	if err != nil {
		return nil, err
	}
	info.Layer, info.Volume = 7, [16]byte{1}
	l, err := Open(f, info)
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return l, nil
}

func mustOpen(t testing.TB, fs blockio.FS, info Info) *Log {
	t.Helper()
	l, err := open(fs, info)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func sectors(n int, b byte) []byte { return bytes.Repeat([]byte{b}, n*sector) }

func read(t testing.TB, l *Log, below memory) []byte {
	t.Helper()
	p := make([]byte, len(below))
	if err := l.ReadAt(below, p, 0); err != nil {
		t.Fatal(err)
	}
	return p
}

// TestModel compares a log with an image in memory over random requests,
// flushes, frees and reopenings.
func TestModel(t *testing.T) {
	for seed := range uint64(30) {
		rng := rand.New(rand.NewPCG(seed, 1))
		fs := crashfs.New("/l")
		create(t, fs)
		below := memory(make([]byte, 64*sector))
		for i := range below {
			below[i] = 0xee
		}
		want := slices.Clone(below)
		var freed []Freed
		l := mustOpen(t, fs, Info{})
		for step := range 300 {
			off := rng.IntN(64)
			n := 1 + rng.IntN(min(40, 64-off))
			switch k := rng.IntN(20); {
			case k < 12:
				p := sectors(n, byte(step))
				if err := l.Write(p, int64(off*sector)); err != nil {
					t.Fatal(err)
				}
				copy(want[off*sector:], p)
			case k < 14:
				if err := l.Zero(int64(off*sector), int64(n*sector)); err != nil {
					t.Fatal(err)
				}
				clear(want[off*sector : (off+n)*sector])
			case k < 16:
				if err := l.Flush(); err != nil {
					t.Fatal(err)
				}
			case k < 18:
				f, bytes := l.Dead()
				if bytes > 0 {
					freed = f
					if err := l.Free(f); err != nil {
						t.Fatal(err)
					}
				}
			default:
				if err := l.Close(); err != nil {
					t.Fatal(err)
				}
				l = mustOpen(t, fs, Info{Freed: freed})
			}
			if got := read(t, l, below); !bytes.Equal(got, want) {
				t.Fatalf("seed %d, step %d: differs", seed, step)
			}
			checkIndex(t, l)
		}
		if len(freed) == 0 {
			t.Errorf("seed %d: nothing was ever freed", seed)
		}
		if last, err := l.Seal(); err != nil || last == 0 {
			t.Fatalf("seal: %d, %v", last, err)
		} else if err := l.Write(sectors(1, 1), 0); err == nil {
			t.Error("write to a sealed log")
		} else {
			l = mustOpen(t, fs, Info{Freed: freed, Sealed: true, Last: last})
			if got := read(t, l, below); !bytes.Equal(got, want) {
				t.Errorf("seed %d: sealed log differs", seed)
			}
		}
	}
}

// checkIndex counts what the index says of segments.
func checkIndex(t testing.TB, l *Log) {
	t.Helper()
	refs := make([]int, len(l.segs))
	live, end := uint64(0), uint64(0)
	l.index.tree.Scan(func(start uint64, e extent) bool {
		if e.start != start || e.n == 0 || e.start < end {
			t.Fatalf("extent %+v at %d after %d", e, start, end)
		}
		end = e.end()
		refs[e.seg]++
		if e.off >= 0 {
			live += e.n
		}
		return true
	})
	for i, s := range l.segs {
		if s.refs != refs[i] || s.gone && refs[i] > 0 {
			t.Fatalf("segment %d: %+v, %d extents point at it", i, s, refs[i])
		}
	}
	if live != l.live {
		t.Fatalf("%d live sectors are counted, %d are there", l.live, live)
	}
}

// build makes a log of a few records over two segments, the first half of them
// flushed, and returns what it shows.
func build(t testing.TB) (*crashfs.FS, memory, []byte) {
	fs := crashfs.New("/l")
	create(t, fs)
	below := memory(make([]byte, 64*sector))
	l := mustOpen(t, fs, Info{})
	for i := range 8 {
		if err := l.Write(sectors(5, byte(i+1)), int64(i*6*sector)); err != nil {
			t.Fatal(err)
		}
		if i == 5 {
			if err := l.Flush(); err != nil {
				t.Fatal(err)
			}
		}
	}
	want := read(t, l, below)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	return fs, below, want
}

func patch(t testing.TB, fs *crashfs.FS, off int64, change func(p []byte)) {
	t.Helper()
	f, err := fs.Open("/l/log", 0)
	if err != nil {
		t.Fatal(err)
	}
	p := make([]byte, sector)
	off = off / sector * sector
	if _, err := f.ReadAt(p, off); err != nil {
		t.Fatal(err)
	}
	change(p)
	if _, err := f.WriteAt(p, off); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(f.Flush(), f.Close()); err != nil {
		t.Fatal(err)
	}
}

// TestBitFlips flips bits all over a log. In what was flushed that is damage; in
// what came after it is a torn tail; in space that nothing refers to it is
// nothing.
func TestBitFlips(t *testing.T) {
	fs, below, want := build(t)
	l := mustOpen(t, fs.Kill(), Info{})
	// The records are 5 sectors and a header: the sixth ends the flushed part,
	// followed by its mark.
	record := (recordHeader + 5*sector + recordAlign - 1) / recordAlign * recordAlign
	perSegment := testSegment / record
	if perSegment != 6 {
		t.Fatalf("%d records in a segment, the test wants 6", perSegment)
	}
	flushedEnd := int64(headerBytes + 6*record)
	tailEnd := l.pos
	damaged, torn, same := 0, 0, 0
	rng := rand.New(rand.NewPCG(1, 1))
	for range 400 {
		off := headerBytes + rng.Int64N(tailEnd+2000-headerBytes)
		image := fs.Kill()
		patch(t, image, off, func(p []byte) { p[off%sector] ^= 1 << rng.IntN(8) })
		l, err := open(image, Info{})
		at := fmt.Sprintf("bit flip at %d", off)
		switch {
		case off < flushedEnd:
			if inPadding(off, record) {
				continue
			}
			if !errors.Is(err, ErrDamaged) {
				t.Fatalf("%s: flushed record, error %v", at, err)
			}
			damaged++
		case err != nil:
			t.Fatalf("%s: %v", at, err)
		case bytes.Equal(read(t, l, below), want):
			same++
		default:
			torn++
		}
	}
	if damaged == 0 || torn == 0 || same == 0 {
		t.Errorf("%d damaged, %d torn, %d without effect", damaged, torn, same)
	}
}

// inPadding tells whether off lies between two records.
func inPadding(off int64, record int) bool {
	return (off-headerBytes)%int64(record) >= recordHeader+5*sector
}

func TestDamage(t *testing.T) {
	for name, c := range map[string]struct {
		off    int64
		change func(p []byte)
		info   Info
	}{
		"magic":                 {off: 0, change: func(p []byte) { p[0] = 'X' }},
		"version":               {off: 0, change: func(p []byte) { p[8] = 9; le.PutUint32(p[60:], crc32Checksum(p[:60])) }},
		"checksum":              {off: 0, change: func(p []byte) { p[16] = 3 }},
		"segment length":        {off: 0, change: func(p []byte) { le.PutUint32(p[12:], 100); le.PutUint32(p[60:], crc32Checksum(p[:60])) }},
		"another layer":         {off: 0, change: func(p []byte) { p[16] = 3; le.PutUint32(p[60:], crc32Checksum(p[:60])) }},
		"records missing":       {info: Info{Sealed: true, Last: 99}},
		"freed segments beyond": {info: Info{Freed: []Freed{{Segment: 9, Count: 1, FirstSeq: 3, NextSeq: 4}}}},
		"freed does not follow": {info: Info{Freed: []Freed{{Segment: 1, Count: 1, FirstSeq: 3, NextSeq: 4}}}},
		"freed count":           {info: Info{Freed: []Freed{{Segment: 0, Count: 0, FirstSeq: 1, NextSeq: 4}}}},
	} {
		fs, _, _ := build(t)
		if c.change != nil {
			patch(t, fs, c.off, c.change)
		}
		before := fs.Steps()
		if _, err := open(fs, c.info); !errors.Is(err, ErrDamaged) {
			t.Errorf("%s: error %v", name, err)
		}
		if fs.Steps() != before {
			t.Errorf("%s: a damaged log was written to", name)
		}
	}
	fs := crashfs.New("/l")
	f, err := fs.Open("/l/log", blockio.Create)
	if err != nil {
		t.Fatal(err)
	}
	f.Close()
	if _, err := open(fs, Info{}); !errors.Is(err, ErrDamaged) {
		t.Errorf("empty file: error %v", err)
	}
}

// TestLastOfSegment: a record that would fill a segment to its last byte leaves no
// room for the proof of its flush, so it goes to the next one.
func TestLastOfSegment(t *testing.T) {
	disk := crashfs.New("/l")
	create(t, disk)
	l := mustOpen(t, disk, Info{})
	room := int64(testSegment)
	last := int64(0)
	for _, n := range []int{4, 4, 4, 4, 4, 4, 4, 3} {
		if err := l.Write(sectors(n, 1), 0); err != nil {
			t.Fatal(err)
		}
		last = l.pos - 100
		room -= int64(recordHeader + n*sector)
	}
	if room != 0 {
		t.Fatalf("the records leave %d bytes of a segment, the test wants 0", room)
	}
	if err := l.Flush(); err != nil {
		t.Fatal(err)
	}
	image := disk.Kill()
	patch(t, image, last, func(p []byte) { p[last%sector] ^= 4 })
	if _, err := open(image, Info{}); !errors.Is(err, ErrDamaged) {
		t.Errorf("damaged after its flush: %v", err)
	}
}

// TestEpochs: a torn tail of an earlier opening must not be taken for what a
// later one wrote over its beginning, even if that opening was cut off too.
func TestEpochs(t *testing.T) {
	fs := crashfs.New("/l")
	create(t, fs)
	below := memory(make([]byte, 64*sector))
	l := mustOpen(t, fs, Info{})
	for i := range 2 {
		if err := l.Write(sectors(2, byte(0x10+i)), int64(i*4*sector)); err != nil {
			t.Fatal(err)
		}
	}
	// The first record is lost, the second is on the disk.
	n := 0
	fs = fs.Crash(crashfs.Policy{Keep: func(s crashfs.Step) bool {
		if s.Op == crashfs.OpWrite {
			n++
		}
		return n > 2
	}})
	l = mustOpen(t, fs, Info{})
	if got := read(t, l, below); !bytes.Equal(got, below) {
		t.Fatal("half of a tail counts")
	}
	if err := l.Write(sectors(2, 0x20), 8*sector); err != nil {
		t.Fatal(err)
	}
	want := read(t, l, below)
	l.Close()
	l = mustOpen(t, fs, Info{})
	if got := read(t, l, below); !bytes.Equal(got, want) {
		t.Error("a record of a tail that was cut off came back")
	}
}

// TestErrors fails every step of writing once: the log must go on showing what
// was acknowledged, and after a failed flush take nothing any more.
func TestErrors(t *testing.T) {
	below := memory(make([]byte, 64*sector))
	for fail := int64(1); ; fail++ {
		fs := crashfs.New("/l")
		create(t, fs)
		l := mustOpen(t, fs, Info{})
		want := slices.Clone(below)
		n, hit, flushFailed := int64(0), false, false
		fs.OnStep(func(s crashfs.Step) error {
			if n++; n == fail {
				hit = true
				flushFailed = s.Op == crashfs.OpFlush
				return syscall.EIO
			}
			return nil
		})
		for i := range 12 {
			p := sectors(5, byte(i+1))
			off := int64(i%8) * 6 * sector
			err := l.Write(p, off)
			if err == nil {
				copy(want[off:], p)
			} else if !errors.Is(err, syscall.EIO) {
				t.Fatal(err)
			}
			if err == nil && flushFailed {
				t.Fatal("write acknowledged after a failed flush")
			}
			if i%3 == 2 {
				if err := l.Flush(); err == nil && flushFailed {
					t.Fatal("flush succeeded after a failed one")
				}
			}
			if got := read(t, l, below); !bytes.Equal(got, want) {
				t.Fatalf("step %d failed: differs after write %d", fail, i)
			}
		}
		fs.OnStep(nil)
		l.Close()
		again := mustOpen(t, fs.Kill(), Info{})
		if got := read(t, again, below); !bytes.Equal(got, want) {
			t.Fatalf("step %d failed: differs after a restart", fail)
		}
		if !hit {
			break
		}
	}
}

// TestFullDisk: no room for a segment is an error of the write, never of the
// flush, leaves others what room there is, and the log goes on when there is more.
func TestFullDisk(t *testing.T) {
	fs := crashfs.New("/l")
	create(t, fs)
	l := mustOpen(t, fs, Info{})
	const rest = testSegment - 4096
	fs.SetCapacity(fs.Used() + testSegment + rest)
	var err error
	written := 0
	for ; err == nil; written++ {
		if err = l.Write(sectors(5, byte(written)), 0); err == nil {
			if ferr := l.Flush(); ferr != nil {
				t.Fatal(ferr)
			}
		}
	}
	if !errors.Is(err, syscall.ENOSPC) || written < 8 {
		t.Fatalf("write %d: %v", written, err)
	}
	if err := l.Flush(); err != nil {
		t.Errorf("flush on a full disk: %v", err)
	}
	other, err := fs.Open("/l/other", blockio.Create)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(other.Allocate(0, rest), other.Close()); err != nil {
		t.Errorf("the log keeps room that it cannot use: %v", err)
	}
	fs.SetCapacity(0)
	if err := l.Write(sectors(5, 0x77), 0); err != nil {
		t.Errorf("write with room again: %v", err)
	}
	if got := read(t, l, memory(make([]byte, 5*sector))); !bytes.Equal(got, sectors(5, 0x77)) {
		t.Error("differs")
	}
}

// stuckFile is a file of which the next write after hold is set waits until release is
// closed.
type stuckFile struct {
	blockio.File
	hold    atomic.Bool
	waiting chan struct{} // told that it waits
	release chan struct{}
}

func (f *stuckFile) WriteAt(p []byte, off int64) (int, error) {
	if f.hold.CompareAndSwap(true, false) {
		f.waiting <- struct{}{}
		<-f.release
	}
	return f.File.WriteAt(p, off)
}

// TestReadsPassWrites checks that who looks the log up waits for no write to the disk.
func TestReadsPassWrites(t *testing.T) {
	fs := crashfs.New("/l")
	create(t, fs)
	file, err := fs.Open("/l/log", 0)
	if err != nil {
		t.Fatal(err)
	}
	f := &stuckFile{File: file, waiting: make(chan struct{}), release: make(chan struct{})}
	l, err := Open(f, Info{Layer: 7, Volume: [16]byte{1}})
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Write(sectors(1, 'a'), 0); err != nil {
		t.Fatal(err)
	}
	f.hold.Store(true)
	written := make(chan error)
	go func() { written <- l.Write(sectors(1, 'b'), 0) }()
	<-f.waiting

	looked := make(chan []byte, 1)
	go func() {
		p := make([]byte, sector)
		err := l.ReadAt(memory(p), p, 0)
		_, next := l.Next(0)
		if _, bytes := l.Dead(); err != nil || !next || !l.Has(0, sector) || l.Empty() || l.LiveBytes() != sector || l.Bytes() == 0 || bytes != 0 {
			t.Error("what is in the log is not seen")
		}
		looked <- p
	}()
	select {
	case got := <-looked:
		if !bytes.Equal(got, sectors(1, 'a')) {
			t.Errorf("read %q... while it is written, want what was written before", got[:8])
		}
	case <-time.After(10 * time.Second):
		t.Error("a read waits for a write")
	}
	close(f.release)
	if err := <-written; err != nil {
		t.Fatal(err)
	}
	if got := read(t, l, memory(make([]byte, sector))); !bytes.Equal(got, sectors(1, 'b')) {
		t.Errorf("read %q... after the write", got[:8])
	}
}

// TestConcurrent: writers, who each read back what they wrote, beside flushes and the
// freeing of segments, and what is there when the log is opened again.
func TestConcurrent(t *testing.T) {
	const writers, own, rounds = 4, 16, 150 // own sectors each
	fs := crashfs.New("/l")
	create(t, fs)
	l := mustOpen(t, fs, Info{})
	want := make(memory, writers*own*sector)
	var (
		reading sync.RWMutex // nobody reads while segments are freed
		freed   []Freed
		writing sync.WaitGroup
		others  sync.WaitGroup
		done    atomic.Bool
	)
	for w := range writers {
		writing.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(w), 6))
			mine := want[w*own*sector : (w+1)*own*sector]
			got := make([]byte, len(mine))
			for i := range rounds {
				at, n := rng.IntN(own), 1+rng.IntN(4)
				p := sectors(min(n, own-at), byte(1+i))
				copy(mine[at*sector:], p)
				if err := l.Write(p, int64(w*own+at)*sector); err != nil {
					t.Error(err)
					return
				}
				reading.RLock()
				err := l.ReadAt(make(memory, len(want)), got, int64(w*own)*sector)
				reading.RUnlock()
				if err != nil || !bytes.Equal(got, mine) {
					t.Errorf("writer %d, round %d: what was written is not there: %v", w, i, err)
					return
				}
			}
		})
	}
	others.Go(func() {
		for !done.Load() {
			if err := l.Flush(); err != nil {
				t.Error(err)
			}
		}
	})
	others.Go(func() {
		for more := true; more; {
			more = !done.Load()
			reading.Lock()
			if f, n := l.Dead(); n > 0 {
				freed = f
				if err := l.Free(f); err != nil {
					t.Error(err)
				}
			}
			reading.Unlock()
		}
	})
	writing.Wait()
	done.Store(true)
	others.Wait()
	if len(freed) == 0 {
		t.Error("no segment was freed")
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	l = mustOpen(t, fs, Info{Freed: freed})
	if got := read(t, l, make(memory, len(want))); !bytes.Equal(got, want) {
		t.Error("after it was opened again the log has something else")
	}
}
