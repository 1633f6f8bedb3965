package readahead

import (
	"encoding/binary"
	"fmt"
	"math"
	"math/rand/v2"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// TestWrite: nothing that was read before a write, or while it went on, is kept,
// whatever the length of the write.
func TestWrite(t *testing.T) {
	for name, n := range map[string]int64{"a block": bs, "two chunks": chunkLen + bs, "all": math.MaxInt64 - 2*chunkLen} {
		t.Run(name, func(t *testing.T) {
			e := newEnv(t, async())
			e.read(chunkLen, bs)
			e.read(chunkLen+bs, bs)
			e.drain()
			e.wantDirect(e.read(2*chunkLen, bs), 0)
			e.h.BeginWrite(2*chunkLen, n)
			e.h.BeginWrite(2*chunkLen, bs)
			e.wantDirect(e.read(2*chunkLen, bs), 1)
			e.wantDirect(e.read(2*chunkLen+bs, bs), 1)
			e.wantDirect(e.read(chunkLen, bs), 0)
			e.h.EndWrite(2*chunkLen, n)
			e.wantDirect(e.read(2*chunkLen+2*bs, bs), 1)
			e.h.EndWrite(2*chunkLen, bs)
			if len(e.h.writes.chunks) != 0 || e.h.writes.all != 0 {
				t.Errorf("writes that have ended are left: %+v", e.h.writes)
			}
			e.read(2*chunkLen+3*bs, bs)
			e.wantDirect(e.read(2*chunkLen+4*bs, bs), 0)
		})
	}
	var h *Handle // of a volume that is not read ahead
	h.BeginWrite(0, bs)
	h.EndWrite(0, bs)
	h.Forget()
}

// TestWriteLoading: what is being loaded when a write begins is not kept.
func TestWriteLoading(t *testing.T) {
	e := newEnv(t, async())
	e.read(0, bs)
	load := e.h.load
	e.h.load = func(p []byte, first uint64) (Loaded, error) {
		if first == chunkBlocks {
			e.h.BeginWrite(chunkLen, bs)
			e.h.EndWrite(chunkLen, bs)
		}
		return load(p, first)
	}
	e.read(bs, bs)
	e.drain()
	e.wantDirect(e.read(chunkLen, bs), 1)
	e.wantDirect(e.read(2*chunkLen, bs), 0)
	e.h.Forget()
	e.wantDirect(e.read(2*chunkLen+bs, bs), 1)
}

// TestOracleWrites: readers, in sequence or not, and writers, who write the same
// blocks: no read returns what was there before a write that had ended.
func TestOracleWrites(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	const blocks = 40 * chunkBlocks
	for round, mode := range []Mode{Sync, Async} {
		m := NewManager(Config{Mode: mode, Memory: 12 * chunkLen, Window: 3 * chunkLen, Expiry: time.Millisecond})
		var is, acked [blocks]atomic.Uint64
		read := func(p []byte, first int) {
			for i := 0; i < len(p); i += bs {
				binary.LittleEndian.PutUint64(p[i:], is[first+i/bs].Load())
			}
		}
		h := m.Open("", Source{Load: func(p []byte, first uint64) (got Loaded, err error) {
			n := max(min(len(p)/bs, blocks-int(first)), 0)
			read(p[:n*bs], int(first))
			runtime.Gosched() // others may write meanwhile
			return Loaded{Have: 1<<n - 1, Until: math.MaxUint64}, nil
		}})
		r := Reader{Committed: func() uint64 { return 0 }, Direct: func(p []byte, off int64) error { read(p, int(off/bs)); return nil }}
		var readers, writers sync.WaitGroup
		stop := make(chan struct{})
		for i := range 2 { // each writes its own blocks
			rng := rand.New(rand.NewPCG(seed, uint64(i)))
			writers.Go(func() {
				for version := uint64(1); ; version++ {
					select {
					case <-stop:
						return
					default:
					}
					b := rng.IntN(blocks/2)*2 + i
					h.BeginWrite(int64(b)*bs, bs)
					runtime.Gosched()
					is[b].Store(version)
					runtime.Gosched()
					h.EndWrite(int64(b)*bs, bs)
					acked[b].Store(version)
				}
			})
		}
		errs := make(chan error, 4)
		for i := range 4 {
			rng := rand.New(rand.NewPCG(seed, uint64(10*round+i+2)))
			readers.Go(func() {
				p, least, b := make([]byte, 20*bs), make([]uint64, 20), 0
				for range 6000 {
					if i == 0 || b == blocks {
						b = rng.IntN(blocks)
					}
					n := min(1+rng.IntN(20), blocks-b)
					for k := range n {
						least[k] = acked[b+k].Load()
					}
					if _, err := h.Read(r, p[:n*bs], int64(b)*bs); err != nil {
						errs <- err
						return
					}
					for k := range n {
						if v := binary.LittleEndian.Uint64(p[k*bs:]); v < least[k] {
							errs <- fmt.Errorf("%s: block %d has version %d though %d was written before", mode, b+k, v, least[k])
							return
						}
					}
					b += n
				}
			})
		}
		readers.Wait()
		close(stop)
		writers.Wait()
		select {
		case err := <-errs:
			t.Fatal(err)
		default:
		}
		if s := m.Stats(); s.Hits < 100 {
			t.Errorf("%+v", s)
		}
		h.Close()
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	}
}
