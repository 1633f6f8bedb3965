package main

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
)

const (
	blockSize  = 4096
	sectorSize = 512
	// writers work at a time; block b is written by writer b mod writers only, one
	// after another, so the order of two writes to a block is that of their numbers.
	writers = 8
	// window is how far a write may be ahead of the last flush.
	window = 256
)

// Epoch is the life of the guest from one power cut to the next. The test keeps
// them and gives them to the guest, which knows nothing after a cut.
type Epoch struct {
	Seed    uint64
	Settled bool // the guest got so far that it wrote
	Acked   int  // operations 0 to Acked-1 were flushed, as the guest reported
}

// op is an operation: it writes or zeroes a block.
type op struct {
	seed  uint64
	n     int // in its epoch, from 0
	block int
	zero  bool
}

// opOf is operation n of an epoch on a volume of so many blocks.
func opOf(seed uint64, n, blocks int) op {
	rng := rand.New(rand.NewPCG(seed, uint64(n)))
	own := rng.IntN(blocks / writers)
	return op{seed: seed, n: n, block: own*writers + n%writers, zero: rng.IntN(8) == 0}
}

// content fills p with the block after the operation; every sector is another.
func (o op) content(p []byte) {
	clear(p)
	if o.zero {
		return
	}
	for i := 0; i < len(p); i += 32 {
		binary.LittleEndian.PutUint64(p[i:], o.seed)
		binary.LittleEndian.PutUint64(p[i+8:], uint64(o.n))
		binary.LittleEndian.PutUint64(p[i+16:], uint64(o.block))
		binary.LittleEndian.PutUint64(p[i+24:], uint64(i/sectorSize))
	}
}

// expected is what a volume may hold after the epochs.
type expected struct {
	initial []byte       // the view before anything was written
	last    map[int]op   // by block: the last flushed operation
	maybe   map[int][]op // by block: later ones, of which any may have arrived in part
}

func expect(initial []byte, epochs []Epoch) *expected {
	e := &expected{initial: initial, last: map[int]op{}, maybe: map[int][]op{}}
	blocks := len(initial) / blockSize
	for _, p := range epochs {
		if !p.Settled {
			continue
		}
		clear(e.maybe) // settling undid them, with a flush
		for n := range p.Acked {
			o := opOf(p.Seed, n, blocks)
			e.last[o.block] = o
		}
		for n := p.Acked; n < p.Acked+window; n++ {
			o := opOf(p.Seed, n, blocks)
			e.maybe[o.block] = append(e.maybe[o.block], o)
		}
	}
	return e
}

// flushed fills p with the block as it was flushed last.
func (e *expected) flushed(block int, p []byte) {
	if o, ok := e.last[block]; ok {
		o.content(p)
		return
	}
	copy(p, e.initial[block*blockSize:])
}

// check tells whether the block holds nothing but what it may, and whether it
// is just what was flushed.
func (e *expected) check(block int, got []byte) (allowed, exact bool) {
	want := make([]byte, blockSize)
	e.flushed(block, want)
	if bytes.Equal(got, want) {
		return true, true
	}
	candidates := [][]byte{want}
	for _, o := range e.maybe[block] {
		c := make([]byte, blockSize)
		o.content(c)
		candidates = append(candidates, c)
	}
	for s := 0; s < blockSize; s += sectorSize {
		found := false
		for _, c := range candidates {
			found = found || bytes.Equal(got[s:s+sectorSize], c[s:s+sectorSize])
		}
		if !found {
			return false, false
		}
	}
	return true, false
}
