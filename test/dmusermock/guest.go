package dmusermock

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"testing"
	"time"
)

const block = 4096

// Guest works on a part of the target's device and knows what it wrote last to
// each block of it, which begins as zeros.
type Guest struct {
	Target *Target
	Base   int64 // of its part, in bytes
	Blocks int
	Most   int // blocks in a request
	Rng    *rand.Rand

	versions []uint64
	version  uint64
}

// Step carries out a random request, and tells how long it took; false: it went
// wrong.
func (g *Guest) Step(t testing.TB) (time.Duration, bool) {
	if g.versions == nil {
		g.versions = make([]uint64, g.Blocks)
	}
	g.version++
	n := 1 + g.Rng.IntN(g.Most)
	first := g.Rng.IntN(g.Blocks - n + 1)
	off, p := g.Base+int64(first)*block, make([]byte, n*block)
	begin := time.Now()
	var err error
	switch g.Rng.IntN(8) {
	case 0, 1, 2:
		if err = <-g.Target.Submit(Read, 0, off, p); err == nil && !bytes.Equal(p, g.content(first, n)) {
			t.Errorf("read of %d blocks at %d wrong", n, off)
			return 0, false
		}
	case 3:
		err = <-g.Target.Submit(Write, Preflush, 0, nil)
	default:
		for i := range n {
			g.versions[first+i] = g.version
		}
		err = <-g.Target.Submit(Write, uint64(g.Rng.IntN(2))*FUA, off, g.content(first, n))
	}
	if err != nil {
		t.Errorf("a request failed: %v", err)
	}
	return time.Since(begin), err == nil
}

// content is what the blocks hold.
func (g *Guest) content(first, n int) []byte {
	p := make([]byte, n*block)
	for i := 0; i < len(p); i += 16 {
		b := first + i/block
		if g.versions[b] == 0 {
			continue
		}
		binary.LittleEndian.PutUint64(p[i:], g.versions[b])
		binary.LittleEndian.PutUint64(p[i+8:], uint64(g.Base)+uint64(first*block+i))
	}
	return p
}
