package readahead

import "math"

// writes are the writes to a source that have not ended. Manager.mu guards it.
type writes struct {
	chunks map[int64]int // by chunk
	all    int           // those of too many chunks to name them
}

// manyChunks is how many chunks a write may have for each to be named.
const manyChunks = 256

// at tells whether the chunk is being written to.
func (w *writes) at(index int64) bool { return w.all > 0 || w.chunks[index] > 0 }

// add adds n to the count of the writes to the chunks from first to last.
func (w *writes) add(first, last int64, n int) {
	if last-first >= manyChunks {
		w.all += n
		return
	}
	if w.chunks == nil {
		w.chunks = map[int64]int{}
	}
	for i := first; i <= last; i++ {
		if w.chunks[i] += n; w.chunks[i] == 0 {
			delete(w.chunks, i)
		}
	}
}

// BeginWrite says that n bytes at off of the source are about to change: what is
// kept of them is forgotten, what is being loaded of them is not kept, and nothing
// of them is loaded until EndWrite. Writes may overlap. h may be nil.
func (h *Handle) BeginWrite(off, n int64) {
	if h == nil || h.mode == None || n == 0 {
		return
	}
	first, last := off/ChunkBytes, lastChunk(off, n)
	h.m.mu.Lock()
	defer h.m.mu.Unlock()
	h.writes.add(first, last, 1)
	h.forgetLocked(first, last)
}

// EndWrite says that a write is done of which BeginWrite was told.
func (h *Handle) EndWrite(off, n int64) {
	if h == nil || h.mode == None || n == 0 {
		return
	}
	h.m.mu.Lock()
	defer h.m.mu.Unlock()
	h.writes.add(off/ChunkBytes, lastChunk(off, n), -1)
}

// Forget forgets all that is kept, and does not keep what is being loaded. h may
// be nil.
func (h *Handle) Forget() {
	if h == nil {
		return
	}
	h.m.mu.Lock()
	defer h.m.mu.Unlock()
	h.forgetLocked(0, math.MaxInt64/ChunkBytes)
}

// lastChunk is the chunk of the last of n bytes at off.
func lastChunk(off, n int64) int64 {
	if n > math.MaxInt64-off {
		return math.MaxInt64 / ChunkBytes
	}
	return (off + n - 1) / ChunkBytes
}

// forgetLocked drops the chunks of this Handle from first to last, of which nobody
// else has any. mu must be held.
func (h *Handle) forgetLocked(first, last int64) {
	if last-first < manyChunks {
		for i := first; i <= last; i++ {
			if c := h.m.chunks[key{h.own, i}]; c != nil {
				h.m.dropLocked(c)
			}
		}
		return
	}
	for k, c := range h.m.chunks {
		if k.owner == h.own && k.index >= first && k.index <= last {
			h.m.dropLocked(c)
		}
	}
}

// bitmap is a set of small numbers.
type bitmap []uint64

func (b bitmap) has(i int64) bool { return i/64 < int64(len(b)) && b[i/64]>>(i%64)&1 != 0 }

func (b *bitmap) add(i int64) {
	for int64(len(*b)) <= i/64 {
		*b = append(*b, 0)
	}
	(*b)[i/64] |= 1 << (i % 64)
}
