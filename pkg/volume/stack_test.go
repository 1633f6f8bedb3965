package volume

import (
	"bytes"
	"math/rand/v2"
	"testing"

	"github.com/snapmerge/snapmerge/pkg/blockio/crashfs"
	"github.com/snapmerge/snapmerge/test/cowgen"
)

// TestScattered: what one read takes from many places of the base, through a COW above
// another, is right, and counted where it came from.
func TestScattered(t *testing.T) {
	const blocks = 64
	var images [2]cowgen.Image
	for i := range images {
		im, err := cowgen.Make(rand.New(rand.NewPCG(uint64(i), 5)), cowgen.Spec{Blocks: blocks, Copies: 50})
		if err != nil {
			t.Fatal(err)
		}
		images[i] = im
	}
	fs := crashfs.New("/s")
	for name, content := range map[string][]byte{"base": images[0].Base, "one.cow": images[0].COW, "two.cow": images[1].COW} {
		if err := fs.Put("/s/"+name, content); err != nil {
			t.Fatal(err)
		}
	}
	v := newVolume(t, fs, Spec{Size: blocks * bs, Base: "/s/base", COWs: []COWSource{{Path: "/s/one.cow"}, {Path: "/s/two.cow"}}})
	defer v.Close()
	got := make([]byte, blocks*bs)
	if _, err := v.ReadAt(got, 0); err != nil {
		t.Fatal(err)
	}
	if c := v.Counters(); c.FromBase != blocks*bs || c.FromCOW != 0 || c.Read.Bytes != blocks*bs {
		t.Errorf("%d bytes from the base and %d from COWs, want all from the base", c.FromBase, c.FromCOW)
	}
	one := make([]byte, bs)
	for b := range blocks {
		if _, err := v.ReadAt(one, int64(b)*bs); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(one, got[b*bs:(b+1)*bs]) {
			t.Errorf("block %d by itself is not what it is in a read of all", b)
		}
	}
	if _, err := v.WriteAt(make([]byte, bs), 0); err != nil { // into a log above both
		t.Fatal(err)
	}
	for more := true; more; {
		var err error
		if more, err = v.Step(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	clear(got[:bs])
	merged, err := readAll(v)
	if err != nil {
		t.Fatal(err)
	}
	if !v.Idle() || !bytes.Equal(merged, got) {
		t.Errorf("what was read is not what it is after the merge (idle: %v)", v.Idle())
	}
}
