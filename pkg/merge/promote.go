package merge

import (
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/snapmerge/snapmerge/pkg/blockio"
	"github.com/snapmerge/snapmerge/pkg/cow"
)

// DefaultChunkBlocks is the length of a chunk, what is promoted as one, in blocks:
// what the read-ahead loads as one.
const DefaultChunkBlocks = 16

// ErrCannotPromote says that a merge keeps its progress where there is no place for
// promotions: in the COW file.
var ErrCannotPromote = errors.New("nothing can be promoted in a merge in place")

// early is the state of promotion, which goes on beside Run.
type early struct {
	busy   sync.Mutex // held by Promote
	closed bool       // busy must be held
	loader *loader    // busy must be held; nil: not used yet

	// mu orders Run and Promote: no op is written by both at a time, and none by Run
	// after it was promoted.
	mu      sync.Mutex
	ended   sync.Cond // of mu: claims have been given up
	planned uint64    // ops before it may be on their way to the base by Run; 0: Run writes no independent op
	claims  claims

	bytes atomic.Uint64 // of the base that were promoted, of this layer
}

// claims are the chunks that are being promoted.
type claims struct {
	blocks uint64 // of a chunk
	chunks []uint64
}

func (c claims) touch(op cow.Op) bool {
	for _, chunk := range c.chunks {
		if op.NewBlock < (chunk+1)*c.blocks && op.NewBlock+uint64(op.Blocks) > chunk*c.blocks {
			return true
		}
	}
	return false
}

// take reserves the op at pos, and all before it, for Run, when none of its chunks is
// being promoted. What of it is promoted by then stays as it is until release.
func (e *early) take(op cow.Op, pos uint64) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for e.claims.touch(op) {
		e.ended.Wait()
	}
	e.planned = pos + 1
}

// release says that Run writes nothing any more.
func (e *early) release() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.planned = 0
}

// part is some blocks of what an op writes.
type part struct {
	op       cow.Op
	block, n uint64
}

// Promote merges chunks of the base out of turn: in each of them what independent ops
// write that are not committed. Run leaves that alone from then on. What ordered ops
// write stays as it is: these have their order. A chunk is passed over
//
//   - if an ordered op that is not committed reads one of the blocks;
//   - if Run is about to write one of them;
//   - if there is nothing to do.
//
// Layer.Promoted tells what was done. Promote may be called while Run is running, and
// by several goroutines. On an error nothing is promoted that was not before, but
// blocks may have been written, which is harmless: nobody reads them.
//
// The order of its steps, and why it loses nothing:
//
//	claim the chunks        Run waits for the end if it gets there
//	drain readers           those of an earlier state may read a block as the
//	                        source of an op that is committed by now
//	write base, flush base
//	write bits to the       a crash before this redoes the ops, after this it
//	journal, flush          does not; guests have not written to the blocks yet
//	publish the bits        readers go to the base now, and so do guests' writes,
//	                        which nothing that is still to come overwrites
func (m *Merger) Promote(chunks []uint64) error {
	j, ok := m.prog.(*Journal)
	if !ok {
		return ErrCannotPromote
	}
	e := &m.early
	e.busy.Lock()
	defer e.busy.Unlock()
	if e.closed || m.Done() {
		return nil
	}
	if m.layer.Committed() < m.cfg.Ops.Ordered() {
		if err := m.layer.FindSources(); err != nil {
			return err
		}
	}
	set, err := m.promotions(j)
	if err != nil {
		return err
	}
	claimed, parts, err := m.claim(set, chunks)
	defer m.unclaim()
	if err != nil || len(claimed) == 0 {
		return err
	}
	m.cfg.Epoch.Synchronize()
	if err := m.writeParts(parts); err != nil {
		return fmt.Errorf("promotion: %w", err)
	}
	if err := m.flushBase(); err != nil {
		return fmt.Errorf("promotion: %w", err)
	}
	blocks := make([]uint64, len(claimed))
	for _, p := range parts {
		i, _ := slices.BinarySearch(claimed, p.block/set.blocks)
		blocks[i] += p.n
	}
	m.counters.Flushes.Add(1)
	if err := j.putPromoted(set, claimed, blocks); err != nil {
		return fmt.Errorf("promotion: %w", err)
	}
	for i, chunk := range claimed {
		set.add(chunk)
		e.bytes.Add(blocks[i] * bs)
		m.counters.Promoted.Add(blocks[i] * bs)
	}
	return nil
}

// ChunkBlocks is the length of a chunk in blocks.
func (m *Merger) ChunkBlocks() uint64 {
	switch set := m.layer.promoted.Load(); {
	case set != nil:
		return set.blocks
	case m.cfg.ChunkBlocks != 0:
		return uint64(m.cfg.ChunkBlocks)
	}
	return DefaultChunkBlocks
}

// promotions is the layer's set, with a place in the journal. early.busy must be held.
func (m *Merger) promotions(j *Journal) (*chunkSet, error) {
	if set := m.layer.promoted.Load(); set != nil {
		return set, nil
	}
	blocks, _ := m.cfg.Ops.Bounds()
	size := m.ChunkBlocks()
	set, err := j.reservePromotions((blocks+size-1)/size, size)
	if err != nil {
		return nil, fmt.Errorf("room for promotions in the journal: %w", err)
	}
	m.layer.promoted.Store(set)
	return set, nil
}

// claim claims those of the chunks that can be promoted and returns them, sorted, with
// what is to be written, sorted by block.
func (m *Merger) claim(set *chunkSet, chunks []uint64) (claimed []uint64, parts []part, err error) {
	chunks = slices.Compact(slices.Sorted(slices.Values(chunks)))
	e := &m.early
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, chunk := range chunks {
		if set.has(chunk) || chunk >= uint64(len(set.words))*64 {
			continue
		}
		more, err := m.partsLocked(set, chunk, parts)
		if err != nil {
			return nil, nil, err
		}
		if len(more) > len(parts) {
			claimed, parts = append(claimed, chunk), more
		}
	}
	e.claims = claims{set.blocks, claimed}
	return claimed, parts, nil
}

func (m *Merger) unclaim() {
	e := &m.early
	e.mu.Lock()
	defer e.mu.Unlock()
	e.claims = claims{}
	e.ended.Broadcast()
}

// partsLocked appends the chunk's parts, none if it cannot be promoted. early.mu must
// be held.
func (m *Merger) partsLocked(set *chunkSet, chunk uint64, parts []part) ([]part, error) {
	ops, err := m.layer.opsOf(nil, chunk*set.blocks, (chunk+1)*set.blocks)
	if err != nil {
		return nil, err
	}
	var (
		committed = m.layer.Committed()
		ordered   = m.cfg.Ops.Ordered()
		before    = len(parts)
	)
	for _, o := range ops {
		n := o.to - o.from
		switch {
		case o.pos < committed, o.pos < ordered:
		case o.pos < m.early.planned, committed < ordered && m.layer.sources.Load().any(o.from, n):
			return parts[:before], nil
		default:
			parts = append(parts, part{o.op, o.from, n})
		}
	}
	return parts, nil
}

// writeParts writes parts, sorted by block, to the base. early.busy must be held.
func (m *Merger) writeParts(parts []part) error {
	e := &m.early
	if e.loader == nil {
		e.loader = newLoader(m.cfg.COW, &m.counters.BytesRead)
	}
	room := 0
	for _, p := range parts {
		room += p.op.Blocks * bs
	}
	arena, err := blockio.NewArena(room)
	if err != nil {
		return err
	}
	defer arena.Close()
	var (
		t   batch
		mem = arena.Bytes()[:room:room]
		out []byte // of the op before
	)
	for i, p := range parts {
		switch {
		case p.op.Type == cow.Zero:
			t.add(p.block, p.n, nil)
			continue
		case i == 0 || parts[i-1].op.NewBlock != p.op.NewBlock:
			n := p.op.Blocks * bs
			out, mem = mem[:n], mem[n:]
			t.load = append(t.load, payload{op: p.op, dst: out[:n:n]})
		}
		t.add(p.block, p.n, out[(p.block-p.op.NewBlock)*bs:])
	}
	if err := e.loader.load(t.load); err != nil {
		return err
	}
	if err := m.zeroBase(t.zeros); err != nil {
		return err
	}
	for _, w := range t.writes {
		if _, err := m.cfg.Base.WriteAt(w.Buf, w.Off); err != nil {
			return fmt.Errorf("write to the base: %w", err)
		}
		m.counters.BytesWritten.Add(uint64(len(w.Buf)))
		m.counters.BlocksWritten.Add(uint64(len(w.Buf)) / bs)
	}
	return nil
}

// closeEarly waits for a promotion and lets none begin.
func (m *Merger) closeEarly() {
	m.early.busy.Lock()
	defer m.early.busy.Unlock()
	m.early.closed = true
}
