package readahead

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// model is a layer that is merged while it is read and written. What a block
// holds is the number of the block and a version; version 0 is what its op writes.
type model struct {
	pos       []uint64 // of the op that writes a block; none: never committed, no op
	committed atomic.Uint64
	base      []atomic.Uint64
	acked     []atomic.Uint64 // last version that was acknowledged
}

const none = ^uint64(0)

func newModel(rng *rand.Rand, blocks int) *model {
	m := &model{pos: make([]uint64, blocks), base: make([]atomic.Uint64, blocks), acked: make([]atomic.Uint64, blocks)}
	for pos, b := range rng.Perm(blocks) {
		m.pos[b] = uint64(pos)
		m.base[b].Store(none) // rubbish, until it is merged
	}
	return m
}

// get is the content of a block as a reader of the layer finds it who has seen
// that many ops committed.
func (m *model) get(b int, committed uint64) uint64 {
	if m.pos[b] >= committed {
		return 0
	}
	return m.base[b].Load()
}

func put(p []byte, b int, version uint64) {
	binary.LittleEndian.PutUint64(p, uint64(b))
	binary.LittleEndian.PutUint64(p[8:], version)
	copy(p[bs-16:], p[:16])
}

func (m *model) load(p []byte, first uint64) (have, until uint64, err error) {
	committed := m.committed.Load()
	until = none
	for i := range uint64(chunkBlocks) {
		b := first + i
		if b >= uint64(len(m.pos)) || m.pos[b] < committed {
			continue
		}
		put(p[i*bs:], int(b), 0)
		have |= 1 << i
		until = min(until, m.pos[b])
	}
	return have, until, nil
}

func (m *model) reader() Reader {
	return Reader{
		Committed: m.committed.Load,
		Direct: func(p []byte, off int64) error {
			committed := m.committed.Load()
			for i := 0; i < len(p); i += bs {
				b := (int(off) + i) / bs
				put(p[i:], b, m.get(b, committed))
			}
			return nil
		},
	}
}

// TestOracle: sequential and random readers, writers that write straight to what
// is committed, a merge, expiry and closings, all at once: no read ever returns
// what was there before a write that had ended, nor another block's content.
func TestOracle(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rounds := 12
	if testing.Short() {
		rounds = 4
	}
	for round := range rounds {
		rng := rand.New(rand.NewPCG(seed, uint64(round)))
		cfg := Config{Mode: Modes[1+round%2], Memory: int64(1+rng.IntN(40)) * chunkLen, Window: int64(1+rng.IntN(8)) * chunkLen,
			MaxWindow: int64(rng.IntN(16)) * chunkLen, Batch: int64(1+rng.IntN(4)) * chunkLen, Expiry: time.Millisecond}
		if err := oracle(cfg, rng); err != nil {
			t.Fatalf("round %d, %+v: %v", round, cfg, err)
		}
	}
}

func oracle(cfg Config, rng *rand.Rand) error {
	const blocks = 60 * chunkBlocks
	mod := newModel(rng, blocks)
	m := NewManager(cfg)
	h := m.Open("", mod.load)
	errs := make(chan error, 16)
	stop := make(chan struct{})
	var wg, merge, readers sync.WaitGroup
	mergeSeed := rng.Uint64()
	read := make(chan struct{}, 1) // a reader gets on
	gone := make(chan struct{})    // no reader is left
	merge.Go(func() {
		rng := rand.New(rand.NewPCG(mergeSeed, 3))
		at := make([]int, blocks) // block by position
		for b, pos := range mod.pos {
			at[pos] = b
		}
		for done := 0; done < blocks; {
			n := min(blocks-done, 1+rng.IntN(20))
			for _, b := range at[done : done+n] {
				mod.base[b].Store(0)
			}
			done += n
			mod.committed.Store(uint64(done))
			select { // or all is merged before the first read
			case <-read:
			case <-gone:
			}
		}
	})
	for i := range 2 { // each writes its own blocks
		seed := rng.Uint64()
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(seed, 1))
			for version := uint64(1); ; version++ {
				select {
				case <-stop:
					return
				default:
				}
				b := rng.IntN(blocks/2)*2 + i
				if mod.committed.Load() > mod.pos[b] {
					mod.base[b].Store(version)
					mod.acked[b].Store(version)
				}
			}
		})
	}
	for i := range 6 {
		seed := rng.Uint64()
		readers.Go(func() { errs <- mod.read(h, rand.New(rand.NewPCG(seed, 2)), i%2 == 0, read, stop) })
	}
	wg.Go(func() { readers.Wait(); close(gone) })
	merge.Wait()
	close(stop)
	wg.Wait()
	h.Close()
	if s := m.Stats(); s.Memory > s.MemoryLimit+8*chunkLen || m.loaded != 0 {
		return fmt.Errorf("%d bytes are in use, %d chunks after the end", s.Memory, m.loaded)
	}
	if s := m.Stats(); s.Blocks == 0 || s.Hits == 0 {
		return fmt.Errorf("nothing was read ahead: %+v", s)
	}
	close(errs)
	for err := range errs {
		if err != nil {
			return err
		}
	}
	return m.Close()
}

// read reads until stop is closed, in sequence or anywhere, and tells of its
// progress after each read, whether it was right or not: the merge waits for it.
func (m *model) read(h *Handle, rng *rand.Rand, sequential bool, progress chan<- struct{}, stop <-chan struct{}) error {
	blocks := len(m.pos)
	p := make([]byte, 40*bs)
	least := make([]uint64, 40)
	for b := 0; ; {
		select {
		case <-stop:
			return nil
		default:
		}
		n := 1 + rng.IntN(40)
		if !sequential || b >= blocks || rng.IntN(100) == 0 {
			b = rng.IntN(blocks)
		}
		n = min(n, blocks-b)
		for i := range n {
			least[i] = m.acked[b+i].Load()
		}
		_, err := h.Read(m.reader(), p[:n*bs], int64(b)*bs)
		select {
		case progress <- struct{}{}:
		default:
		}
		if err != nil {
			return err
		}
		for i := range n {
			q := p[i*bs : (i+1)*bs]
			block, version := binary.LittleEndian.Uint64(q), binary.LittleEndian.Uint64(q[8:])
			if block != uint64(b+i) || string(q[:16]) != string(q[bs-16:]) {
				return fmt.Errorf("block %d is torn or block %d's", b+i, block)
			}
			if version == none || version < least[i] {
				return fmt.Errorf("block %d has version %d though %d was written before", b+i, version, least[i])
			}
		}
		b += n
	}
}
