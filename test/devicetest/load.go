package devicetest

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Load writes random blocks of a device, or of a file, and verifies what it reads,
// until Finish.
type Load struct {
	ops, longest atomic.Int64
	stop         atomic.Bool
	wg           sync.WaitGroup
	workers      []worker
}

// region is what a worker has for itself, in bytes.
const region = 2 << 20

// worker knows what it wrote last to each block of its region: the number of the
// request, 0 for zeros.
type worker struct {
	base     int64
	versions [region / BlockSize]uint64
	next     uint64 // request
}

// StartLoad has workers at a device of at least workers times 2 MiB, all zeros. Each
// has a region of its own. A request that fails fails the test. Of a file it makes one
// of that length.
func StartLoad(t testing.TB, path string, workers int, seed uint64) *Load {
	t.Helper()
	l := &Load{workers: make([]worker, workers)}
	for i := range l.workers {
		l.workers[i].base = int64(i) * region
		l.workers[i].next = 1
	}
	l.start(t, path, seed)
	return l
}

// Continue starts a load that knows what l, which is finished, wrote: on the same
// device, or on a copy.
func (l *Load) Continue(t testing.TB, path string, seed uint64) *Load {
	t.Helper()
	c := &Load{workers: slices.Clone(l.workers)}
	c.start(t, path, seed)
	return c
}

func (l *Load) start(t testing.TB, path string, seed uint64) {
	t.Helper()
	for i := range l.workers {
		f := Open(t, path, os.O_RDWR|os.O_CREATE)
		st, err := f.Stat()
		if err != nil {
			t.Fatal(err)
		}
		zero := func(off, n int64) error { return RangeIoctl(f, ZeroOut, off, n) }
		if st.Mode().IsRegular() {
			if size := int64(len(l.workers)) * region; st.Size() < size {
				if err := f.Truncate(size); err != nil {
					t.Fatal(err)
				}
			}
			zero = func(off, n int64) error {
				return unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
			}
		}
		buf, want := Aligned(t, 16*BlockSize), make([]byte, 16*BlockSize)
		rng := rand.New(rand.NewPCG(seed, uint64(i)))
		l.wg.Go(func() {
			defer f.Close()
			l.work(t, f, zero, &l.workers[i], buf, want, rng)
		})
	}
	t.Cleanup(func() {
		l.stop.Store(true)
		l.wg.Wait()
	})
}

// fill makes p what was written last from that block on.
func (w *worker) fill(p []byte, block int) {
	for i := 0; i < len(p); i += 16 {
		version := w.versions[block+i/BlockSize]
		binary.LittleEndian.PutUint64(p[i:], version)
		binary.LittleEndian.PutUint64(p[i+8:], uint64(w.base)+uint64(block*BlockSize+i))
		if version == 0 {
			clear(p[i : i+16])
		}
	}
}

func (l *Load) work(t testing.TB, f *os.File, zero func(off, n int64) error, w *worker, buf, want []byte, rng *rand.Rand) {
	for ; !l.stop.Load(); w.next++ {
		n := 1 + rng.IntN(len(buf)/BlockSize)
		block := rng.IntN(len(w.versions) - n + 1)
		off, p := w.base+int64(block*BlockSize), buf[:n*BlockSize]
		begin := time.Now()
		var err error
		switch rng.IntN(8) {
		case 0, 1, 2:
			if _, err = f.ReadAt(p, off); err == nil {
				if w.fill(want[:len(p)], block); !bytes.Equal(p, want[:len(p)]) {
					t.Errorf("read %d blocks at %d wrong", n, off)
					return
				}
			}
		case 3:
			clear(w.versions[block : block+n])
			err = zero(off, int64(len(p)))
		case 4:
			err = unix.Fdatasync(int(f.Fd()))
		default:
			for i := range n {
				w.versions[block+i] = w.next
			}
			w.fill(p, block)
			_, err = f.WriteAt(p, off)
		}
		if err != nil {
			t.Errorf("a request failed: %v", err)
			return
		}
		l.ops.Add(1)
		for took := int64(time.Since(begin)); ; {
			have := l.longest.Load()
			if took <= have || l.longest.CompareAndSwap(have, took) {
				break
			}
		}
	}
}

// Check compares the whole device, or file, with what the load, which is finished,
// wrote.
func (l *Load) Check(t testing.TB, path string) {
	t.Helper()
	f := Open(t, path, os.O_RDONLY)
	defer f.Close()
	buf, want := Aligned(t, region), make([]byte, region)
	for i := range l.workers {
		w := &l.workers[i]
		if _, err := f.ReadAt(buf, w.base); err != nil {
			t.Error(err)
			return
		}
		w.fill(want, 0)
		for off := 0; off < region; off += BlockSize {
			if !bytes.Equal(buf[off:off+BlockSize], want[off:off+BlockSize]) {
				t.Errorf("%s: the block at %d is not what was written last", path, w.base+int64(off))
				return
			}
		}
	}
}

// Requests is how many there were so far.
func (l *Load) Requests() int64 { return l.ops.Load() }

// Finish ends the load and says how many requests there were, and how long the
// slowest took.
func (l *Load) Finish() (ops int64, longest time.Duration) {
	l.stop.Store(true)
	l.wg.Wait()
	return l.ops.Load(), time.Duration(l.longest.Load())
}
