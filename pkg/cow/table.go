package cow

import (
	"fmt"
	"sort"
)

// Ops is the merge list of a file: its ops without metadata, in the order in
// which they are merged. Blocks are those of the target image. Implementations
// are immutable and safe for concurrent use. Errors are those of reading an
// index; a *Table has none but positions out of range.
type Ops interface {
	// Len is the number of ops in the list.
	Len() uint64
	// Ordered is the number of ops at the front that are copy or xor; there are
	// none behind them.
	Ordered() uint64
	// TargetBlocks is the number of blocks written by all ops.
	TargetBlocks() uint64
	// Bounds returns the highest new block plus 1, and the first byte of the
	// source image past all bytes read.
	Bounds() (targetBlocks, sourceBytes uint64)
	// At returns the op at a position of the list, from 0.
	At(pos uint64) (Op, error)
	// Find returns the op that writes the block, and its position.
	Find(block uint64) (op Op, pos uint64, ok bool, err error)
	// Next returns the op that writes the block or, if none does, the one that
	// writes the nearest block above it.
	Next(block uint64) (op Op, pos uint64, ok bool, err error)
}

// Table is the merge list in memory: 20 bytes an op, and 4 more for those of
// the first part.
type Table struct {
	// first is the number of ops in the first part of the list: those named by
	// the sequence, or else copy and xor (versions 1 and 2) or all (version 3).
	// The ops behind them are sorted by block.
	first int
	// blocks holds the new block of each op, packed the rest of it, both in
	// merge order.
	blocks []uint32
	packed []packedOp
	// byBlock holds the positions of the first part, sorted by new block.
	byBlock []uint32

	ordered      uint64
	targetBlocks uint64
	targetEnd    uint64
	sourceEnd    uint64
	identity     Identity
}

var _ Ops = (*Table)(nil)

// packedOp is an op without its new block.
//
//	word bits
//	   0  0–47 source, 48–50 compression, 51–53 f (2^f blocks), 56–63 low bits of the data length
//	   1  0–47 data offset, 48–58 high bits of the data length, 61–63 type
//
// All zero is no op, since no type is 0.
type packedOp [2]uint64

func packOp(o Op) packedOp {
	factor := uint64(0)
	for 1<<factor < o.Blocks {
		factor++
	}
	length := uint64(o.DataLength)
	return packedOp{
		o.Source | uint64(o.Compression)<<48 | factor<<51 | length<<56,
		uint64(o.DataOffset) | length>>8<<48 | uint64(o.Type)<<61,
	}
}

func (p packedOp) unpack(block uint32) Op {
	return Op{
		Type:        p.typ(),
		Compression: Compression(p[0] >> 48 & 7),
		NewBlock:    uint64(block),
		Blocks:      p.blocks(),
		Source:      p[0] & (1<<48 - 1),
		DataOffset:  int64(p[1] & (1<<48 - 1)),
		DataLength:  int(p[0]>>56 | p[1]>>48&(1<<11-1)<<8),
	}
}

func (p packedOp) typ() OpType { return OpType(p[1] >> 61) }
func (p packedOp) blocks() int { return 1 << (p[0] >> 51 & 7) }

// Len implements Ops.
func (t *Table) Len() uint64 { return uint64(len(t.blocks)) }

// Ordered implements Ops.
func (t *Table) Ordered() uint64 { return t.ordered }

// TargetBlocks implements Ops.
func (t *Table) TargetBlocks() uint64 { return t.targetBlocks }

// Bounds implements Ops.
func (t *Table) Bounds() (targetBlocks, sourceBytes uint64) { return t.targetEnd, t.sourceEnd }

// Identity is that of the file, as File.Identity returns it.
func (t *Table) Identity() Identity { return t.identity }

// At implements Ops.
func (t *Table) At(pos uint64) (Op, error) {
	if pos >= t.Len() {
		return Op{}, fmt.Errorf("op %d of a list of %d", pos, t.Len())
	}
	return t.at(int(pos)), nil
}

func (t *Table) at(pos int) Op { return t.packed[pos].unpack(t.blocks[pos]) }

// Find implements Ops.
func (t *Table) Find(block uint64) (op Op, pos uint64, ok bool, err error) {
	if pos, ok := t.covering(block, t.aboveInFirst(block), t.aboveInRest(block)); ok {
		return t.at(pos), uint64(pos), true, nil
	}
	return Op{}, 0, false, nil
}

// Next implements Ops.
func (t *Table) Next(block uint64) (op Op, pos uint64, ok bool, err error) {
	i, j := t.aboveInFirst(block), t.aboveInRest(block)
	if pos, ok := t.covering(block, i, j); ok {
		return t.at(pos), uint64(pos), true, nil
	}
	switch {
	case i == t.first && j == len(t.blocks):
		return Op{}, 0, false, nil
	case i == t.first, j < len(t.blocks) && t.blocks[j] < t.blockInFirst(i):
		return t.at(j), uint64(j), true, nil
	}
	return t.at(int(t.byBlock[i])), uint64(t.byBlock[i]), true, nil
}

// blockInFirst is the i-th new block of the first part, by block.
func (t *Table) blockInFirst(i int) uint32 { return t.blocks[t.byBlock[i]] }

// aboveInFirst is the index in byBlock of the first op that starts above block.
func (t *Table) aboveInFirst(block uint64) int {
	return sort.Search(t.first, func(i int) bool { return uint64(t.blockInFirst(i)) > block })
}

// aboveInRest is the position of the first op behind the first part that starts
// above block.
func (t *Table) aboveInRest(block uint64) int {
	rest := t.blocks[t.first:]
	return t.first + sort.Search(len(rest), func(i int) bool { return uint64(rest[i]) > block })
}

// covering returns the position of the op that writes block, given what
// aboveInFirst and aboveInRest say. Ops do not overlap, so it can only be the
// one before either.
func (t *Table) covering(block uint64, i, j int) (pos int, ok bool) {
	if i > 0 && t.covers(int(t.byBlock[i-1]), block) {
		return int(t.byBlock[i-1]), true
	}
	if j > t.first && t.covers(j-1, block) {
		return j - 1, true
	}
	return 0, false
}

// covers tells whether the op at pos, which starts at or below block, writes it.
func (t *Table) covers(pos int, block uint64) bool {
	return block < uint64(t.blocks[pos])+uint64(t.packed[pos].blocks())
}
