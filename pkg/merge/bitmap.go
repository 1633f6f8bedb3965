package merge

import "math/bits"

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
