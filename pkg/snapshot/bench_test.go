package snapshot

import (
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/snapmerge/snapmerge/pkg/blockio"
)

func BenchmarkEncode(b *testing.B) {
	for _, compression := range []string{"lz4", "zstd", "none"} {
		b.Run(compression, func(b *testing.B) {
			const size = 256 << 20
			v := &memView{data: make([]byte, size), hole: func(int64) bool { return false }}
			rng := rand.New(rand.NewPCG(1, 1))
			for off := 0; off < size; off += 1 << 20 {
				fill(rng, v.data[off:off+1<<19])
				noise(rng, v.data[off+1<<19:off+1<<20])
			}
			dir := b.TempDir()
			b.SetBytes(size)
			for b.Loop() {
				_, err := Encode(ctx, blockio.OS(), dir, v, EncodeOptions{Compression: compression})
				must(b, err)
			}
		})
	}
}

// BenchmarkFind looks for random blocks in an index that fits the cache.
func BenchmarkFind(b *testing.B) {
	for _, ops := range []int{1000, 300_000} {
		b.Run(fmt.Sprint(ops), func(b *testing.B) {
			name := b.TempDir() + "/x.cow"
			writeZeros(b, blockio.OS(), name, ops, false)
			must(b, BuildIndex(ctx, blockio.OS(), name))
			c := openCOW(b, blockio.OS(), name, OpenCOWOptions{})
			rng := rand.New(rand.NewPCG(1, 1))
			for b.Loop() {
				_, _, _, err := c.Ops.Find(rng.Uint64N(uint64(3 * ops)))
				must(b, err)
			}
		})
	}
}
