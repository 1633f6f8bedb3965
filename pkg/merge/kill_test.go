package merge

import (
	"context"
	"errors"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/snapmerge/snapmerge/pkg/blockio"
	"github.com/snapmerge/snapmerge/pkg/blockio/crashfs"
	"github.com/snapmerge/snapmerge/test/cowgen"
)

// TestKilledAgainAndAgain: a process that never lives for as long as the time
// between two commits gets on nevertheless, but one that nobody has killed does
// not pay for it with flushes.
func TestKilledAgainAndAgain(t *testing.T) {
	for _, test := range []struct {
		name  string
		rig   rig
		spec  cowgen.Spec
		fresh uint64 // flushes of a merge that is not killed
	}{
		{"journal", rig{window: 4}, cowgen.Spec{Blocks: 80, Replaces: 64}, 2},
		{"journal, ordered ops first", rig{window: 4}, cowgen.Spec{Blocks: 80, Ops: cowgen.Shift(0, 6, 1), Replaces: 64}, 5},
		{"in place", rig{inPlace: true}, cowgen.Spec{Blocks: 80, Replaces: 64, Scratch: true}, 4},
	} {
		t.Run(test.name, func(t *testing.T) {
			im, err := cowgen.Make(rand.New(rand.NewPCG(7, 8)), test.spec)
			if err != nil {
				t.Fatal(err)
			}
			fs := crashfs.New("/v")
			r := test.rig
			r.fsys, r.dir, r.io = fs, "/v", blockio.Sync
			if err := errors.Join(r.write("base", im.Base), r.write("cow", im.COW), fs.SyncDir("/")); err != nil {
				t.Fatal(err)
			}
			unharmed := r
			unharmed.fsys = fs.Kill()
			if err := unharmed.open(); err != nil {
				t.Fatal(err)
			}
			unharmed.m.batchBytes = 4 * bs
			if err := unharmed.m.Run(context.Background()); err != nil {
				t.Fatal(err)
			}
			if n := unharmed.m.Stats().Flushes; n != test.fresh {
				t.Errorf("%d flushes without a kill, want %d", n, test.fresh)
			}
			unharmed.close()

			killed := errors.New("killed")
			lives := 0
			for done := false; !done; lives++ {
				if lives > 100 {
					t.Fatal("never done")
				}
				if err := r.open(); err != nil {
					t.Fatal(err)
				}
				if got := r.m.Stats().Resumes; !r.inPlace && got != uint64(lives) {
					t.Errorf("life %d: %d resumes", lives, got)
				}
				r.m.batchBytes = 4 * bs
				n := 0
				r.m.cfg.Pace = func(context.Context, int) error {
					if n++; n == 8 {
						return killed
					}
					return nil
				}
				if err := r.m.Run(context.Background()); err != nil && !errors.Is(err, killed) {
					t.Fatal(err)
				}
				done = r.m.Done()
				image := r.fsys.(*crashfs.FS).Kill()
				r.close()
				r.fsys = image
			}
			if lives < 4 {
				t.Errorf("killed only %d times", lives)
			}
			if err := r.checkAll(im.Want); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestZerosArePaced: scattered zeros yield and stop as writes do.
func TestZerosArePaced(t *testing.T) {
	im, err := cowgen.Make(rand.New(rand.NewPCG(7, 9)), cowgen.Spec{Blocks: 2000, Zeros: 900})
	if err != nil {
		t.Fatal(err)
	}
	r := &rig{fsys: crashfs.New("/v"), dir: "/v", window: 4, io: blockio.Sync}
	if err := errors.Join(r.write("base", im.Base), r.write("cow", im.COW), r.open()); err != nil {
		t.Fatal(err)
	}
	defer r.close()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	r.m.cfg.Pace = func(ctx context.Context, _ int) error {
		if n := r.m.Stats().BlocksWritten; n > 0 {
			cancel()
		}
		return ctx.Err()
	}
	if err := r.m.Run(ctx); !errors.Is(err, context.Canceled) {
		t.Fatalf("merge was not stopped: %v", err)
	}
	if n := r.m.Stats().BlocksWritten; n > 450 {
		t.Errorf("%d of 900 blocks zeroed before the first look", n)
	}
}

// TestCommitEvery: commits come as often as asked for, and else hardly ever.
func TestCommitEvery(t *testing.T) {
	im, err := cowgen.Make(rand.New(rand.NewPCG(7, 10)), cowgen.Spec{Blocks: 80, Replaces: 64})
	if err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		every   time.Duration
		flushes uint64
	}{{time.Hour, 2}, {time.Nanosecond, 2 * 64 / 4}} {
		r := &rig{fsys: crashfs.New("/v"), dir: "/v", window: 4, io: blockio.Sync}
		if err := errors.Join(r.write("base", im.Base), r.write("cow", im.COW), r.open()); err != nil {
			t.Fatal(err)
		}
		r.m.batchBytes, r.m.cfg.CommitEvery = 4*bs, test.every
		if err := r.m.Run(context.Background()); err != nil {
			t.Fatal(err)
		}
		if n := r.m.Stats().Flushes; n != test.flushes {
			t.Errorf("commits every %v: %d flushes, want %d", test.every, n, test.flushes)
		}
		r.close()
	}
}
