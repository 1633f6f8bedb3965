package merge

import (
	"bytes"
	"math/rand/v2"
	"testing"

	"github.com/snapmerge/snapmerge/pkg/cow"
	"github.com/snapmerge/snapmerge/test/cowgen"
)

// makeOps makes a base and a COW, and reads its ops.
func makeOps(t *testing.T, rng *rand.Rand, spec cowgen.Spec) (cowgen.Image, cow.Ops) {
	t.Helper()
	im, err := cowgen.Make(rng, spec)
	if err != nil {
		t.Fatal(err)
	}
	file, err := cow.Open(bytes.NewReader(im.COW), int64(len(im.COW)), cow.OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	ops, err := file.Load()
	if err != nil {
		t.Fatal(err)
	}
	return im, ops
}

// TestLoad compares what is loaded with the image that the COW makes, and what is
// there and until when with the rule itself, at every point of the merge.
func TestLoad(t *testing.T) {
	const blocks, run = 64, 12
	for seed := range uint64(6) {
		rng := rand.New(rand.NewPCG(seed, 9))
		spec := cowgen.Spec{Blocks: blocks, Replaces: 8, Zeros: 6, MaxBlock: 4 * bs, Compression: cow.LZ4}
		if seed%2 == 0 {
			spec.Copies, spec.Xors = 8, 8
		}
		im, ops := makeOps(t, rng, spec)
		data := bytes.NewReader(im.COW)
		seen := map[string]bool{}
		for committed := uint64(0); committed <= ops.Len(); committed++ {
			l, err := NewLayer(ops, data, &Seed{Committed: committed})
			if err != nil {
				t.Fatal(err)
			}
			for first := uint64(0); first < blocks; first += 5 {
				var have uint64
				until, worth, done, ordered := ^uint64(0), false, false, false
				for i := range uint64(run) {
					op, pos, ok, err := ops.Find(first + i)
					if err != nil {
						t.Fatal(err)
					}
					ordered = ordered || ok && op.Type.Ordered()
					switch {
					case !ok:
					case pos < committed:
						done = true
					default:
						have |= 1 << i
						until = min(until, pos)
						worth = worth || op.Type != cow.Zero
					}
				}
				for _, whole := range []bool{false, true} {
					p := make([]byte, run*bs)
					got, till, apart, err := l.Load(bytes.NewReader(im.Base), p, first, whole)
					if err != nil {
						t.Fatal(err)
					}
					if apart != (whole && ordered) && !(whole && done && !ordered) {
						t.Fatalf("seed %d, block %d: apart is %v", seed, first, apart)
					}
					if apart {
						seen["apart"] = true
					}
					switch {
					case whole && done && !ordered:
						seen["done"] = true
						if got != 0 || till != 0 {
							t.Fatalf("seed %d, %d committed, block %d: %b until %d though some of it is committed", seed, committed, first, got, till)
						}
						continue
					case !worth:
						seen["nothing"] = true
						if got != 0 || till == 0 {
							t.Fatalf("seed %d, %d committed, block %d: %b until %d, want nothing", seed, committed, first, got, till)
						}
						continue
					}
					seen["something"] = true
					if got != have || till != until {
						t.Fatalf("seed %d, %d committed, block %d: %b until %d, want %b until %d", seed, committed, first, got, till, have, until)
					}
					for i := range uint64(run) {
						if b := first + i; have>>i&1 != 0 && !bytes.Equal(p[i*bs:(i+1)*bs], im.Want[b*bs:(b+1)*bs]) {
							t.Fatalf("seed %d, %d committed: block %d differs", seed, committed, b)
						}
					}
				}
			}
		}
		last := "done"
		if seed%2 == 0 {
			last = "apart" // with so many ordered ops nearly everything is
		}
		if !seen["nothing"] || !seen["something"] || !seen[last] {
			t.Errorf("seed %d: only saw %v", seed, seen)
		}
	}
}
