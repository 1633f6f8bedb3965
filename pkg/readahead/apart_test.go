package readahead

import "testing"

// TestApart: of a shared layer the chunks that are different in each volume are
// loaded by each, at its own time, and the others for all.
func TestApart(t *testing.T) {
	list := newEnvs(t, async(), "s", "s")
	a, b := list[0], list[1]
	for _, e := range list {
		e.apart[0], e.apart[3] = true, true
	}
	a.read(0, bs)
	a.read(bs, bs)
	a.wantLoads(0, 1, 2, 3, 4, 5, 6, 7, 8)
	b.read(0, bs)
	for off := int64(bs); off < 7*chunkLen; off += bs {
		b.wantDirect(b.read(off, bs), 0)
	}
	b.wantLoads(0, 3)
	// What one has merged the other one has not.
	a.committed = 2
	a.wantDirect(a.read(2*bs, bs), 1)
	b.wantDirect(b.read(2*bs, bs), 0)
	a.wantDirect(a.read(3*chunkLen, bs), 1)
	b.wantDirect(b.read(3*chunkLen, bs), 0)
	a.wantDirect(a.read(4*chunkLen, bs), 1)
	b.wantDirect(b.read(4*chunkLen, bs), 0)
	a.h.Close()
	b.wantDirect(b.read(3*chunkLen+bs, bs), 0)
	if n := b.m.chunks[key{b.h.all, 3}]; n != nil {
		t.Error("a chunk that is apart is shared")
	}
}
