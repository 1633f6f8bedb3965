package cow_test

import (
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/snapmerge/snapmerge/pkg/cow"
)

// nowhere is a sink that keeps nothing.
type nowhere struct{}

func (nowhere) WriteAt(p []byte, _ int64) (int, error) { return len(p), nil }
func (nowhere) Truncate(int64) error                   { return nil }
func (nowhere) Flush() error                           { return nil }

// BenchmarkWriter writes replace ops of 64 KiB, as full snapshots have.
func BenchmarkWriter(b *testing.B) {
	data := image(rand.New(rand.NewPCG(13, 14)), 4096)
	for _, c := range []cow.Compression{cow.None, cow.LZ4, cow.Zstd, cow.Gz} {
		for _, jobs := range []int{1, 2} {
			b.Run(fmt.Sprintf("%s-jobs%d", c, jobs), func(b *testing.B) {
				w, err := cow.NewWriter(nowhere{}, cow.WriterOptions{Version: 3, Compression: c, MaxBlock: 64 << 10, OpCountMax: 1 << 30, Jobs: jobs})
				if err != nil {
					b.Fatal(err)
				}
				b.SetBytes(int64(len(data)))
				b.ReportAllocs()
				for b.Loop() {
					if err := w.Replace(0, data); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	}
}
