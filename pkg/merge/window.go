package merge

import (
	"cmp"
	"crypto/subtle"
	"fmt"
	"slices"

	"github.com/snapmerge/snapmerge/pkg/blockio"
	"github.com/snapmerge/snapmerge/pkg/cow"
)

// window is a run of ordered ops that is begun, written and committed as one.
// Once published it never changes, but for the fields that only the merge
// goroutine looks at.
type window struct {
	start, end uint64 // merge positions; all ordered
	// ops are sorted by the block they write, and the content of ops[i]'s block
	// is data[i*4096:], so that writes and most reads are contiguous.
	ops  []windowOp
	data []byte

	arena *blockio.Arena
	pool  *pool // that the arena goes back to; nil: it is the window's own
	begun bool  // recorded as in progress

	// What Journal.stage wrote for it.
	entries, payloadCRC uint32
}

type windowOp struct {
	cow.Op
	pos uint64
	// logged: a source of this op may be overwritten before the window is
	// committed, so that only the scratch space can tell its content once the
	// window is being written.
	logged bool
	// cloned: the block comes to share the space of its source. The window has no
	// data of it; until the commit it is read at its source, which nobody
	// overwrites.
	cloned bool
}

func (w *window) blockData(i int) []byte { return w.data[i*bs : (i+1)*bs : (i+1)*bs] }

// find returns the index of the op that writes the block.
func (w *window) find(block uint64) (int, bool) {
	return slices.BinarySearchFunc(w.ops, block, func(o windowOp, b uint64) int { return cmp.Compare(o.NewBlock, b) })
}

// block returns the final content of a block that the window writes, or nil if
// it does not write it or has no data of it.
func (w *window) block(block uint64) []byte {
	i, ok := w.find(block)
	if !ok || w.ops[i].cloned {
		return nil
	}
	return w.blockData(i)
}

func (w *window) free() {
	switch {
	case w.arena == nil:
	case w.pool == nil:
		w.arena.Close()
	default:
		w.pool.put(w.arena)
	}
	w.arena = nil
	w.data = nil
}

// commitsLater tells whether the window, the last one, need not be committed
// before the independent ops are written: redoing it reads no source.
func (w *window) commitsLater(ops cow.Ops) bool {
	return w.end == ops.Ordered() && w.end < ops.Len() && w.loggedOps() == len(w.ops)
}

// loggedOps counts the ops whose content has to be in the scratch space.
func (w *window) loggedOps() int {
	n := 0
	for i := range w.ops {
		if w.ops[i].logged {
			n++
		}
	}
	return n
}

// plan makes the window that starts at op start, of at most limit ordered ops.
// Without scratch it ends where redoing it would become unsafe. With scratch it
// ends there too if by then it is half full: two windows that log nothing write
// less than one that logs half of its blocks.
//
// If independent ops follow the last window it logs all of its blocks. They may
// overwrite its sources then before it is committed, so its commit need not come
// first.
func plan(ops cow.Ops, start uint64, limit int, scratch bool) (*window, error) {
	end := min(ops.Ordered(), start+uint64(limit))
	cut, err := cutAtOverlap(ops, start, end)
	if err != nil {
		return nil, err
	}
	if !scratch || cut-start >= uint64(limit)/2 {
		end = cut
	}
	w, err := planRange(ops, start, end)
	if err == nil && scratch && end == ops.Ordered() && end < ops.Len() {
		for i := range w.ops {
			w.ops[i].logged = true
		}
	}
	return w, err
}

// cutAtOverlap returns the end of the longest window from start in which no op
// overwrites what another one reads. A single op that reads its own block ends
// up alone, still needing scratch.
func cutAtOverlap(ops cow.Ops, start, end uint64) (uint64, error) {
	read := make(map[uint64]struct{})
	for pos := start; pos < end; pos++ {
		op, err := ops.At(pos)
		if err != nil {
			return 0, err
		}
		if _, hit := read[op.NewBlock]; hit {
			return pos, nil
		}
		if readsOwnBlock(op) {
			return max(pos, start+1), nil
		}
		first, n := op.SourceBlocks()
		for i := range uint64(n) {
			read[first+i] = struct{}{}
		}
	}
	return end, nil
}

// readsOwnBlock tells whether redoing the op alone gives something else. A copy
// onto itself doesn't.
func readsOwnBlock(op cow.Op) bool {
	first, n := op.SourceBlocks()
	return op.Type == cow.Xor && op.NewBlock >= first && op.NewBlock < first+uint64(n)
}

// copiesOntoItself tells whether the op changes nothing.
func copiesOntoItself(op cow.Op) bool { return op.Type == cow.Copy && op.Source == op.NewBlock }

// planRange makes the window of exactly the ops from start to end.
func planRange(ops cow.Ops, start, end uint64) (*window, error) {
	w := &window{start: start, end: end, ops: make([]windowOp, 0, end-start)}
	for pos := start; pos < end; pos++ {
		op, err := ops.At(pos)
		if err != nil {
			return nil, err
		}
		if !op.Type.Ordered() {
			return nil, fmt.Errorf("%w: op %d of the window %d to %d is not an ordered op", ErrMismatch, pos, start, end)
		}
		w.ops = append(w.ops, windowOp{Op: op, pos: pos})
	}
	slices.SortFunc(w.ops, func(a, b windowOp) int { return cmp.Compare(a.NewBlock, b.NewBlock) })
	for i := range w.ops {
		if copiesOntoItself(w.ops[i].Op) {
			continue
		}
		first, n := w.ops[i].SourceBlocks()
		for k := range uint64(n) {
			if _, hit := w.find(first + k); hit {
				w.ops[i].logged = true
			}
		}
	}
	return w, nil
}

// alloc gives the window memory of its own.
func (w *window) alloc() (err error) {
	n := len(w.ops) * bs
	if w.arena, err = blockio.NewArena(n); err != nil {
		return err
	}
	w.data = w.arena.Bytes()
	return nil
}

// allocFrom gives the window memory of a pool, for whose windows it must not be
// too long.
func (w *window) allocFrom(p *pool, stop <-chan struct{}) (err error) {
	if w.arena, err = p.get(stop); err != nil {
		return err
	}
	w.pool, w.data = p, w.arena.Bytes()[:len(w.ops)*bs]
	return nil
}

// fill gives the window its data: blocks found in logged from there, all others
// from their sources in the base and the payload in the COW. The window must
// have memory.
func (m *Merger) fill(w *window, q blockio.Queue, logged map[uint64][]byte) error {
	var reads, unaligned []int // indices into w.ops
	for i := range w.ops {
		op := &w.ops[i]
		if b, ok := logged[op.NewBlock]; ok {
			copy(w.blockData(i), b)
			op.logged = true
			continue
		}
		if op.cloned {
			continue
		}
		if op.logged && logged != nil {
			return fmt.Errorf("%w: block %d of the window in progress is not in the scratch space", ErrDamaged, op.NewBlock)
		}
		if op.Type == cow.Xor && op.Source%bs != 0 {
			unaligned = append(unaligned, i)
		} else {
			reads = append(reads, i)
		}
	}
	if err := m.readSources(w, q, reads); err != nil {
		return err
	}
	if err := m.readUnaligned(w, q, unaligned); err != nil {
		return err
	}
	return m.applyXor(w, logged)
}

func sourceByte(op cow.Op) int64 {
	if op.Type == cow.Xor {
		return int64(op.Source)
	}
	return int64(op.Source) * bs
}

// readSources reads whole source blocks into their places, in the order of the
// sources, runs joined.
func (m *Merger) readSources(w *window, q blockio.Queue, idx []int) error {
	slices.SortFunc(idx, func(a, b int) int {
		return cmp.Compare(sourceByte(w.ops[a].Op), sourceByte(w.ops[b].Op))
	})
	var batch []blockio.Request
	last := -1
	for _, i := range idx {
		off := sourceByte(w.ops[i].Op)
		if n := len(batch) - 1; n >= 0 && i == last+1 && off == batch[n].Off+int64(len(batch[n].Buf)) && len(batch[n].Buf) < requestBytes {
			b := &batch[n]
			b.Buf = b.Buf[:len(b.Buf)+bs]
		} else {
			// Capacity up to the end of the window lets the run grow in place.
			batch = append(batch, blockio.Request{Buf: w.data[i*bs : (i+1)*bs], Off: off})
		}
		last = i
	}
	m.counters.BytesRead.Add(uint64(len(idx)) * bs)
	if err := q.Read(m.cfg.Base, batch); err != nil {
		return fmt.Errorf("read of sources: %w", err)
	}
	return nil
}

// unalignedBatch bounds the extra memory for sources that straddle two blocks.
const unalignedBatch = 256

func (m *Merger) readUnaligned(w *window, q blockio.Queue, idx []int) error {
	if len(idx) == 0 {
		return nil
	}
	arena, err := blockio.NewArena(min(len(idx), unalignedBatch) * 2 * bs)
	if err != nil {
		return err
	}
	defer arena.Close()
	for part := range slices.Chunk(idx, unalignedBatch) {
		batch := make([]blockio.Request, len(part))
		for k, i := range part {
			batch[k] = blockio.Request{Buf: arena.Bytes()[k*2*bs : (k+1)*2*bs], Off: int64(w.ops[i].Source) / bs * bs}
		}
		if err := q.Read(m.cfg.Base, batch); err != nil {
			return fmt.Errorf("read of sources: %w", err)
		}
		m.counters.BytesRead.Add(uint64(len(part)) * 2 * bs)
		for k, i := range part {
			skip := int(w.ops[i].Source % bs)
			copy(w.blockData(i), batch[k].Buf[skip:skip+bs])
		}
	}
	return nil
}

// applyXor decodes the payloads of the xor ops that were read from their sources.
func (m *Merger) applyXor(w *window, logged map[uint64][]byte) error {
	var ops []payload
	room := 0
	for i := range w.ops {
		op := w.ops[i].Op
		if _, done := logged[op.NewBlock]; done || op.Type != cow.Xor {
			continue
		}
		p := payload{op: op, dst: w.blockData(i), xor: true}
		if room += p.room(); room > storedBytes {
			if err := m.loader.load(ops); err != nil {
				return err
			}
			ops, room = ops[:0], p.room()
		}
		ops = append(ops, p)
	}
	return m.loader.load(ops)
}

// writes are the transfers that put the window into the base.
func (w *window) writes() []blockio.Request {
	var batch []blockio.Request
	for i := range w.ops {
		if w.ops[i].cloned {
			continue
		}
		off := int64(w.ops[i].NewBlock) * bs
		if n := len(batch) - 1; n >= 0 && off == batch[n].Off+int64(len(batch[n].Buf)) && len(batch[n].Buf) < requestBytes {
			batch[n].Buf = batch[n].Buf[:len(batch[n].Buf)+bs]
			continue
		}
		batch = append(batch, blockio.Request{Buf: w.data[i*bs : (i+1)*bs], Off: off})
	}
	return batch
}

// xorBytes xors src into dst.
func xorBytes(dst, src []byte) { subtle.XORBytes(dst, dst, src) }
