package merge

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"testing"

	"github.com/snapmerge/snapmerge/pkg/blockio"
	"github.com/snapmerge/snapmerge/pkg/cow"
	"github.com/snapmerge/snapmerge/test/cowgen"
)

// TestPlan looks at how windows are cut, what they log, and what that costs in
// scratch space and flushes.
func TestPlan(t *testing.T) {
	const window = 8
	for _, test := range []struct {
		name    string
		spec    cowgen.Spec
		noRA    bool
		windows int
		scratch uint64 // blocks
		flushes uint64
	}{
		{"overlap all along", cowgen.Spec{Blocks: 33, Ops: cowgen.Shift(0, 32, 1)}, false, 4, 28, 9},
		{"overlap behind the window", cowgen.Spec{Blocks: 40, Ops: cowgen.Shift(0, 32, 8)}, false, 4, 0, 9},
		{"overlap in the second half: cut there", cowgen.Spec{Blocks: 37, Ops: cowgen.Shift(0, 32, 5)}, false, 7, 0, 15},
		{"overlap in the first half: logged", cowgen.Spec{Blocks: 35, Ops: cowgen.Shift(0, 32, 3)}, false, 4, 20, 9},
		{"no read-ahead", cowgen.Spec{Blocks: 35, Ops: cowgen.Shift(0, 32, 3)}, true, 11, 0, 23},
		// The last window logs all, and is committed with the rest: 2 flushes less.
		{"independent ops follow", cowgen.Spec{Blocks: 48, Ops: cowgen.Shift(0, 32, 8), Replaces: 4, Zeros: 2}, false, 4, 8, 9},
		{"independent ops only", cowgen.Spec{Blocks: 40, Replaces: 9, Zeros: 3}, false, 0, 0, 2},
	} {
		t.Run(test.name, func(t *testing.T) {
			im, err := cowgen.Make(rand.New(rand.NewPCG(1, 2)), test.spec)
			if err != nil {
				t.Fatal(err)
			}
			r := &rig{fsys: blockio.OS(), dir: t.TempDir(), window: window, io: blockio.Sync, noRA: test.noRA}
			if err := errors.Join(r.write("base", im.Base), r.write("cow", im.COW), r.open()); err != nil {
				t.Fatal(err)
			}
			defer r.close()
			windows := 0
			for pos := uint64(0); pos < r.m.cfg.Ops.Ordered(); windows++ {
				w, err := plan(r.m.cfg.Ops, pos, window, !test.noRA)
				if err != nil {
					t.Fatal(err)
				}
				pos = w.end
			}
			if windows != test.windows {
				t.Errorf("%d windows, want %d", windows, test.windows)
			}
			if err := r.m.Run(context.Background()); err != nil {
				t.Fatal(err)
			}
			if !r.journal.cur.done || r.journal.InProgress() {
				t.Error("the journal does not say that the merge is done")
			}
			s := r.m.Stats()
			if s.ScratchBytes != test.scratch*bs || s.Flushes != test.flushes {
				t.Errorf("%d blocks logged and %d flushes, want %d and %d", s.ScratchBytes/bs, s.Flushes, test.scratch, test.flushes)
			}
			got, err := r.content()
			if err != nil || !bytes.Equal(got, im.Want) {
				t.Errorf("wrong base: %v", err)
			}
		})
	}
}

// boundedOps has nothing but bounds.
type boundedOps struct {
	cow.Ops
	blocks, source uint64
}

func (o boundedOps) Bounds() (uint64, uint64) { return o.blocks, o.source }

func TestCheckBase(t *testing.T) {
	for _, c := range []struct {
		blocks, source uint64
		ok             bool
	}{
		{0, 0, true},
		{10, 10 * bs, true},
		{11, 0, false},
		{0, 10*bs + 1, false},
		{1 << 52, 0, false}, // would be a multiple of 1<<64 bytes
		{1 << 51, 0, false},
		{0, 1 << 63, false},
		{1<<64 - 1, 1<<64 - 1, false},
	} {
		err := CheckBase(boundedOps{blocks: c.blocks, source: c.source}, 10*bs)
		var small *BaseTooSmallError
		if c.ok != (err == nil) || err != nil && (!errors.As(err, &small) || small.Need <= small.Have) {
			t.Errorf("%d blocks, %d bytes of sources: %v", c.blocks, c.source, err)
		}
	}
}
