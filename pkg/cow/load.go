package cow

import (
	"cmp"
	"errors"
	"math"
	"slices"
)

// errChanged says that two passes over the file did not see the same ops.
var errChanged = errors.New("the copy-on-write file changed while it was read")

// Load checks the whole file but the packed data and builds the merge list. It
// passes over the file three times, so that no more heap is needed on the way
// than the list takes in the end: one pass to check and count the ops, one to
// place them, one to fill them in. Nothing is allocated for an op that was not
// seen and found good by itself.
func (f *File) Load() (*Table, error) {
	l := loader{File: f, t: &Table{}}
	if err := l.count(); err != nil {
		return nil, err
	}
	if err := l.place(); err != nil {
		return nil, err
	}
	if err := l.fill(); err != nil {
		return nil, err
	}
	for _, check := range []func() error{l.checkOverlap, l.checkMix, l.checkOrder, l.checkProgress} {
		if err := check(); err != nil {
			return nil, err
		}
	}
	return l.t, nil
}

// loader builds a Table.
type loader struct {
	*File
	t *Table

	total    uint64 // ops that write blocks
	ordered  uint64 // those that are copy or xor
	sequence uint64 // sequence numbers
}

// pass runs one scan; passes after the first must see what the first saw.
func (l *loader) pass(op func(RawOp) error, sequence func(off int64, numbers []byte) error) error {
	s := scan{File: l.File, op: op, sequence: sequence}
	if err := s.run(); err != nil {
		return err
	}
	if l.t.identity == (Identity{}) {
		l.t.identity = s.identity()
	}
	if l.t.identity != s.identity() {
		return errChanged
	}
	return nil
}

// count is the first pass. It also sums the bounds.
func (l *loader) count() error {
	t := l.t
	err := l.pass(func(r RawOp) error {
		if !r.Type.writes() {
			return nil
		}
		if l.total == math.MaxUint32 {
			return badFormat(r.Offset, "more than %d ops that write blocks", uint32(math.MaxUint32))
		}
		l.total++
		if r.Type.Ordered() {
			l.ordered++
		}
		o := r.op()
		t.targetBlocks += uint64(o.Blocks)
		t.targetEnd = max(t.targetEnd, o.NewBlock+uint64(o.Blocks))
		t.sourceEnd = max(t.sourceEnd, o.sourceEnd())
		return nil
	}, func(off int64, numbers []byte) error {
		l.sequence += uint64(len(numbers) / sequenceNumber)
		return nil
	})
	if err != nil {
		return err
	}
	switch {
	case l.sequence > l.total:
		return l.sequenceError(l.total, "sequence has %d numbers for %d ops", l.sequence, l.total)
	case l.sequence > 0:
		t.first = int(l.sequence)
	case l.header.Major == 3:
		t.first = int(l.total)
	default:
		t.first = int(l.ordered)
	}
	return nil
}

// place is the second pass: it puts the new blocks into merge order and sorts
// the positions of the first part by block.
func (l *loader) place() error {
	t := l.t
	t.blocks = make([]uint32, l.total)
	t.packed = make([]packedOp, l.total)
	t.byBlock = make([]uint32, t.first)

	first, rest := 0, t.first
	if l.sequence > 0 {
		// The numbers first, so that the ops can be looked up in them.
		if err := l.readNumbers(); err != nil {
			return err
		}
		if err := l.sortFirst(); err != nil {
			return err
		}
		first = t.first
	}
	err := l.pass(func(r RawOp) error {
		switch {
		case !r.Type.writes():
			return nil
		case l.sequence > 0 && l.inFirst(r.NewBlock) >= 0:
			return nil
		case l.sequence == 0 && (l.header.Major == 3 || r.Type.Ordered()):
			if first == t.first {
				return errChanged
			}
			t.blocks[first] = uint32(r.NewBlock)
			first++
		default:
			if rest == len(t.blocks) {
				// There are ops to spare outside the sequence, so too few in it.
				return l.missingOp()
			}
			t.blocks[rest] = uint32(r.NewBlock)
			rest++
		}
		return nil
	}, nil)
	if err != nil {
		return err
	}
	if first != t.first {
		return errChanged
	}
	t.blocks, t.packed = t.blocks[:rest:rest], t.packed[:rest:rest]
	slices.Sort(t.blocks[t.first:])
	if l.sequence > 0 {
		return nil
	}
	return l.sortFirst()
}

// readNumbers fills the first part from the sequence.
func (l *loader) readNumbers() error {
	n := 0
	err := l.pass(nil, func(off int64, numbers []byte) error {
		for ; len(numbers) > 0; numbers = numbers[sequenceNumber:] {
			if n == l.t.first {
				return errChanged
			}
			l.t.blocks[n] = sequenceValue(numbers)
			n++
		}
		return nil
	})
	if err == nil && n != l.t.first {
		err = errChanged
	}
	return err
}

// sortFirst fills byBlock. The sort is done in packed, which is still empty,
// where the keys lie side by side.
func (l *loader) sortFirst() error {
	t := l.t
	keys := t.packed[:t.first]
	for i := range keys {
		keys[i] = packedOp{uint64(t.blocks[i])<<32 | uint64(i)}
	}
	slices.SortFunc(keys, func(a, b packedOp) int { return cmp.Compare(a[0], b[0]) })
	for i := range keys {
		t.byBlock[i] = uint32(keys[i][0])
	}
	clear(keys)
	for i := 1; i < t.first && l.sequence > 0; i++ {
		if t.blockInFirst(i) == t.blockInFirst(i-1) {
			return l.sequenceError(uint64(t.byBlock[i]), "sequence names block %d twice", t.blockInFirst(i))
		}
	}
	return nil
}

// inFirst returns the position in the first part of the op that starts at block,
// or -1.
func (l *loader) inFirst(block uint64) int {
	i := l.t.aboveInFirst(block) - 1
	if i < 0 || uint64(l.t.blockInFirst(i)) != block {
		return -1
	}
	return int(l.t.byBlock[i])
}

// fill is the last pass: it completes the ops.
func (l *loader) fill() error {
	t := l.t
	// Most files list their ops in merge order, or in a few runs of it, so the
	// place after the last one is tried before the search.
	next := 0
	err := l.pass(func(r RawOp) error {
		if !r.Type.writes() {
			return nil
		}
		pos := next
		if pos >= len(t.blocks) || uint64(t.blocks[pos]) != r.NewBlock {
			pos = l.startingAt(r.NewBlock)
		}
		if pos < 0 {
			return errChanged
		}
		if t.packed[pos] != (packedOp{}) {
			return badFormat(r.Offset, "block %d is written by more than one op", r.NewBlock)
		}
		t.packed[pos] = packOp(r.op())
		next = pos + 1
		return nil
	}, nil)
	if err != nil {
		return err
	}
	for _, p := range t.packed {
		if p == (packedOp{}) {
			return l.missingOp()
		}
	}
	return nil
}

// startingAt returns the position of the op that starts at block, or -1.
func (l *loader) startingAt(block uint64) int {
	if pos := l.inFirst(block); pos >= 0 {
		return pos
	}
	pos := l.t.aboveInRest(block) - 1
	if pos < l.t.first || uint64(l.t.blocks[pos]) != block {
		return -1
	}
	return pos
}

// missingOp says which number of the sequence has no op.
func (l *loader) missingOp() error {
	seen := l.t.packed
	clear(seen)
	err := l.pass(func(r RawOp) error {
		if pos := l.inFirst(r.NewBlock); r.Type.writes() && pos >= 0 {
			seen[pos] = packedOp{1}
		}
		return nil
	}, nil)
	if err != nil {
		return err
	}
	for pos := range l.sequence {
		if seen[pos] == (packedOp{}) {
			return l.sequenceError(pos, "sequence names block %d, which no op writes", l.t.blocks[pos])
		}
	}
	return errChanged
}

// sequenceError is a format error at the i-th number of the sequence.
func (l *loader) sequenceError(i uint64, format string, args ...any) error {
	var at, seen uint64
	err := l.pass(nil, func(off int64, numbers []byte) error {
		if n := uint64(len(numbers) / sequenceNumber); i >= seen && i < seen+n {
			at = uint64(off) + (i-seen)*sequenceNumber
		}
		seen += uint64(len(numbers) / sequenceNumber)
		return nil
	})
	if err != nil {
		return err
	}
	return badFormat(int64(at), format, args...)
}

// opError is a format error at the last op in the file that starts at block.
func (l *loader) opError(block uint32, format string, args ...any) error {
	var at int64
	err := l.pass(func(r RawOp) error {
		if r.Type.writes() && r.NewBlock == uint64(block) {
			at = r.Offset
		}
		return nil
	}, nil)
	if err != nil {
		return err
	}
	return badFormat(at, format, args...)
}
