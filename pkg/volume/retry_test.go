package volume

import (
	"errors"
	"math/rand/v2"
	"syscall"
	"testing"

	"golang.org/x/time/rate"

	"github.com/snapmerge/snapmerge/pkg/blockio"
	"github.com/snapmerge/snapmerge/pkg/blockio/crashfs"
	"github.com/snapmerge/snapmerge/pkg/merge"
	"github.com/snapmerge/snapmerge/test/cowgen"
)

// TestFailsAtTheThirdTry: I/O errors of a merge make the volume Failed when three tries
// have ended with them in a row, and no longer than until one gets on. A full disk makes
// it Stalled at once, and never Failed.
func TestFailsAtTheThirdTry(t *testing.T) {
	for _, c := range []struct {
		errno  syscall.Errno
		states []State // after each try
	}{
		{syscall.EIO, []State{Merging, Merging, Failed, Failed}},
		{syscall.ENOSPC, []State{Stalled, Stalled, Stalled, Stalled}},
	} {
		fs, v, im := restoredVolume(t, rand.NewPCG(2, 5), cowgen.Spec{Blocks: 64, Copies: 20, Replaces: 5})
		fs.OnStep(func(s crashfs.Step) error {
			if s.Op == crashfs.OpWrite && s.Name == "/s/base" {
				return c.errno
			}
			return nil
		})
		for i, want := range c.states {
			if _, err := v.Step(t.Context()); !errors.Is(err, c.errno) {
				t.Fatalf("%v, try %d: %v", c.errno, i+1, err)
			}
			if s := v.Status(); s.State != want || s.Error == "" {
				t.Errorf("%v, try %d: %+v", c.errno, i+1, s)
			}
		}
		fs.OnStep(nil)
		if _, err := v.Step(t.Context()); err != nil {
			t.Error(err)
		}
		if s := v.Status(); s.State == Failed || s.State == Stalled || s.Error != "" {
			t.Errorf("the disk works again: %+v", s)
		}
		if err := finish(v, im.Want); err != nil {
			t.Error(err)
		}
		if err := v.Close(); err != nil {
			t.Error(err)
		}
	}
}

// goneFile is a device that is gone: it has no size any more.
type goneFile struct{ blockio.File }

func (goneFile) Size() int64 { return 0 }

// TestNextMergeCannotBegin: a COW whose merge cannot be begun when the one below it is
// merged is merged later.
func TestNextMergeCannotBegin(t *testing.T) {
	im, err := cowgen.Make(rand.New(rand.NewPCG(1, 1)), cowgen.Spec{Blocks: 16, Replaces: 4})
	if err != nil {
		t.Fatal(err)
	}
	fs := crashfs.New("/s")
	for name, content := range map[string][]byte{"base": im.Base, "one.cow": im.COW, "two.cow": im.COW} {
		if err := fs.Put("/s/"+name, content); err != nil {
			t.Fatal(err)
		}
	}
	v := newVolume(t, fs, Spec{Size: 16 * bs, Base: "/s/base", COWs: []COWSource{{Path: "/s/one.cow"}, {Path: "/s/two.cow"}}})
	defer v.Close()
	for !v.stack.Load().layers[0].merger.Done() {
		if _, err := v.Step(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	there := v.base.File
	v.base.File = goneFile{there}
	for range 2 {
		if _, err := v.Step(t.Context()); !errors.Is(err, merge.ErrMismatch) {
			t.Errorf("begun without a base: %v", err)
		}
	}
	if low := v.stack.Load().layers[0]; low.file != "/s/two.cow" || low.merger != nil {
		t.Errorf("the lowest layer is %s, its merge: %v", low.file, low.merger)
	}
	if got, err := readAll(v); err != nil || cowgen.Check(got, im.Want) != nil {
		t.Errorf("view: %v, %v", err, cowgen.Check(got, im.Want))
	}
	v.base.File = there
	if err := finish(v, im.Want); err != nil {
		t.Error(err)
	}
}

// TestRate: the volume's own rate goes before the node's, takes effect at once, outlasts
// the process, and every byte that is written counts.
func TestRate(t *testing.T) {
	v, _ := mergingVolume(t, Config{})
	v.cfg.Rate = 7
	for _, c := range []struct{ set, want int }{{3, 3}, {0, 7}, {500, 500}} {
		if err := v.SetRate(c.set); err != nil {
			t.Fatal(err)
		}
		l := v.limiter.Load()
		if l == nil || l.Limit() != rate.Limit(c.want<<20) || v.Record().Rate != c.set {
			t.Fatalf("rate %d: %v, record %d", c.set, l, v.Record().Rate)
		}
		if rec, err := ReadRecord(v.cfg.FS, v.dirName()); err != nil || rec.Rate != c.set {
			t.Errorf("rate %d: on disk %v, %v", c.set, rec, err)
		}
		before := l.Tokens()
		if err := v.pace(t.Context(), 2<<20); err != nil {
			t.Fatal(err)
		}
		// What it takes comes again, but not in so little time.
		if after := l.Tokens(); after > before-1<<20 {
			t.Errorf("rate %d: 2 MiB take %v bytes", c.set, before-after)
		}
	}
	v.cfg.Rate = 0
	if err := v.SetRate(0); err != nil || v.limiter.Load() != nil {
		t.Errorf("no limit: %v, %v", v.limiter.Load(), err)
	}
}
