// Package cowgen makes small random COW files for tests, each with a base and
// the image that it turns the base into.
package cowgen

import (
	"errors"
	"fmt"
	"math/rand/v2"

	"github.com/snapmerge/snapmerge/pkg/cow"
)

const bs = cow.BlockSize

// Spec says what to make.
type Spec struct {
	Blocks      int // of the base
	Copies      int
	Xors        int // at any byte offset of the source
	Replaces    int // of one block, or of MaxBlock and less
	Zeros       int
	Compression cow.Compression
	MaxBlock    int  // bytes; 0: one block
	Scratch     bool // the file has a scratch space of 2 MiB
	// Ops, if given, are the ordered ops, and Copies and Xors are not used.
	Ops []Ordered
}

// Ordered is one ordered op: the block Target becomes the block at byte Source,
// xored with random data if Xor.
type Ordered struct {
	Target, Source int // block, byte
	Xor            bool
}

// Shift are copies that move n blocks from block from by distance blocks, in the
// order in which each reads before its source is overwritten.
func Shift(from, n, distance int) []Ordered {
	ops := make([]Ordered, n)
	for i := range ops {
		k := from + i
		if distance > 0 {
			k = from + n - 1 - i
		}
		ops[i] = Ordered{Target: k + distance, Source: k * bs}
	}
	return ops
}

// Image is a base, a COW and what the COW makes of the base.
type Image struct {
	Base, COW, Want []byte
}

// buffer is a cow.Sink in memory.
type buffer struct{ b []byte }

func (s *buffer) WriteAt(p []byte, off int64) (int, error) {
	if end := int(off) + len(p); end > len(s.b) {
		s.b = append(s.b, make([]byte, end-len(s.b))...)
	}
	return copy(s.b[off:], p), nil
}

func (s *buffer) Truncate(n int64) error {
	if int(n) > len(s.b) {
		s.b = append(s.b, make([]byte, int(n)-len(s.b))...)
	}
	s.b = s.b[:n]
	return nil
}

func (s *buffer) Flush() error { return nil }

// Make makes an image. The same rng gives the same image.
func Make(rng *rand.Rand, spec Spec) (Image, error) {
	im := Image{Base: make([]byte, spec.Blocks*bs)}
	for i := 0; i < len(im.Base); i += 8 {
		// Compressible, and no two blocks the same.
		im.Base[i], im.Base[i+1], im.Base[i+2] = byte(rng.Uint32()), byte(i/bs), byte(i/bs>>8)
	}
	im.Want = append([]byte(nil), im.Base...)
	g := &generator{rng: rng, spec: spec, im: &im, used: make([]bool, spec.Blocks)}
	if spec.MaxBlock == 0 {
		g.spec.MaxBlock = bs
	}
	out := &buffer{}
	o := cow.WriterOptions{Version: 3, Compression: spec.Compression, MaxBlock: g.spec.MaxBlock, OpCountMax: uint64(spec.Blocks)}
	if spec.Scratch {
		o.ScratchSize = cow.DefaultScratchSize
	}
	w, err := cow.NewWriter(out, o)
	if err != nil {
		return im, err
	}
	if err := errors.Join(g.ordered(w), g.independent(w), w.Finalize()); err != nil {
		return im, err
	}
	im.COW = out.b
	return im, nil
}

type generator struct {
	rng  *rand.Rand
	spec Spec
	im   *Image
	used []bool // written by an op
}

func (g *generator) ordered(w *cow.Writer) error {
	ops := g.spec.Ops
	if ops == nil {
		ops = g.pickAll()
	}
	for _, op := range ops {
		dst := g.im.Want[op.Target*bs : (op.Target+1)*bs]
		copy(dst, g.im.Base[op.Source:op.Source+bs])
		g.used[op.Target] = true
		if !op.Xor {
			if err := w.Copy(uint64(op.Target), uint64(op.Source/bs), 1); err != nil {
				return err
			}
			continue
		}
		payload := g.data(bs)
		for i := range dst {
			dst[i] ^= payload[i]
		}
		if err := w.Xor(uint64(op.Target), uint64(op.Source), payload); err != nil {
			return err
		}
	}
	return nil
}

// pickAll chooses copies and xors, mixed.
func (g *generator) pickAll() []Ordered {
	kinds := make([]bool, g.spec.Copies+g.spec.Xors)
	for i := range kinds {
		kinds[i] = i >= g.spec.Copies
	}
	g.rng.Shuffle(len(kinds), func(i, k int) { kinds[i], kinds[k] = kinds[k], kinds[i] })
	var ops []Ordered
	for _, xor := range kinds {
		if op, ok := g.pick(xor); ok {
			ops = append(ops, op)
		}
	}
	clear(g.used)
	return ops
}

// pick chooses an op that reads nothing that an earlier one wrote.
func (g *generator) pick(xor bool) (Ordered, bool) {
	for range 200 {
		t := g.rng.IntN(g.spec.Blocks)
		s := g.rng.IntN(g.spec.Blocks) * bs
		if g.rng.IntN(3) > 0 { // near, so that overlaps are frequent
			s = min(max(t+g.rng.IntN(5)-2, 0), g.spec.Blocks-1) * bs
		}
		if xor && g.rng.IntN(2) == 0 && s+2*bs <= len(g.im.Base) {
			s += g.rng.IntN(bs)
		}
		if g.used[t] || g.used[s/bs] || s%bs != 0 && g.used[s/bs+1] || !xor && s == t*bs {
			continue
		}
		g.used[t] = true
		return Ordered{Target: t, Source: s, Xor: xor}, true
	}
	return Ordered{}, false
}

func (g *generator) independent(w *cow.Writer) error {
	for range g.spec.Replaces {
		n := 1 << g.rng.IntN(bitsFor(g.spec.MaxBlock/bs))
		t := g.free(n)
		if t < 0 {
			continue
		}
		data := g.data(n * bs)
		copy(g.im.Want[t*bs:], data)
		if err := w.Replace(uint64(t), data); err != nil {
			return err
		}
	}
	for range g.spec.Zeros {
		t := g.free(1)
		if t < 0 {
			continue
		}
		clear(g.im.Want[t*bs : (t+1)*bs])
		if err := w.Zero(uint64(t), 1); err != nil {
			return err
		}
	}
	return nil
}

func bitsFor(n int) int {
	b := 1
	for n > 1 {
		n, b = n/2, b+1
	}
	return b
}

// free finds n neighbouring blocks that no op writes and marks them, or -1.
func (g *generator) free(n int) int {
next:
	for range 200 {
		t := g.rng.IntN(g.spec.Blocks - n + 1)
		for i := range n {
			if g.used[t+i] {
				continue next
			}
		}
		for i := range n {
			g.used[t+i] = true
		}
		return t
	}
	return -1
}

// data is n random bytes that compress a little.
func (g *generator) data(n int) []byte {
	p := make([]byte, n)
	for i := 0; i < n; i += 4 {
		p[i] = byte(g.rng.Uint32())
	}
	return p
}

// Check compares an image with what it should be, block by block.
func Check(got, want []byte) error {
	if len(got) != len(want) {
		return fmt.Errorf("%d bytes, want %d", len(got), len(want))
	}
	for b := 0; b < len(got); b += bs {
		if string(got[b:b+bs]) != string(want[b:b+bs]) {
			return fmt.Errorf("block %d differs", b/bs)
		}
	}
	return nil
}
