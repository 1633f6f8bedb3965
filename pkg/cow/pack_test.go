package cow

import (
	"bytes"
	"math/rand/v2"
	"testing"
)

// TestPackAlmostRandom packs data that hardly repeats, in every degree from not
// at all to somewhat: whatever the library makes of it, it comes back or is left
// raw, and is no error.
func TestPackAlmostRandom(t *testing.T) {
	step := 1
	if testing.Short() {
		step = 8
	}
	for _, c := range []Compression{Gz, LZ4, Zstd} {
		for _, size := range []int{BlockSize, 16 * BlockSize} {
			p, err := newPacker(&WriterOptions{Version: 3, Compression: c, MaxBlock: size})
			if err != nil {
				t.Fatal(err)
			}
			rng := rand.New(rand.NewPCG(uint64(c), uint64(size)))
			dec := NewDecoder(nil)
			raw, packed := 0, 0
			for repeats := 0; repeats < 400; repeats += step {
				data := make([]byte, size)
				for i := range data {
					data[i] = byte(rng.Uint32())
				}
				for range repeats {
					n := 4 + rng.IntN(8)
					copy(data[rng.IntN(size-n):][:n], data[rng.IntN(size-n):])
				}
				out, err := p.pack(make([]byte, 0, size), data)
				if err != nil {
					t.Fatalf("%v of %d bytes with %d repeats: %v", c, size, repeats, err)
				}
				if out == nil {
					raw++
					continue
				}
				packed++
				back := make([]byte, size)
				op := Op{Type: Replace, Compression: c, Blocks: size / BlockSize, DataLength: len(out)}
				if err := dec.DecodeBytes(op, out, back); err != nil || !bytes.Equal(back, data) {
					t.Fatalf("%v of %d bytes with %d repeats does not come back: %v", c, size, repeats, err)
				}
			}
			t.Logf("%v of %d bytes: %d raw, %d packed", c, size, raw, packed)
			if raw == 0 {
				t.Errorf("%v of %d bytes: all was packed", c, size)
			}
		}
	}
}
