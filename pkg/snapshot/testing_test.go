package snapshot

import (
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/snapmerge/snapmerge/pkg/blockio"
	"github.com/snapmerge/snapmerge/pkg/blockio/crashfs"
	"github.com/snapmerge/snapmerge/pkg/cow"
)

const bs = cow.BlockSize

// newRand makes a source of random numbers and prints its seed.
func newRand(t testing.TB, seed uint64) *rand.Rand {
	t.Helper()
	t.Logf("seed %d", seed)
	return rand.New(rand.NewPCG(seed, 1))
}

// must stops the test on an error.
func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// fill makes data that packs somewhat.
func fill(rng *rand.Rand, p []byte) {
	noise(rng, p[:min(len(p), 64)])
	for i := 64; i < len(p); i++ {
		p[i] = byte(i)
		if i%3 == 0 {
			p[i] += p[i-64] * 7
		}
	}
}

// noise makes data that does not pack, of a length that is a multiple of 8.
func noise(rng *rand.Rand, p []byte) {
	for ; len(p) > 0; p = p[8:] {
		le.PutUint64(p, rng.Uint64())
	}
}

// cowSpec says what kind of COW writeCOW writes.
type cowSpec struct {
	version     int
	clusters    uint32
	compression cow.Compression
	maxBlock    int
	sequence    bool
	scratch     bool
	ops         int // calls of the writer, about
	sorted      bool
}

func (s cowSpec) String() string {
	return fmt.Sprintf("v%d clusters %d %s max %d sequence %v scratch %v ops %d sorted %v",
		s.version, s.clusters, s.compression, s.maxBlock, s.sequence, s.scratch, s.ops, s.sorted)
}

// writeCOW writes a COW of random ops of all kinds, unless sorted, which has no
// ordered ones and comes by block. Sources lie beyond all targets, so every
// order is valid.
func writeCOW(t testing.TB, fsys blockio.FS, name string, rng *rand.Rand, s cowSpec) {
	t.Helper()
	const far = 1 << 20
	type call struct {
		typ    cow.OpType
		block  uint64
		blocks int
	}
	var ordered, others []call
	var sequence []uint32
	block, total := uint64(rng.IntN(3)), 0
	for range s.ops {
		c := call{block: block, blocks: 1 + rng.IntN(3)}
		switch kind := rng.IntN(4); {
		case kind == 0 && !s.sorted:
			c.typ = cow.Copy
		case kind == 1 && !s.sorted:
			c.typ = cow.Xor
		case kind == 2:
			c.typ = cow.Zero
		default:
			c.typ = cow.Replace
			c.blocks = 1 + rng.IntN(20)
		}
		if c.typ.Ordered() {
			ordered = append(ordered, c)
		} else {
			others = append(others, c)
		}
		total += c.blocks
		block += uint64(c.blocks)
		if rng.IntN(3) == 0 {
			block += uint64(1 + rng.IntN(5))
		}
	}
	if !s.sorted {
		rng.Shuffle(len(ordered), func(i, j int) { ordered[i], ordered[j] = ordered[j], ordered[i] })
		rng.Shuffle(len(others), func(i, j int) { others[i], others[j] = others[j], others[i] })
	}
	if s.sequence {
		for _, c := range ordered {
			for i := range c.blocks {
				sequence = append(sequence, uint32(c.block)+uint32(i))
			}
		}
		rng.Shuffle(len(sequence), func(i, j int) { sequence[i], sequence[j] = sequence[j], sequence[i] })
	}
	o := cow.WriterOptions{
		Version: s.version, ClusterOps: s.clusters, Compression: s.compression, MaxBlock: s.maxBlock, Sequence: sequence,
	}
	if s.scratch {
		o.ScratchSize = cow.DefaultScratchSize
	}
	if s.version == 3 {
		o.OpCountMax = uint64(total) + 5
	}
	f, err := fsys.Open(name, blockio.Create)
	must(t, err)
	defer f.Close()
	w, err := cow.NewWriter(f, o)
	must(t, err)
	for _, c := range append(ordered, others...) {
		data := make([]byte, c.blocks*bs)
		if rng.IntN(4) == 0 {
			noise(rng, data)
		} else {
			fill(rng, data)
		}
		switch c.typ {
		case cow.Copy:
			err = w.Copy(c.block, far+c.block, c.blocks)
		case cow.Xor:
			err = w.Xor(c.block, far*bs+c.block*bs+uint64(rng.IntN(bs)), data)
		case cow.Zero:
			err = w.Zero(c.block, c.blocks)
		case cow.Replace:
			err = w.Replace(c.block, data)
		}
		must(t, err)
	}
	must(t, w.Finalize())
}

// openCOW opens a COW and closes it at the end of the test.
func openCOW(t testing.TB, fsys blockio.FS, path string, o OpenCOWOptions) *COW {
	t.Helper()
	c, err := OpenCOW(fsys, path, o)
	must(t, err)
	t.Cleanup(func() { c.Close() })
	return c
}

// putAgain replaces a file's content.
func putAgain(t testing.TB, fsys *crashfs.FS, name string, data []byte) {
	t.Helper()
	must(t, removeFile(fsys, name))
	must(t, fsys.Put(name, data))
}

func readFile(t testing.TB, fsys blockio.FS, name string) []byte {
	t.Helper()
	b, err := fsys.ReadFile(name)
	must(t, err)
	return b
}

// decode applies a full snapshot to zeros.
func decode(c *COW, size int64) ([]byte, error) {
	image := make([]byte, size)
	d := cow.NewDecoder(c.File)
	for pos := range c.Ops.Len() {
		op, err := c.Ops.At(pos)
		if err != nil {
			return nil, err
		}
		off := int64(op.NewBlock) * bs
		if err := d.Decode(op, image[off:off+int64(op.Blocks)*bs]); err != nil {
			return nil, err
		}
	}
	return image, nil
}
