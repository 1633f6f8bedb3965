package volume

import (
	"context"
	"math/rand/v2"
	"syscall"
	"testing"
	"time"

	"github.com/snapmerge/snapmerge/pkg/blockio/crashfs"
	"github.com/snapmerge/snapmerge/test/cowgen"
)

// TestStateOverFailure: a merge that fails is stalled or failed until it goes on,
// not until it has ended, and failures with progress between them are no series.
// The record tells when the merge was over.
func TestStateOverFailure(t *testing.T) {
	for _, c := range []struct {
		errno       syscall.Errno
		first, last State // after one failure, and after a series
	}{
		{syscall.ENOSPC, Stalled, Stalled},
		{syscall.EPERM, Merging, Failed},
	} {
		t.Run(c.errno.Error(), func(t *testing.T) {
			fs, v, _ := restoredVolume(t, rand.NewPCG(3, 9), cowgen.Spec{Blocks: 64, Copies: 40, Replaces: 8})
			defer v.Close()
			fails := true
			fs.OnStep(func(s crashfs.Step) error {
				if fails && s.Op == crashfs.OpWrite && s.Name == "/s/base" {
					return c.errno
				}
				return nil
			})
			step := func() {
				if _, err := v.Step(t.Context()); err == nil {
					t.Fatal("the step did not fail")
				}
			}
			step()
			if s := v.Status(); s.State != c.first || s.Error == "" {
				t.Errorf("after a failure: %+v", s)
			}
			for range failsBeforeFailed - 1 {
				step()
			}
			stuck := v.Status()
			if stuck.State != c.last || stuck.Error == "" {
				t.Errorf("after %d failures: %+v", failsBeforeFailed, stuck)
			}

			fails = false
			seen := false
			v.onPace = func(context.Context) {
				if s := v.Status(); s.BytesDone > stuck.BytesDone && s.BytesDone < s.BytesTotal && !seen {
					seen, fails = true, true
					if s.State != Merging || s.Error != "" {
						t.Errorf("while the merge goes on: %+v", s)
					}
				}
			}
			step()
			if s := v.Status(); !seen || s.State != c.first || s.Error == "" {
				t.Errorf("after the next failure (%v): %+v", seen, s)
			}
			if at := v.Record().MergedAt; !at.IsZero() {
				t.Errorf("merged at %v already", at)
			}

			fails = false
			before := time.Now()
			for more := true; more; {
				var err error
				if more, err = v.Step(t.Context()); err != nil {
					t.Fatal(err)
				}
			}
			if s := v.Status(); s.State != Merged || s.Error != "" {
				t.Errorf("at the end: %+v", s)
			}
			if at := v.Record().MergedAt; at.Before(before) || at.After(time.Now()) {
				t.Errorf("merged at %v", at)
			}
		})
	}
}
