package volume

import (
	"errors"
	"math/rand/v2"
	"syscall"
	"testing"

	"golang.org/x/time/rate"

	"github.com/snapmerge/snapmerge/pkg/blockio/crashfs"
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
