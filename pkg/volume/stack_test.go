package volume

import (
	"bytes"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/snapmerge/snapmerge/pkg/blockio/crashfs"
	"github.com/snapmerge/snapmerge/pkg/cow"
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

// TestDamageNamed: damage of a COW is told with the file that it is in, whichever
// layers are read through, and by the merge.
func TestDamageNamed(t *testing.T) {
	im, err := cowgen.Make(rand.New(rand.NewPCG(1, 5)), cowgen.Spec{Blocks: 64, Replaces: 60, Compression: cow.Zstd})
	if err != nil {
		t.Fatal(err)
	}
	bad := bytes.Clone(im.COW)
	for i := len(bad) - 300; i < len(bad); i++ {
		bad[i] = 0xff
	}
	zeros, err := cowgen.Make(rand.New(rand.NewPCG(2, 5)), cowgen.Spec{Blocks: 64, Zeros: 1})
	if err != nil {
		t.Fatal(err)
	}
	fs := crashfs.New("/s")
	for name, content := range map[string][]byte{"base": im.Base, "bad.cow": bad, "above.cow": zeros.COW} {
		if err := fs.Put("/s/"+name, content); err != nil {
			t.Fatal(err)
		}
	}
	v := newVolume(t, fs, Spec{Size: 64 * bs, Base: "/s/base", COWs: []COWSource{{Path: "/s/bad.cow"}, {Path: "/s/above.cow"}}})
	defer v.Close()
	name := v.stack.Load().layers[0].cow.File.Name()
	_, readErr := readAll(v)
	_, mergeErr := v.Step(t.Context())
	for what, err := range map[string]error{"read": readErr, "merge": mergeErr} {
		if err == nil || strings.Count(err.Error(), name+": byte ") != 1 || strings.Contains(err.Error(), v.stack.Load().layers[1].cow.File.Name()) {
			t.Errorf("%s: %v, want the name of %s", what, err, name)
		}
	}
	if s := v.Status(); !s.Corrupt || !strings.Contains(s.Error, name) {
		t.Errorf("status %+v", s)
	}
}
