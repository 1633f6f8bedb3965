package devicetest

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Load writes random blocks of a device and verifies what it reads, until
// Finish.
type Load struct {
	ops, longest atomic.Int64
	stop         atomic.Bool
	wg           sync.WaitGroup
}

// region is what a worker has for itself, in bytes.
const region = 2 << 20

// StartLoad has workers at a device of at least workers times 2 MiB. Each has a
// region of its own and knows what it wrote last to each block of it. A request
// that fails fails the test.
func StartLoad(t testing.TB, path string, workers int, seed uint64) *Load {
	t.Helper()
	l := &Load{}
	for w := range workers {
		f := Open(t, path, os.O_RDWR)
		buf, want := Aligned(t, 16*BlockSize), make([]byte, 16*BlockSize)
		rng := rand.New(rand.NewPCG(seed, uint64(w)))
		l.wg.Go(func() {
			defer f.Close()
			l.work(t, f, int64(w)*region, buf, want, rng)
		})
	}
	t.Cleanup(func() {
		l.stop.Store(true)
		l.wg.Wait()
	})
	return l
}

func (l *Load) work(t testing.TB, f *os.File, base int64, buf, want []byte, rng *rand.Rand) {
	const blocks = region / BlockSize
	var versions [blocks]uint64
	stamp := func(p []byte, block int) {
		for i := 0; i < len(p); i += 16 {
			binary.LittleEndian.PutUint64(p[i:], versions[block+i/BlockSize])
			binary.LittleEndian.PutUint64(p[i+8:], uint64(base)+uint64(block*BlockSize+i))
			if versions[block+i/BlockSize] == 0 {
				clear(p[i : i+16])
			}
		}
	}
	for version := uint64(1); !l.stop.Load(); version++ {
		n := 1 + rng.IntN(len(buf)/BlockSize)
		block := rng.IntN(blocks - n + 1)
		off, p, w := base+int64(block*BlockSize), buf[:n*BlockSize], want[:n*BlockSize]
		begin := time.Now()
		var err error
		switch rng.IntN(8) {
		case 0, 1, 2:
			if _, err = f.ReadAt(p, off); err == nil {
				if stamp(w, block); !bytes.Equal(p, w) {
					t.Errorf("read %d blocks at %d wrong", n, off)
					return
				}
			}
		case 3:
			for i := range n {
				versions[block+i] = 0
			}
			err = RangeIoctl(f, ZeroOut, off, int64(len(p)))
		case 4:
			err = unix.Fdatasync(int(f.Fd()))
		default:
			for i := range n {
				versions[block+i] = version
			}
			stamp(p, block)
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

// Requests is how many there were so far.
func (l *Load) Requests() int64 { return l.ops.Load() }

// Finish ends the load and says how many requests there were, and how long the
// slowest took.
func (l *Load) Finish() (ops int64, longest time.Duration) {
	l.stop.Store(true)
	l.wg.Wait()
	return l.ops.Load(), time.Duration(l.longest.Load())
}
