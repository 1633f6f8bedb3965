package bench

import (
	"encoding/binary"
	"math/rand/v2"

	"github.com/snapmerge/snapmerge/pkg/cow"
)

// poolBlocks is the length of the pool: longer than any op, and than the reach
// of any compression, so that the repetition helps none.
const poolBlocks = 1024

// content makes the blocks of the base, of replace ops and of xor ops. They are
// blocks of a pool, each with a mark of 8 bytes in front that no other has.
type content struct {
	pool []byte
	seed uint64
}

// Which image a block belongs to.
const (
	oldImage = iota
	newImage
	difference
)

func newContent(seed uint64) *content {
	c := &content{pool: make([]byte, poolBlocks*bs), seed: seed}
	rng := rand.New(rand.NewPCG(seed, 0x706f6f6c))
	// Most repeats what came shortly before, as text, tables and programs do; the
	// rest is made of 64 different bytes, which only entropy coding packs.
	for i := 0; i < len(c.pool); {
		n := min(8+rng.IntN(33), len(c.pool)-i)
		if back := 1 + rng.IntN(2048); back < i && rng.IntN(3) > 0 {
			for range n {
				c.pool[i] = c.pool[i-back]
				i++
			}
			continue
		}
		for range n {
			c.pool[i] = ' ' + byte(rng.IntN(64))
			i++
		}
	}
	return c
}

// mark is different for every block of every image.
func (c *content) mark(image, block uint64) uint64 {
	x := block ^ image<<56 ^ c.seed
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}

func (c *content) poolBlock(i uint64) []byte { return c.pool[i%poolBlocks*bs:][:bs] }

// base writes the content of a block of the base to dst.
func (c *content) base(dst []byte, block uint64) {
	copy(dst[:bs], c.poolBlock(block))
	binary.LittleEndian.PutUint64(dst, c.mark(oldImage, block))
}

// fresh is the content of a replaced block.
func (c *content) fresh(dst []byte, block uint64) {
	copy(dst[:bs], c.poolBlock(block+poolBlocks/2))
	binary.LittleEndian.PutUint64(dst, c.mark(newImage, block))
}

// xor is the difference between an xor op's block and its source: some changed
// bytes among zeros.
func (c *content) xor(dst []byte, block uint64) {
	clear(dst[:bs])
	m := c.mark(difference, block)
	at, n := m%(bs/2), 32+m>>32%256
	copy(dst[8+at:][:n], c.poolBlock(m>>16))
	binary.LittleEndian.PutUint64(dst, m|1)
}

// read writes the base's content from any byte on to dst, one block.
func (c *content) read(dst []byte, from uint64) {
	first, skip := from/bs, from%bs
	c.base(dst, first)
	if skip == 0 {
		return
	}
	var next [bs]byte
	c.base(next[:], first+1)
	copy(dst[:bs], dst[skip:bs])
	copy(dst[bs-skip:bs], next[:])
}

// target writes the content that the op's block has after the merge.
func (c *content) target(dst []byte, o op) {
	switch o.typ {
	case cow.Copy:
		c.read(dst, o.source)
	case cow.Xor:
		var d [bs]byte
		c.read(dst, o.source)
		c.xor(d[:], uint64(o.block))
		for i := range d {
			dst[i] ^= d[i]
		}
	case cow.Replace:
		c.fresh(dst, uint64(o.block))
	case cow.Zero:
		clear(dst[:bs])
	}
}
