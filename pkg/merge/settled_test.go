package merge

import (
	"bytes"
	"math/rand/v2"
	"testing"

	"github.com/snapmerge/snapmerge/pkg/cow"
	"github.com/snapmerge/snapmerge/test/cowgen"
)

// TestSettled compares the answer with the rule itself: no op that is not
// committed writes the block, and no ordered one that is not committed reads it.
func TestSettled(t *testing.T) {
	for seed := range uint64(20) {
		rng := rand.New(rand.NewPCG(seed, 4))
		im, ops := makeOps(t, rng, cowgen.Spec{Blocks: 64, Copies: 8, Xors: 12, Replaces: 6, Zeros: 4, MaxBlock: 2 * bs})
		unaligned, free := 0, 0
		for committed := uint64(0); committed <= ops.Len(); committed++ {
			l, err := NewLayer(ops, bytes.NewReader(im.COW), &Seed{Committed: committed})
			if err != nil {
				t.Fatal(err)
			}
			if err := l.FindSources(); err != nil {
				t.Fatal(err)
			}
			busy := make([]bool, 64)
			for pos := committed; pos < ops.Len(); pos++ {
				op, err := ops.At(pos)
				if err != nil {
					t.Fatal(err)
				}
				for b := range uint64(op.Blocks) {
					busy[op.NewBlock+b] = true
				}
				switch {
				case op.Type == cow.Copy:
					busy[op.Source] = true
				case op.Type == cow.Xor:
					busy[op.Source/bs] = true
					if op.Source%bs != 0 {
						busy[op.Source/bs+1] = true
						unaligned++
					}
				}
			}
			for first := range uint64(64) {
				want := true
				for n := uint64(1); n <= 3 && first+n <= 64; n++ {
					want = want && !busy[first+n-1]
					got, err := l.Settled(first, n)
					if err != nil {
						t.Fatal(err)
					}
					if got != want {
						t.Fatalf("seed %d, %d ops committed: blocks %d to %d settled: %v, want %v", seed, committed, first, first+n-1, got, want)
					}
					if want {
						free++
					}
				}
			}
		}
		if unaligned == 0 || free == 0 {
			t.Errorf("seed %d: %d unaligned sources, %d settled ranges", seed, unaligned, free)
		}
	}
}
