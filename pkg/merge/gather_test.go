package merge

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"testing"

	"github.com/snapmerge/snapmerge/pkg/blockio"
	"github.com/snapmerge/snapmerge/pkg/cow"
	"github.com/snapmerge/snapmerge/test/cowgen"
)

// counted is what lies below a layer. It counts single reads and batches.
type counted struct {
	*bytes.Reader
	single, batches, together int
	err                       error
}

func (c *counted) ReadAt(p []byte, off int64) (int, error) {
	c.single++
	if c.err != nil {
		return 0, c.err
	}
	return c.Reader.ReadAt(p, off)
}

func (c *counted) ReadBatch(batch []blockio.Request) error {
	c.batches++
	c.together += len(batch)
	if c.err != nil {
		return c.err
	}
	return blockio.ReadBatch(c.Reader, batch)
}

// TestGather: of a read nothing is read from below by itself if there is more than one
// place, and neighbours are one.
func TestGather(t *testing.T) {
	const blocks = 64
	seen := map[string]bool{}
	for seed := range uint64(8) {
		im, ops := makeOps(t, rand.New(rand.NewPCG(seed, 3)), cowgen.Spec{Blocks: blocks, Replaces: 4, Zeros: 4, Copies: 20, Xors: 8, MaxBlock: 4 * bs, Compression: cow.LZ4})
		l, err := NewLayer(ops, bytes.NewReader(im.COW), nil)
		if err != nil {
			t.Fatal(err)
		}
		for first := 0; first < blocks; first += 3 {
			for _, n := range []int{1, 2, 7, blocks - first} {
				n = min(n, blocks-first)
				places := map[int64]bool{} // where a run of blocks begins below
				next := int64(-1)
				for b := first; b < first+n; b++ {
					op, _, found, err := ops.Find(uint64(b))
					if err != nil {
						t.Fatal(err)
					}
					at := int64(b) * bs
					switch {
					case !found:
					case op.Type == cow.Copy:
						at = (int64(op.Source) + int64(b) - int64(op.NewBlock)) * bs
					case op.Type == cow.Xor:
						at = int64(op.Source) + (int64(b)-int64(op.NewBlock))*bs
					default:
						next = -1
						continue
					}
					if at != next {
						places[int64(b)] = true
					}
					next = at + bs
				}
				below := &counted{Reader: bytes.NewReader(im.Base)}
				p := make([]byte, n*bs)
				if err := l.ReadAt(below, p, int64(first)*bs); err != nil {
					t.Fatal(err)
				}
				if !bytes.Equal(p, im.Want[first*bs:(first+n)*bs]) {
					t.Fatalf("seed %d: %d blocks from %d on are wrong", seed, n, first)
				}
				want := counted{Reader: below.Reader, single: len(places)}
				if len(places) > 1 {
					want = counted{Reader: below.Reader, batches: 1, together: len(places)}
				}
				if *below != want {
					t.Fatalf("seed %d: %d blocks from %d on: %d single reads and %d batches of %d, want %d and %d of %d", seed, n, first,
						below.single, below.batches, below.together, want.single, want.batches, want.together)
				}
				seen["one"] = seen["one"] || want.single == 1
				seen["many"] = seen["many"] || want.batches == 1
				if want.single+want.batches == 0 {
					continue
				}
				below.err = errors.New("bad disk")
				if err := l.ReadAt(below, p, int64(first)*bs); !errors.Is(err, below.err) {
					t.Fatalf("an error below gave %v", err)
				}
			}
		}
	}
	if !seen["one"] || !seen["many"] {
		t.Errorf("too little was tried: %v", seen)
	}
}
