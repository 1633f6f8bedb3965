package merge

import (
	"math/bits"
	"sync/atomic"
)

// bitmap is a set of block numbers below a bound.
type bitmap struct{ words []uint64 }

func newBitmap(n uint64) bitmap { return bitmap{words: make([]uint64, (n+63)/64)} }

func (b bitmap) set(i uint64) { b.words[i/64] |= 1 << (i % 64) }

// any tells whether one of the n numbers from first is in the set; numbers at
// or above the bound are not.
func (b bitmap) any(first, n uint64) bool {
	for end := min(first+n, uint64(len(b.words))*64); first < end; {
		w := b.words[first/64] >> (first % 64)
		if w == 0 {
			first = first/64*64 + 64
			continue
		}
		return first+uint64(bits.TrailingZeros64(w)) < end
	}
	return false
}

// chunkSet is a set of chunks of the base: runs of blocks of one length, from
// block 0 on. Chunks are only ever added, while others look. A nil set is empty.
type chunkSet struct {
	blocks uint64 // of a chunk
	words  []atomic.Uint64
}

// newChunkSet makes a set with room for that many chunks.
func newChunkSet(chunks, blocks uint64) *chunkSet {
	return &chunkSet{blocks: blocks, words: make([]atomic.Uint64, (chunks+63)/64)}
}

func (s *chunkSet) add(chunk uint64) { s.words[chunk/64].Or(1 << (chunk % 64)) }

func (s *chunkSet) has(chunk uint64) bool {
	return s != nil && chunk/64 < uint64(len(s.words)) && s.words[chunk/64].Load()>>(chunk%64)&1 != 0
}

// run tells whether the chunk of the block is in the set, and for how many of the n
// blocks from there on, n > 0, the answer is the same.
func (s *chunkSet) run(block, n uint64) (in bool, length uint64) {
	if s == nil {
		return false, n
	}
	chunk, end := block/s.blocks, block+n
	in = s.has(chunk)
	for chunk++; chunk*s.blocks < end && s.has(chunk) == in; chunk++ {
	}
	return in, min(chunk*s.blocks, end) - block
}

// all tells whether the chunks of the n blocks from first on are in the set, n > 0.
func (s *chunkSet) all(first, n uint64) bool {
	in, length := s.run(first, n)
	return in && length == n
}

// any tells whether one of the chunks of the n blocks from first on is, n > 0.
func (s *chunkSet) any(first, n uint64) bool {
	in, length := s.run(first, n)
	return in || length < n
}
