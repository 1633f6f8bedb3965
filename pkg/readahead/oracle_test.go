package readahead

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// model is a layer that is merged while it is read and written. What a block
// holds is the number of the block, that of the layer, and a version; version 0 is
// what its op writes and says nothing of the layer.
type model struct {
	id        uint64
	pos       []uint64 // of the op that writes a block; none: never committed, no op
	committed atomic.Uint64
	shared    bool // loads are of all ops or nothing
	base      []atomic.Uint64
	acked     []atomic.Uint64 // last version that was acknowledged
}

const none = ^uint64(0)

func newModel(rng *rand.Rand, blocks int, id uint64, shared bool) *model {
	m := &model{id: id, shared: shared, pos: make([]uint64, blocks), base: make([]atomic.Uint64, blocks), acked: make([]atomic.Uint64, blocks)}
	order := rng.Perm(blocks)
	if shared { // such ops are merged in the order of the volume
		slices.Sort(order)
	}
	for pos, b := range order {
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

func put(p []byte, b int, version, id uint64) {
	if version == 0 {
		id = 0
	}
	for i, v := range []uint64{uint64(b), version, id} {
		binary.LittleEndian.PutUint64(p[8*i:], v)
	}
	copy(p[bs-24:], p[:24])
}

func (m *model) load(p []byte, first uint64) (got Loaded, err error) {
	committed := m.committed.Load()
	got.Until = none
	for i := range uint64(chunkBlocks) {
		b := first + i
		if b >= uint64(len(m.pos)) {
			continue
		}
		if m.pos[b] < committed {
			if m.shared {
				return Loaded{}, nil
			}
			continue
		}
		put(p[i*bs:], int(b), 0, m.id)
		got.Have |= 1 << i
		got.Until = min(got.Until, m.pos[b])
	}
	return got, nil
}

func (m *model) reader() Reader {
	return Reader{
		Committed: m.committed.Load,
		Direct: func(p []byte, off int64) error {
			committed := m.committed.Load()
			for i := 0; i < len(p); i += bs {
				b := (int(off) + i) / bs
				put(p[i:], b, m.get(b, committed), m.id)
			}
			return nil
		},
	}
}

// TestOracle: sequential and random readers, writers that write straight to what
// is committed, merges, expiry and closings, all at once, of one volume or of some
// that share what they read ahead: no read ever returns what was there before a
// write that had ended, nor another block's content, nor another volume's.
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
		volumes := 1 + round/2%3
		if err := oracle(cfg, volumes, rng); err != nil {
			t.Fatalf("round %d, %d volumes, %+v: %v", round, volumes, cfg, err)
		}
	}
}

func oracle(cfg Config, volumes int, rng *rand.Rand) error {
	const blocks = 60 * chunkBlocks
	m := NewManager(cfg)
	opsSeed := rng.Uint64() // the ops are the same in all volumes
	errs := make([]error, volumes)
	var wg sync.WaitGroup
	for i := range volumes {
		mod := newModel(rand.New(rand.NewPCG(opsSeed, 0)), blocks, uint64(i+1), volumes > 1)
		var share any
		if mod.shared {
			share = "snapshot"
		}
		h := m.Open("", Source{Share: share, Load: mod.load})
		seed := rng.Uint64()
		wg.Go(func() {
			errs[i] = mod.run(h, 6/volumes, rand.New(rand.NewPCG(seed, 0)))
			h.Close() // while others go on
		})
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		return err
	}
	s := m.Stats()
	if s.Memory > s.MemoryLimit || m.loaded != 0 || len(m.chunks) != 0 || len(m.owners) != 0 {
		return fmt.Errorf("%d bytes are in use, %d chunks after the end", s.Memory, m.loaded)
	}
	if s.Blocks == 0 || s.Hits == 0 || s.Shared == 0 && volumes > 1 && cfg.Memory >= 8*chunkLen || s.Shared > 0 && volumes == 1 {
		return fmt.Errorf("nothing was read ahead: %+v", s)
	}
	return m.Close()
}

// run reads, writes and merges a volume until it is merged.
func (m *model) run(h *Handle, readers int, rng *rand.Rand) error {
	blocks := len(m.pos)
	errs := make(chan error, readers)
	stop := make(chan struct{})
	var wg, merge, reading sync.WaitGroup
	mergeSeed := rng.Uint64()
	read := make(chan struct{}, 1) // a reader gets on
	gone := make(chan struct{})    // no reader is left
	merge.Go(func() {
		rng := rand.New(rand.NewPCG(mergeSeed, 3))
		at := make([]int, blocks) // block by position
		for b, pos := range m.pos {
			at[pos] = b
		}
		for done := 0; done < blocks; {
			n := min(blocks-done, 1+rng.IntN(20))
			for _, b := range at[done : done+n] {
				m.base[b].Store(0)
			}
			done += n
			m.committed.Store(uint64(done))
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
				if m.committed.Load() > m.pos[b] {
					m.base[b].Store(version)
					m.acked[b].Store(version)
				}
				runtime.Gosched() // the others have few processors
			}
		})
	}
	for i := range readers {
		seed := rng.Uint64()
		reading.Go(func() { errs <- m.read(h, rand.New(rand.NewPCG(seed, 2)), i%2 == 0, read, stop) })
	}
	wg.Go(func() { reading.Wait(); close(gone) })
	merge.Wait()
	close(stop)
	wg.Wait()
	close(errs)
	for err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
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
			block, version, id := binary.LittleEndian.Uint64(q), binary.LittleEndian.Uint64(q[8:]), binary.LittleEndian.Uint64(q[16:])
			if block != uint64(b+i) || version != 0 && id != m.id || string(q[:24]) != string(q[bs-24:]) {
				return fmt.Errorf("block %d is torn or block %d's of layer %d", b+i, block, id)
			}
			if version == none || version < least[i] {
				return fmt.Errorf("block %d has version %d though %d was written before", b+i, version, least[i])
			}
		}
		b += n
	}
}
