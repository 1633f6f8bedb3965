package volume

import (
	"bytes"
	"context"
	"math/rand/v2"
	"syscall"
	"testing"

	"k8s.io/klog/v2"

	"github.com/snapmerge/snapmerge/pkg/blockio"
	"github.com/snapmerge/snapmerge/pkg/blockio/crashfs"
	"github.com/snapmerge/snapmerge/pkg/cow"
	"github.com/snapmerge/snapmerge/pkg/readahead"
	"github.com/snapmerge/snapmerge/test/cowgen"
)

// promotionRig is a volume whose reads are promoted when the test says so.
func promotionRig(t *testing.T, spec cowgen.Spec, vs Spec, cfg Config) (v *Volume, fs *crashfs.FS, im cowgen.Image) {
	t.Helper()
	im, err := cowgen.Make(rand.New(rand.NewPCG(12, 12)), spec)
	if err != nil {
		t.Fatal(err)
	}
	fs = crashfs.New("/s")
	for name, content := range map[string][]byte{"base": im.Base, "data.cow": im.COW} {
		if err := fs.Put("/s/"+name, content); err != nil {
			t.Fatal(err)
		}
	}
	vs.ID, vs.Size, vs.Base, vs.COWs, vs.WindowBlocks = "v", int64(len(im.Base)), "/s/base", []COWSource{{Path: "/s/data.cow"}}, 4
	if err := Create(fs, "/s/v", vs); err != nil {
		t.Fatal(err)
	}
	cfg.FS, cfg.Dir, cfg.IO, cfg.Log = fs, "/s/v", blockio.Sync, klog.Background().V(9)
	if v, err = Open(cfg); err != nil {
		t.Fatal(err)
	}
	return v, fs, im
}

func promoteAll(t *testing.T, v *Volume) {
	t.Helper()
	for more := true; more; {
		var err error
		if more, err = v.promote(context.Background()); err != nil {
			t.Fatal(err)
		}
	}
}

// TestPromotion: what was read is promoted, but not while the merge is paused; then
// writes go to the base, and what was read ahead before is not seen any more.
func TestPromotion(t *testing.T) {
	for _, mode := range readahead.Modes {
		t.Run(string(mode), func(t *testing.T) {
			ahead := readahead.NewManager(readahead.Config{Mode: mode})
			defer ahead.Close()
			const blocks = 256
			v, fs, im := promotionRig(t, cowgen.Spec{Blocks: blocks, Replaces: 12, Zeros: 4, MaxBlock: 16 * bs, Compression: cow.LZ4},
				Spec{}, Config{ReadAhead: ahead, ReadPromotion: true})
			want := bytes.Clone(im.Want)
			check := func() {
				t.Helper()
				for off := 0; off < len(want); off += 8 * bs { // so that it is read ahead
					p := make([]byte, 8*bs)
					if _, err := v.ReadAt(p, int64(off)); err != nil {
						t.Fatal(err)
					}
					if err := cowgen.Check(p, want[off:off+len(p)]); err != nil {
						t.Fatalf("at %d: %v", off, err)
					}
				}
			}
			check()
			if err := v.SetPaused(true); err != nil {
				t.Fatal(err)
			}
			promoteAll(t, v)
			if n := v.Counters().MergePromoted; n != 0 {
				t.Errorf("%d bytes were promoted during a pause", n)
			}
			if err := v.SetPaused(false); err != nil {
				t.Fatal(err)
			}
			promoteAll(t, v)
			if s, n := v.Status(), v.Counters().MergePromoted; n != uint64(s.BytesTotal) || s.BytesDone != s.BytesTotal {
				t.Errorf("%d bytes were promoted: %+v", n, s)
			}
			check()
			p := make([]byte, bs)
			for b := range int64(blocks) {
				for i := range p {
					p[i] = byte(b) + byte(i>>8)
				}
				if _, err := v.WriteAt(p, b*bs); err != nil {
					t.Fatal(err)
				}
				copy(want[b*bs:], p)
			}
			if c := v.Counters(); c.ToLog != 0 {
				t.Errorf("%d bytes were written to the log", c.ToLog)
			}
			check()
			if n := v.promotion.waiting(v.stack.Load().layers[0].merger); n != 0 {
				t.Errorf("%d chunks wait though all is promoted", n)
			}
			version := func() byte {
				b, err := fs.ReadFile("/s/v/" + journalName)
				if err != nil {
					t.Fatal(err)
				}
				return b[8]
			}
			if n := version(); n != 2 {
				t.Errorf("the journal has version %d", n)
			}
			if err := v.journal.ForgetPromotions(); err == nil {
				t.Error("promotions that count are forgotten")
			}
			if err := finish(v, want); err != nil {
				t.Error(err)
			}
			if n := version(); n != 1 {
				t.Errorf("at the end the journal has version %d", n)
			}
			if err := v.Close(); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestPromotionSwitch: the volume's record counts, then the node's.
func TestPromotionSwitch(t *testing.T) {
	for _, c := range []struct {
		node   bool
		volume string
		want   bool
	}{{false, "", false}, {true, "", true}, {false, PromotionOn, true}, {true, PromotionOff, false}} {
		v, _, _ := promotionRig(t, cowgen.Spec{Blocks: 32, Replaces: 8}, Spec{ReadPromotion: c.volume}, Config{ReadPromotion: c.node})
		if _, err := readAll(v); err != nil {
			t.Fatal(err)
		}
		if got := v.promotion.waiting(v.stack.Load().layers[0].merger) > 0; got != c.want {
			t.Errorf("node %v, volume %q: promotes %v", c.node, c.volume, got)
		}
		if err := v.Close(); err != nil {
			t.Error(err)
		}
	}
	if _, err := ParsePromotion("yes"); err == nil {
		t.Error("yes is a value of read promotion")
	}
}

// TestPromotionRefused: what cannot be promoted is not tried again as long as nothing
// is committed.
func TestPromotionRefused(t *testing.T) {
	// All blocks that replace ops may write are sources of copies.
	v, _, im := promotionRig(t, cowgen.Spec{Blocks: 32, Ops: cowgen.Shift(0, 31, 1), Replaces: 1}, Spec{}, Config{ReadPromotion: true, chunkBlocks: 1})
	defer v.Close()
	m := v.stack.Load().layers[0].merger
	for range 2 {
		if _, err := readAll(v); err != nil {
			t.Fatal(err)
		}
		promoteAll(t, v)
		if n := v.Counters().MergePromoted; n != 0 {
			t.Errorf("%d bytes were promoted", n)
		}
	}
	if _, err := readAll(v); err != nil {
		t.Fatal(err)
	}
	if n := v.promotion.waiting(m); n != 0 {
		t.Errorf("%d chunks wait again", n)
	}
	if err := finish(v, im.Want); err != nil {
		t.Error(err)
	}
}

// TestPromotionFails: an error is reported and the view stays.
func TestPromotionFails(t *testing.T) {
	v, fs, im := promotionRig(t, cowgen.Spec{Blocks: 32, Replaces: 8}, Spec{}, Config{ReadPromotion: true, chunkBlocks: 1})
	defer v.Close()
	if _, err := readAll(v); err != nil {
		t.Fatal(err)
	}
	fs.OnStep(func(s crashfs.Step) error { return syscall.ENOSPC })
	if _, err := v.promote(context.Background()); err == nil {
		t.Error("no error")
	}
	fs.OnStep(nil)
	got, err := readAll(v)
	if err != nil {
		t.Fatal(err)
	}
	if err := cowgen.Check(got, im.Want); err != nil {
		t.Error(err)
	}
}

// TestPromotionInBackground: a started volume promotes by itself, and stops.
func TestPromotionInBackground(t *testing.T) {
	promoted := make(chan struct{}, 1)
	v, fs, im := promotionRig(t, cowgen.Spec{Blocks: 64, Copies: 10, Replaces: 20}, Spec{}, Config{ReadPromotion: true, chunkBlocks: 1, Slots: NewSlots(1)})
	_, release, err := v.cfg.Slots.acquire(context.Background(), func() bool { return false }) // the merge has to wait
	if err != nil {
		t.Fatal(err)
	}
	fs.OnStep(func(s crashfs.Step) error {
		if s.Name == "/s/v/"+journalName {
			select {
			case promoted <- struct{}{}:
			default:
			}
		}
		return nil
	})
	v.Start()
	if _, err := readAll(v); err != nil {
		t.Fatal(err)
	}
	<-promoted
	release()
	v.Stop()
	fs.OnStep(nil)
	if err := finish(v, im.Want); err != nil {
		t.Error(err)
	}
	if err := v.Close(); err != nil {
		t.Error(err)
	}
}
