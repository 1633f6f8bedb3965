package merge

import (
	"math/rand/v2"
	"testing"

	"github.com/snapmerge/snapmerge/pkg/cow"
	"github.com/snapmerge/snapmerge/test/cowgen"
	"github.com/snapmerge/snapmerge/test/longrun"
)

// TestCrashLong makes random larger images than TestCrash until time is up.
func TestCrashLong(t *testing.T) {
	lives, images := 0, 0
	for seed := range longrun.Seeds(t, "SNAPMERGE_CRASH", 1) {
		rng := rand.New(rand.NewPCG(seed, 1))
		n := 8 + rng.IntN(60)
		inPlace := rng.IntN(4) == 0
		spec := cowgen.Spec{
			Blocks: n, Copies: rng.IntN(n), Xors: rng.IntN(n / 2), Replaces: rng.IntN(n / 4), Zeros: rng.IntN(n / 4),
			MaxBlock: bs << rng.IntN(4), Compression: []cow.Compression{cow.None, cow.Gz, cow.LZ4, cow.Zstd}[rng.IntN(4)],
			Scratch: inPlace || rng.IntN(2) == 0,
		}
		im, err := cowgen.Make(rng, spec)
		if err != nil {
			t.Fatal(err)
		}
		r := rig{inPlace: inPlace, window: 1 + rng.IntN(20), noRA: !inPlace && rng.IntN(4) == 0, commits: rng.IntN(2) == 0, reflink: rng.IntN(3) == 0}
		if !inPlace {
			r.promote = rng.IntN(4)
		}
		images += enumerate(t, r, im, 12, rng)
		lives++
		if t.Failed() {
			t.Errorf("seed %d: %+v, %+v", seed, spec, r)
		}
	}
	t.Logf("%d merges, %d crash images", lives, images)
}
