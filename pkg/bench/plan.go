package bench

import (
	"math/rand/v2"
	"slices"

	"github.com/snapmerge/snapmerge/pkg/cow"
)

// op writes one block.
type op struct {
	typ    cow.OpType
	block  uint32
	source uint64 // byte of the base; copy and xor
}

// plan is what a Spec does, op by op, in merge order: ordered ops first.
type plan struct {
	ordered, independent []op
}

func newPlan(s Spec) *plan {
	rng := rand.New(rand.NewPCG(s.Seed, 0x6d65726765))
	p := &plan{}
	switch s.Workload {
	case CopyShift, CopyShiftDown:
		p.shift(s.Ops, s.Distance, s.Workload == CopyShift)
	case Incremental:
		p.incremental(rng, s.Size/bs, s.Ops)
	case Full:
		for b := range s.Size / bs {
			p.independent = append(p.independent, op{typ: cow.Replace, block: uint32(b)})
		}
	case RandCopy:
		blocks := rng.Perm(int(s.Size / bs))
		for i := range s.Ops {
			p.copy(int64(blocks[i]), int64(blocks[s.Ops+i]))
		}
	}
	return p
}

func (p *plan) copy(block, source int64) {
	p.ordered = append(p.ordered, op{cow.Copy, uint32(block), uint64(source) * bs})
}

func (p *plan) shift(n, distance int64, up bool) {
	for i := range n {
		if up {
			p.copy(n-1-i+distance, n-1-i)
		} else {
			p.copy(i, i+distance)
		}
	}
}

// maxExtent is the length of the longest extent of Incremental, in blocks.
const maxExtent = 64

// extent is a run of blocks that are changed alike.
type extent struct {
	typ      cow.OpType
	first, n int64
}

// incremental scatters extents of n blocks in all over an image.
func (p *plan) incremental(rng *rand.Rand, blocks, n int64) {
	extents := cutExtents(rng, n)
	// The blocks between extents, cut at random places.
	gaps := make([]int64, len(extents))
	for i := range gaps {
		gaps[i] = rng.Int64N(blocks - n + 1)
	}
	slices.Sort(gaps)
	before := int64(0)
	for i := range extents {
		extents[i].first = gaps[i] + before
		before += extents[i].n
	}
	m := mover{p: p, rng: rng, blocks: blocks, written: make([]bool, blocks)}
	for _, e := range extents {
		switch e.typ {
		case cow.Copy, cow.Xor:
			if m.move(e) {
				continue
			}
			e.typ = cow.Replace
			fallthrough
		default:
			for i := range e.n {
				p.independent = append(p.independent, op{typ: e.typ, block: uint32(e.first + i)})
			}
		}
	}
}

// cutExtents cuts n blocks into extents of random lengths and types that keep to
// the mix.
func cutExtents(rng *rand.Rand, n int64) []extent {
	types := []cow.OpType{cow.Copy, cow.Xor, cow.Replace, cow.Zero}
	left := []int64{0, n * 15 / 100, n * 20 / 100, n * 5 / 100}
	left[0] = n - left[1] - left[2] - left[3]
	var all []extent
	for n > 0 {
		k, at := 0, rng.Int64N(n) // a type as likely as it has blocks left
		for at >= left[k] {
			at -= left[k]
			k++
		}
		length := min(1+rng.Int64N(maxExtent), left[k])
		all = append(all, extent{typ: types[k], n: length})
		left[k] -= length
		n -= length
	}
	return all
}

// mover finds sources for extents.
type mover struct {
	p       *plan
	rng     *rand.Rand
	blocks  int64
	written []bool // by an ordered op so far
}

// move adds the ops of an extent that is copied, or like its source. Half of
// the sources are near by, so that ops overlap, half are anywhere. False: no
// place was found that is not overwritten by then.
func (m *mover) move(e extent) bool {
	for range 100 {
		source := m.rng.Int64N(m.blocks - e.n)
		if m.rng.IntN(2) == 0 {
			source = min(max(e.first+m.rng.Int64N(2*maxExtent+1)-maxExtent, 0), m.blocks-e.n-1)
		}
		shift := uint64(0)
		if e.typ == cow.Xor && m.rng.IntN(2) == 0 {
			shift = uint64(m.rng.IntN(bs)) // data that moved by some bytes
		}
		if e.typ == cow.Copy && source == e.first || slices.Contains(m.written[source:source+e.n+1], true) {
			continue
		}
		for i := range e.n {
			if source < e.first { // read before it is written
				i = e.n - 1 - i
			}
			m.p.ordered = append(m.p.ordered, op{e.typ, uint32(e.first + i), uint64(source+i)*bs + shift})
			m.written[e.first+i] = true
		}
		return true
	}
	return false
}
