package merge

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"testing"

	"github.com/snapmerge/snapmerge/pkg/blockio"
	"github.com/snapmerge/snapmerge/pkg/blockio/crashfs"
	"github.com/snapmerge/snapmerge/test/cowgen"
)

// cloneDevice counts clones and can do only so many.
type cloneDevice struct {
	blockio.File
	cloner blockio.Cloner
	left   int
	done   int
}

func (d *cloneDevice) Clone(to, from, n int64) error {
	if d.left--; d.left < 0 {
		return errors.ErrUnsupported
	}
	d.done++
	return d.cloner.Clone(to, from, n)
}

// TestReflink: long runs of copies are cloned, the rest is moved; all of it where
// the file system stops to clone.
func TestReflink(t *testing.T) {
	for _, test := range []struct {
		name           string
		left           int
		clones, blocks int // blocks that were written as data
	}{
		{"all clones", 100, 5, 8},
		{"none", 0, 0, 88},
		{"some", 2, 2, 8 + 3*16},
	} {
		t.Run(test.name, func(t *testing.T) {
			// 4 windows of 16 ops, each a run, and one that has 8 blocks besides.
			ops := cowgen.Shift(0, 64, 100)
			ops = append(ops, cowgen.Shift(200, 16, 20)...)
			for i := range 8 {
				ops = append(ops, cowgen.Ordered{Target: 270 + 2*i, Source: (250 + i) * bs})
			}
			im, err := cowgen.Make(rand.New(rand.NewPCG(5, 6)), cowgen.Spec{Blocks: 300, Ops: ops})
			if err != nil {
				t.Fatal(err)
			}
			fs := crashfs.New("/v")
			r := &rig{fsys: fs, dir: "/v", window: 16, io: blockio.Sync, reflink: true}
			if err := errors.Join(r.write("base", im.Base), r.write("cow", im.COW), r.open()); err != nil {
				t.Fatal(err)
			}
			defer r.close()
			d := &cloneDevice{File: r.base, cloner: r.base.(blockio.Cloner), left: test.left}
			r.m.cfg.Base, r.m.cloner = d, d
			r.m.cloneBlocks = cloneBlocks
			if err := r.m.Run(context.Background()); err != nil {
				t.Fatal(err)
			}
			got, err := r.content()
			if err != nil || !bytes.Equal(got, im.Want) {
				t.Errorf("wrong base: %v", err)
			}
			if s := r.m.Stats(); d.done != test.clones || s.BytesWritten != uint64(test.blocks)*bs || s.BlocksWritten != 88 {
				t.Errorf("%d clones, %d blocks written as data, %d in all; want %d, %d, 88", d.done, s.BytesWritten/bs, s.BlocksWritten, test.clones, test.blocks)
			}
		})
	}
}
