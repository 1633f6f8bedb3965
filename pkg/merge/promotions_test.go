package merge

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/snapmerge/snapmerge/pkg/blockio"
	"github.com/snapmerge/snapmerge/pkg/blockio/crashfs"
	"github.com/snapmerge/snapmerge/pkg/cow"
	"github.com/snapmerge/snapmerge/test/cowgen"
)

// TestPromotedJournal looks at the versions of the journal, and at what damage to it
// does.
func TestPromotedJournal(t *testing.T) {
	im, err := cowgen.Make(rand.New(rand.NewPCG(6, 9)), cowgen.Spec{Blocks: 30, Copies: 4, Replaces: 8})
	if err != nil {
		t.Fatal(err)
	}
	fs := crashfs.New("/v")
	r := newRig(t, rig{fsys: fs, window: 3, promote: 1}, im)
	version := func() byte {
		b, err := fs.ReadFile("/v/journal")
		if err != nil {
			t.Fatal(err)
		}
		return b[8]
	}
	if v := version(); v != journalVersion || r.journal.InProgress() {
		t.Errorf("a new journal has version %d, in progress: %v", v, r.journal.InProgress())
	}
	if err := r.m.Promote(allChunks(30)); err != nil {
		t.Fatal(err)
	}
	if v := version(); v != promotedVersion || !r.journal.InProgress() {
		t.Errorf("a journal with promotions has version %d, in progress: %v", v, r.journal.InProgress())
	}
	if n := r.m.Stats().Flushes; n != 2 {
		t.Errorf("%d flushes", n)
	}
	bits := JournalBytes(3)
	r.close()
	open := func(offsets ...int64) error {
		image := fs.Kill()
		for _, off := range offsets {
			flip(t, image, "/v/journal", off, int(off%8))
		}
		again := *r
		again.fsys = image
		return again.checkAll(im.Want)
	}
	for off := range int64(fileHeaderCRC + 4) {
		if err := open(off); err != nil {
			t.Errorf("file header damaged at %d: %v", off, err)
		}
		if err := open(off, headerCopy+off*7%fileHeaderCRC); !errors.Is(err, ErrDamaged) {
			t.Errorf("both file headers damaged, at %d: %v", off, err)
		}
	}
	for _, off := range []int64{0, 9, 17, 25, promotedBits, 300, promotedCRC} {
		for _, copied := range []int64{0, bs / 2} {
			if err := open(bits + copied + off); err != nil {
				t.Errorf("promotions damaged at %d: %v", copied+off, err)
			}
		}
		err := open(bits+off, bits+bs/2+off)
		if !errors.Is(err, ErrDamaged) || !strings.Contains(err.Error(), fmt.Sprint("byte ", bits)) {
			t.Errorf("both copies of promotions damaged at %d: %v", off, err)
		}
	}
	truncate(t, fs, "/v/journal", bits)
	if err := open(); !errors.Is(err, ErrDamaged) {
		t.Errorf("promotions are missing: %v", err)
	}
}

// TestPromoteLayers: promotions of a layer that was merged mean nothing to the next.
func TestPromoteLayers(t *testing.T) {
	fs := crashfs.New("/v")
	var r *rig
	for layer := uint64(1); layer <= 3; layer++ {
		// Each is longer than the one before.
		im, err := cowgen.Make(rand.New(rand.NewPCG(layer, 9)), cowgen.Spec{Blocks: 8000 * int(layer), Replaces: 8})
		if err != nil {
			t.Fatal(err)
		}
		if layer == 1 {
			r = newRig(t, rig{fsys: fs, window: 3, promote: 1}, im)
		} else {
			for _, name := range []string{"base", "cow"} {
				if err := fs.Remove("/v/" + name); err != nil {
					t.Fatal(err)
				}
			}
			if err := errors.Join(r.write("base", im.Base), r.write("cow", im.COW)); err != nil {
				t.Fatal(err)
			}
		}
		open := func() *Merger {
			t.Helper()
			if r.m != nil {
				r.close()
			}
			f, err := fs.Open("/v/base", blockio.Direct)
			if err != nil {
				t.Fatal(err)
			}
			r.base = f
			if r.cowf, err = fs.Open("/v/cow", 0); err != nil {
				t.Fatal(err)
			}
			file, err := cow.Open(r.cowf, r.cowf.Size(), cow.OpenOptions{})
			if err != nil {
				t.Fatal(err)
			}
			ops, err := file.Load()
			if err != nil {
				t.Fatal(err)
			}
			if r.journal, err = OpenJournal(fs, "/v/journal"); err != nil {
				t.Fatal(err)
			}
			r.epoch = NewEpoch()
			if r.m, err = OpenJournaled(Config{Ops: ops, COW: r.cowf, Base: f, Epoch: r.epoch, IO: blockio.Sync, ChunkBlocks: 1}, r.journal, layer, ops.Identity()); err != nil {
				t.Fatal(err)
			}
			return r.m
		}
		m := open()
		if m.layer.Promoted(0, 30000) {
			t.Fatalf("layer %d begins with promotions", layer)
		}
		ops := m.cfg.Ops
		var chunks []uint64
		for pos := range ops.Len() / 2 {
			op, err := ops.At(pos * 2)
			if err != nil {
				t.Fatal(err)
			}
			chunks = append(chunks, op.NewBlock)
		}
		if err := m.Promote(chunks); err != nil {
			t.Fatal(err)
		}
		m = open() // before the merge has begun
		for _, c := range chunks {
			if !m.layer.Promoted(c, 1) {
				t.Errorf("layer %d: chunk %d is not promoted any more", layer, c)
			}
		}
		if err := m.Run(context.Background()); err != nil {
			t.Fatal(err)
		}
		if s := m.Stats(); s.BlocksWritten != ops.TargetBlocks()-uint64(len(chunks)) {
			t.Errorf("layer %d: %d blocks written after %d of %d were promoted", layer, s.BlocksWritten, len(chunks), ops.TargetBlocks())
		}
		got, err := r.content()
		if err != nil {
			t.Fatal(err)
		}
		if err := cowgen.Check(got, im.Want); err != nil {
			t.Error(err)
		}
	}
	r.close()
}
