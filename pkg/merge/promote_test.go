package merge

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"

	"github.com/snapmerge/snapmerge/pkg/blockio"
	"github.com/snapmerge/snapmerge/pkg/blockio/crashfs"
	"github.com/snapmerge/snapmerge/pkg/cow"
	"github.com/snapmerge/snapmerge/test/cowgen"
)

// runPromoting merges to the end. If the rig promotes, it promotes chunks before and
// when the merge is about to write, a few times, and looks at the view.
func (r *rig) runPromoting(want []byte) error {
	if r.promote == 0 {
		return r.m.Run(context.Background())
	}
	chunk, chunks := uint64(0), uint64(len(want)/bs/r.promote+1)
	left := 3
	next := func() error {
		if left--; left < 0 {
			return nil
		}
		// Not in the order in which they are merged.
		var some []uint64
		for range 1 + chunks/6 {
			chunk = (chunk + 5) % chunks
			some = append(some, chunk)
		}
		if err := r.m.Promote(some); err != nil {
			return err
		}
		got, err := r.view()
		if err != nil {
			return err
		}
		if err := cowgen.Check(got, want); err != nil {
			return fmt.Errorf("view after a promotion: %w", err)
		}
		return nil
	}
	if err := next(); err != nil {
		return err
	}
	r.m.cfg.Pace = func(context.Context, int) error { return next() }
	return r.m.Run(context.Background())
}

// newRig makes files and opens the merge.
func newRig(t testing.TB, r rig, im cowgen.Image) *rig {
	t.Helper()
	if r.fsys == nil {
		r.fsys = crashfs.New("/v")
	}
	r.dir, r.io = "/v", blockio.Sync
	if err := errors.Join(r.write("base", im.Base), r.write("cow", im.COW), r.fsys.SyncDir("/"), r.open()); err != nil {
		t.Fatal(err)
	}
	return &r
}

func (r *rig) reopen(t testing.TB) {
	t.Helper()
	r.close()
	if err := r.open(); err != nil {
		t.Fatal(err)
	}
}

func allChunks(n int) []uint64 {
	all := make([]uint64, n)
	for i := range all {
		all[i] = uint64(i)
	}
	return all
}

// TestPromoteRule compares what is promoted, at any number of committed ops, with the
// rule itself.
func TestPromoteRule(t *testing.T) {
	promoted, refused := 0, 0
	for seed := range uint64(12) {
		rng := rand.New(rand.NewPCG(seed, 41))
		im, err := cowgen.Make(rng, cowgen.Spec{Blocks: 60, Copies: 10, Xors: 5, Replaces: 12, Zeros: 4, MaxBlock: 4 * bs, Compression: cow.LZ4})
		if err != nil {
			t.Fatal(err)
		}
		size := 1 << rng.IntN(3)
		r := newRig(t, rig{window: 3, promote: size}, im)
		// Stop after some ops.
		left := rng.IntN(8)
		stop := errors.New("stop")
		r.m.cfg.Pace = func(context.Context, int) error {
			if left--; left < 0 {
				return stop
			}
			return nil
		}
		if err := r.m.Run(context.Background()); err != nil && !errors.Is(err, stop) {
			t.Fatal(err)
		}
		if r.m.Done() {
			r.close()
			continue
		}
		ops, committed := r.m.cfg.Ops, r.m.layer.Committed()
		written, read := map[uint64]bool{}, map[uint64]bool{}
		for pos := committed; pos < ops.Len(); pos++ {
			op, err := ops.At(pos)
			if err != nil {
				t.Fatal(err)
			}
			if op.Type.Ordered() {
				first, n := op.SourceBlocks()
				for i := range uint64(n) {
					read[first+i] = true
				}
				continue
			}
			for i := range uint64(op.Blocks) {
				written[op.NewBlock+i] = true
			}
		}
		// Sources of ops that were committed since somebody looked count, too.
		if committed < ops.Ordered() {
			for b := range uint64(60) {
				if r.m.layer.sources.Load() != nil && r.m.layer.sources.Load().any(b, 1) {
					read[b] = true
				}
			}
		}
		before := r.m.Stats().Bytes
		if err := r.m.Promote(allChunks(60 / size)); err != nil {
			t.Fatal(err)
		}
		count := uint64(0)
		for c := range uint64(60 / size) {
			want, some := true, uint64(0)
			for b := c * uint64(size); b < (c+1)*uint64(size); b++ {
				if written[b] {
					some++
					want = want && !read[b]
				}
			}
			want = want && some > 0
			if got := r.m.layer.Promoted(c*uint64(size), uint64(size)); got != want {
				t.Errorf("seed %d, %d ops committed: chunk %d promoted: %v, want %v", seed, committed, c, got, want)
			}
			if want {
				count += some
				promoted++
			} else if some > 0 {
				refused++
			}
		}
		if got := r.m.Stats().Bytes - before; got != count*bs {
			t.Errorf("seed %d: %d bytes more are merged, %d were promoted", seed, got, count*bs)
		}
		bytes := r.m.Stats().Bytes
		r.reopen(t)
		if got := r.m.Stats().Bytes; got != bytes {
			t.Errorf("seed %d: %d bytes are merged after reopening, %d before", seed, got, bytes)
		}
		if err := r.m.Run(context.Background()); err != nil {
			t.Fatal(err)
		}
		if s := r.m.Stats(); s.Bytes != s.BytesTotal {
			t.Errorf("seed %d: stats of a finished merge: %+v", seed, s)
		}
		r.close()
		if err := r.checkAll(im.Want); err != nil {
			t.Errorf("seed %d: %v", seed, err)
		}
	}
	if promoted < 20 || refused < 5 {
		t.Errorf("%d chunks promoted, %d refused", promoted, refused)
	}
}

// TestPromotedIsLeftAlone: what a guest writes to a promoted block is neither merged
// over nor lost at a restart.
func TestPromotedIsLeftAlone(t *testing.T) {
	for i, size := range []int{1, 2, 16, 1, 2} {
		im, err := cowgen.Make(rand.New(rand.NewPCG(3, uint64(size))), cowgen.Spec{Blocks: 96, Copies: 12, Replaces: 20, Zeros: 6, MaxBlock: 4 * bs, Compression: cow.Zstd})
		if err != nil {
			t.Fatal(err)
		}
		r := newRig(t, rig{window: 4, promote: size}, im)
		want := bytes.Clone(im.Want)
		guest := func() (n int) {
			for b := range uint64(96) {
				ok, err := r.m.layer.Settled(b, 1)
				if err != nil {
					t.Fatal(err)
				}
				if !ok || !r.m.layer.Promoted(b, 1) {
					continue
				}
				n++
				p := bytes.Repeat([]byte{byte(b), byte(n)}, bs/2)
				if _, err := r.base.WriteAt(p, int64(b)*bs); err != nil {
					t.Fatal(err)
				}
				copy(want[b*bs:], p)
			}
			return n
		}
		wrote := 0
		if i < 3 { // else all is promoted amid the merge
			if err := r.m.Promote(allChunks(96)); err != nil {
				t.Fatal(err)
			}
			wrote = guest()
		}
		if err := r.base.Flush(); err != nil {
			t.Fatal(err)
		}
		// Progress as of before the promotion, for the ordered ops.
		r.reopen(t)
		r.m.batchBytes, r.m.commitBytes = 4*bs, 2*bs
		n := 0
		r.m.cfg.Pace = func(context.Context, int) error {
			if n++; n%3 == 0 {
				err := r.m.Promote(allChunks(96))
				wrote += guest()
				return err
			}
			return nil
		}
		if err := r.m.Run(context.Background()); err != nil {
			t.Fatal(err)
		}
		got, err := r.content()
		if err != nil {
			t.Fatal(err)
		}
		if err := cowgen.Check(got, want); err != nil {
			t.Errorf("chunks of %d: %v", size, err)
		}
		if wrote == 0 && size < 16 {
			t.Errorf("chunks of %d: the guest wrote nothing", size)
		}
		r.close()
	}
}

// TestPromoteErrors fails every step of a promotion. The view stays, the promotion can
// be tried again, and the merge goes on to the right end.
func TestPromoteErrors(t *testing.T) {
	im, err := cowgen.Make(rand.New(rand.NewPCG(6, 6)), cowgen.Spec{Blocks: 30, Copies: 4, Replaces: 8, Zeros: 3})
	if err != nil {
		t.Fatal(err)
	}
	for fail := int64(1); ; fail++ {
		fs := crashfs.New("/v")
		r := newRig(t, rig{fsys: fs, window: 3, promote: 2}, im)
		hit, err := failAt(fs, fail, func() error { return r.m.Promote(allChunks(15)) })
		if hit != errors.Is(err, syscall.EIO) || !hit && err != nil {
			t.Fatalf("step %d failed: %v", fail, err)
		}
		if hit && r.m.layer.Promoted(0, 30) {
			t.Errorf("step %d failed: something is promoted", fail)
		}
		got, err := r.view()
		if err != nil {
			t.Fatal(err)
		}
		if err := cowgen.Check(got, im.Want); err != nil {
			t.Fatalf("step %d failed: view: %v", fail, err)
		}
		r.reopen(t) // after a failed flush nothing else is possible
		if err := r.m.Promote(allChunks(15)); err != nil || !r.m.layer.Promoted(0, 30) {
			t.Fatalf("step %d failed, again: %v", fail, err)
		}
		r.close()
		if err := r.checkAll(im.Want); err != nil {
			t.Fatalf("step %d failed, reopened: %v", fail, err)
		}
		if !hit {
			break
		}
	}
}

// TestPromoteFullDisk: no room for promotions is an error, leaves others what room there
// is, and the merge goes on.
func TestPromoteFullDisk(t *testing.T) {
	im, err := cowgen.Make(rand.New(rand.NewPCG(6, 7)), cowgen.Spec{Blocks: 30, Replaces: 8})
	if err != nil {
		t.Fatal(err)
	}
	fs := crashfs.New("/v")
	r := newRig(t, rig{fsys: fs, promote: 1}, im)
	fs.SetCapacity(bs)
	if err := r.m.Promote(allChunks(30)); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("full disk: %v", err)
	}
	fs.SetCapacity(0)
	before := r.journal.f.Size()
	fs.SetCapacity(fs.Used() + bs)
	if _, err := r.journal.reservePromotions(2*blockChunks, 1); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("room for half of the promotions: %v", err)
	}
	if err := r.write("other", make([]byte, bs)); err != nil || r.journal.f.Size() != before {
		t.Errorf("the journal keeps room that it cannot use: it has %d bytes, had %d; %v", r.journal.f.Size(), before, err)
	}
	fs.SetCapacity(0)
	r.close()
	r.promote = 0
	if err := r.checkAll(im.Want); err != nil {
		t.Error(err)
	}
}

func TestPromoteInPlace(t *testing.T) {
	im, err := cowgen.Make(rand.New(rand.NewPCG(6, 8)), cowgen.Spec{Blocks: 30, Replaces: 8, Scratch: true})
	if err != nil {
		t.Fatal(err)
	}
	r := newRig(t, rig{inPlace: true}, im)
	defer r.close()
	if err := r.m.Promote(allChunks(30)); !errors.Is(err, ErrCannotPromote) {
		t.Errorf("in place: %v", err)
	}
}

// TestPromoteRace promotes beside a merge that is stopped and taken up again, while
// readers read.
func TestPromoteRace(t *testing.T) {
	rng := rand.New(rand.NewPCG(3, 5))
	im, err := cowgen.Make(rng, cowgen.Spec{Blocks: 900, Copies: 250, Xors: 50, Replaces: 120, Zeros: 30, MaxBlock: 4 * bs, Compression: cow.LZ4})
	if err != nil {
		t.Fatal(err)
	}
	r := &rig{fsys: blockio.OS(), dir: t.TempDir(), window: 16, io: blockio.Sync, promote: 4, commits: true}
	if err := errors.Join(r.write("base", im.Base), r.write("cow", im.COW), r.open()); err != nil {
		t.Fatal(err)
	}
	defer r.close()
	stop := make(chan struct{})
	var wg sync.WaitGroup
	loop := func(seed uint64, do func(rng *rand.Rand) error) {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(seed, 9))
			for {
				select {
				case <-stop:
					return
				default:
				}
				if err := do(rng); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	for i := range uint64(2) {
		loop(i, func(rng *rand.Rand) error { return r.readSome(rng, im.Want) })
		loop(i+10, func(rng *rand.Rand) error {
			return r.m.Promote([]uint64{rng.Uint64N(230), rng.Uint64N(230)})
		})
	}
	r.runInPieces(t, rng)
	close(stop)
	wg.Wait()
	got, err := r.content()
	if err != nil {
		t.Fatal(err)
	}
	if err := cowgen.Check(got, im.Want); err != nil {
		t.Error(err)
	}
	if s := r.m.Stats(); s.Bytes != s.BytesTotal || r.m.counters.Promoted.Load() == 0 {
		t.Errorf("stats of a finished merge: %+v, %d promoted", s, r.m.counters.Promoted.Load())
	}
}

// TestTakeWaits: Run does not take an op that is being promoted, and takes it when that
// is over.
func TestTakeWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := &Merger{}
		e := &m.early
		e.ended.L = &e.mu
		e.claims = claims{blocks: 4, chunks: []uint64{3}}
		took := atomic.Uint64{}
		go func() {
			e.take(cow.Op{NewBlock: 16, Blocks: 4}, 6) // behind the chunk
			took.Store(6)
			e.take(cow.Op{NewBlock: 8, Blocks: 5}, 7) // reaches into it
			took.Store(7)
		}()
		synctest.Wait()
		if n := took.Load(); n != 6 || e.planned != 7 {
			t.Errorf("op %d was taken, %d are planned", n, e.planned)
		}
		m.unclaim()
		synctest.Wait()
		if n := took.Load(); n != 7 || e.planned != 8 {
			t.Errorf("after the promotion op %d was taken, %d are planned", n, e.planned)
		}
	})
}

// TestLoadPromoted: what is promoted is not loaded.
func TestLoadPromoted(t *testing.T) {
	im, err := cowgen.Make(rand.New(rand.NewPCG(6, 11)), cowgen.Spec{Blocks: 32, Copies: 4, Replaces: 12})
	if err != nil {
		t.Fatal(err)
	}
	r := newRig(t, rig{window: 3, promote: 16}, im)
	defer r.close()
	load := func(whole bool) (have, until uint64) {
		t.Helper()
		have, until, apart, err := r.m.layer.Load(r.base, make([]byte, 16*bs), 0, whole)
		if err != nil || apart {
			t.Fatal(apart, err)
		}
		return have, until
	}
	for r.m.layer.Committed() < r.m.cfg.Ops.Ordered() { // so that nothing is apart, and all can be promoted
		w, err := planRange(r.m.cfg.Ops, r.m.layer.Committed(), r.m.cfg.Ops.Ordered())
		if err != nil {
			t.Fatal(err)
		}
		r.m.layer.state.Store(&state{committed: w.end})
	}
	if have, _ := load(false); have == 0 {
		t.Fatal("nothing to load")
	}
	if before, err := r.m.layer.Unwritten(0, 16); err != nil || before == 0 {
		t.Fatal(before, err)
	}
	if err := r.m.Promote(allChunks(1)); err != nil {
		t.Fatal(err)
	}
	if have, until := load(false); have != 0 || until == 0 {
		t.Errorf("blocks %x are loaded until %d", have, until)
	}
	if after, err := r.m.layer.Unwritten(0, 16); err != nil || after != 0 {
		t.Errorf("blocks %x are said to be written still: %v", after, err)
	}
}

// TestPromoteDrains: the base is not written to as long as a reader may go by an earlier
// state, in which a block can be the source of an op that is committed by now.
func TestPromoteDrains(t *testing.T) {
	im, err := cowgen.Make(rand.New(rand.NewPCG(6, 12)), cowgen.Spec{Blocks: 32, Replaces: 12})
	if err != nil {
		t.Fatal(err)
	}
	synctest.Test(t, func(t *testing.T) {
		fs := crashfs.New("/v")
		r := newRig(t, rig{fsys: fs, promote: 16}, im)
		defer r.close()
		var writes atomic.Uint64
		fs.OnStep(func(s crashfs.Step) error {
			if s.Name == "/v/base" {
				writes.Add(1)
			}
			return nil
		})
		stay := r.epoch.Enter()
		var done atomic.Bool
		go func() {
			if err := r.m.Promote(allChunks(2)); err != nil {
				t.Error(err)
			}
			done.Store(true)
		}()
		synctest.Wait()
		if writes.Load() != 0 || done.Load() {
			t.Error("the base was written to before the reader had left")
		}
		stay.Leave()
		synctest.Wait()
		if writes.Load() == 0 || !done.Load() || !r.m.layer.Promoted(0, 32) {
			t.Error("nothing was promoted after the reader had left")
		}
	})
}
