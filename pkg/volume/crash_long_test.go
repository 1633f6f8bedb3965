package volume

import (
	"math/rand/v2"
	"testing"

	"github.com/snapmerge/snapmerge/pkg/cow"
	"github.com/snapmerge/snapmerge/test/cowgen"
	"github.com/snapmerge/snapmerge/test/longrun"
)

// TestCrashLong lives random lives of volumes, longer than those of TestCrash,
// until time is up.
func TestCrashLong(t *testing.T) {
	lives, images := 0, 0
	for seed := range longrun.Seeds(t, "SNAPMERGE_CRASH", 0.5) {
		rng := rand.New(rand.NewPCG(seed, 2))
		n := 8 + rng.IntN(40)
		var spec *cowgen.Spec
		if rng.IntN(5) > 0 {
			spec = &cowgen.Spec{Blocks: n, Copies: rng.IntN(n), Xors: rng.IntN(n / 2), Replaces: rng.IntN(n / 3), Zeros: rng.IntN(n / 4),
				MaxBlock: bs << rng.IntN(4), Compression: cow.LZ4}
		}
		images += lifetime(t, seed, spec, n, 200, 6, 3)
		lives++
	}
	t.Logf("%d lives, %d crash images", lives, images)
}

// TestManagerCrashLong does so with nodes.
func TestManagerCrashLong(t *testing.T) {
	lives, images := 0, 0
	for seed := range longrun.Seeds(t, "SNAPMERGE_CRASH", 0.5) {
		images += nodeLifetime(t, seed, 60)
		lives++
	}
	t.Logf("%d nodes, %d crash images", lives, images)
}
