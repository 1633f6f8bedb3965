package merge

import (
	"io"
	"math"
	"slices"

	"github.com/snapmerge/snapmerge/pkg/cow"
)

// Load reads what uncommitted ops write of the blocks that p has room for, 64 at
// most, from block first on. Bit i of have tells that block first+i is there; the
// others' part of p is undefined. What is there is what readers of the layer see
// as long as no more than until ops are committed: merging does not change it, and
// guests may not write below the layer to a block that an uncommitted op writes
// (see Settled). Where such ops only write zeros nothing is there: reading them
// takes no time.
//
// With whole there is what all ops write, or, if one of them is committed, nothing,
// and until is 0; it is the same above every base. But where an ordered op is among
// them it goes on as without, and apart is true.
//
// As soon as any of the blocks is Promoted what was returned is not right any more,
// and from then on there is nothing; whoever keeps it has to ask. The caller is inside
// a stay of the Epoch.
func (l *Layer) Load(below io.ReaderAt, p []byte, first uint64, whole bool) (have, until uint64, apart bool, err error) {
	var (
		st    = l.state.Load()
		g     = gathering{below: below}
		room  [64]loadedOp
		worth = false
	)
	ops, err := l.opsOf(room[:0], first, first+uint64(len(p)/bs))
	if err != nil {
		return 0, 0, false, err
	}
	apart = whole && slices.ContainsFunc(ops, func(o loadedOp) bool { return o.op.Type.Ordered() })
	until = math.MaxUint64
	if len(ops) > 0 && l.Promoted(first, uint64(len(p)/bs)) {
		if whole && !apart {
			until = 0
		}
		return 0, until, apart, nil
	}
	for _, o := range ops {
		if o.pos < st.committed {
			if whole && !apart {
				return 0, 0, false, nil
			}
			continue
		}
		part := p[(o.from-first)*bs : (o.to-first)*bs]
		if err := l.readOp(st, &g, o.op, o.pos, part, int64(o.from-o.op.NewBlock)*bs); err != nil {
			return 0, 0, false, err
		}
		until = min(until, o.pos)
		have |= (1<<(o.to-o.from) - 1) << (o.from - first)
		worth = worth || o.op.Type != cow.Zero
	}
	if !worth {
		return 0, math.MaxUint64, apart, nil
	}
	if err := l.finish(&g); err != nil {
		return 0, 0, false, err
	}
	return have, until, apart, nil
}

// loadedOp is the part of an op that Load is after.
type loadedOp struct {
	op       cow.Op
	pos      uint64
	from, to uint64 // blocks
}

// opsOf appends the ops that write blocks from first up to end.
func (l *Layer) opsOf(list []loadedOp, first, end uint64) ([]loadedOp, error) {
	for b := first; b < end; {
		op, pos, ok, err := l.ops.Next(b)
		if err != nil {
			return nil, err
		}
		if !ok || op.NewBlock >= end {
			break
		}
		o := loadedOp{op: op, pos: pos, from: max(b, op.NewBlock), to: min(op.NewBlock+uint64(op.Blocks), end)}
		list = append(list, o)
		b = o.to
	}
	return list, nil
}

// Unwritten tells which of n blocks, 64 at most, from first on the merge may still
// write, or Promote: bit i stands for block first+i.
func (l *Layer) Unwritten(first, n uint64) (blocks uint64, err error) {
	committed := l.Committed()
	var room [64]loadedOp
	ops, err := l.opsOf(room[:0], first, first+n)
	for _, o := range ops {
		for b := o.from; o.pos >= committed && b < o.to; {
			promoted, n := false, o.to-b
			if !o.op.Type.Ordered() {
				promoted, n = l.promoted.Load().run(b, n)
			}
			if !promoted {
				blocks |= (1<<n - 1) << (b - first)
			}
			b += n
		}
	}
	return blocks, err
}
