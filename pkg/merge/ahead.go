package merge

import (
	"io"
	"math"

	"golang.org/x/sync/errgroup"

	"github.com/snapmerge/snapmerge/pkg/blockio"
	"github.com/snapmerge/snapmerge/pkg/cow"
)

// loadDepth is how many scattered sources Load reads at a time.
const loadDepth = 8

// Load reads what uncommitted ops write of the blocks that p has room for, 64 at
// most, from block first on. Bit i of have tells that block first+i is there; the
// others' part of p is undefined. What is there is what readers of the layer see
// as long as no more than until ops are committed: merging does not change it, and
// guests may not write below the layer to a block that an uncommitted op writes
// (see Settled). Where such ops only write zeros nothing is there: reading them
// takes no time. With whole there is what all ops write, or, if one of them is
// committed, nothing, and until is 0. The caller is inside a stay of the Epoch.
func (l *Layer) Load(below io.ReaderAt, p []byte, first uint64, whole bool) (have, until uint64, err error) {
	type xor struct {
		op   cow.Op
		pos  uint64
		p    []byte
		skip int64
	}
	var (
		st      = l.state.Load()
		sources []blockio.Request
		run     = belowRun{below: below, later: &sources}
		xors    []xor
		worth   = false
	)
	until = math.MaxUint64
	for b, end := first, first+uint64(len(p)/bs); b < end; {
		op, pos, ok, err := l.ops.Next(b)
		if err != nil {
			return 0, 0, err
		}
		if !ok || op.NewBlock >= end {
			break
		}
		from, to := max(b, op.NewBlock), min(op.NewBlock+uint64(op.Blocks), end)
		b = to
		if pos < st.committed {
			if whole {
				return 0, 0, nil
			}
			continue
		}
		part, skip := p[(from-first)*bs:(to-first)*bs], int64(from-op.NewBlock)*bs
		if op.Type == cow.Xor && !st.inWindow(pos) {
			err = run.add(part, int64(op.Source)+skip)
			xors = append(xors, xor{op, pos, part, skip})
		} else {
			err = l.readOp(st, &run, op, pos, part, skip)
		}
		if err != nil {
			return 0, 0, err
		}
		until = min(until, pos)
		have |= (1<<(to-from) - 1) << (from - first)
		worth = worth || op.Type != cow.Zero
	}
	if !worth {
		return 0, math.MaxUint64, nil
	}
	if err := run.flush(); err != nil {
		return 0, 0, err
	}
	if err := readAll(below, sources); err != nil {
		return 0, 0, err
	}
	for _, x := range xors {
		if err := l.readers.xor(x.op, x.pos, x.p, x.skip); err != nil {
			return 0, 0, err
		}
	}
	return have, until, nil
}

// readAll does the reads, some at a time.
func readAll(r io.ReaderAt, reads []blockio.Request) error {
	if len(reads) == 1 {
		return readFull(r, reads[0].Buf, reads[0].Off)
	}
	var g errgroup.Group
	g.SetLimit(loadDepth)
	for _, q := range reads {
		g.Go(func() error { return readFull(r, q.Buf, q.Off) })
	}
	return g.Wait()
}
