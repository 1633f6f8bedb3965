package merge

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"syscall"
	"testing"

	"github.com/google/uuid"

	"github.com/snapmerge/snapmerge/pkg/blockio"
	"github.com/snapmerge/snapmerge/pkg/blockio/crashfs"
	"github.com/snapmerge/snapmerge/pkg/cow"
	"github.com/snapmerge/snapmerge/test/cowgen"
	"github.com/snapmerge/snapmerge/test/fixtures"
)

// rig is a merge on some file system: files "base", "cow" and "journal" in
// dir.
type rig struct {
	fsys    blockio.FS
	dir     string
	inPlace bool
	window  int // blocks, of a new journal
	io      blockio.Kind
	label   *uint64
	noRA    bool
	commits bool // after every few independent ops
	reflink bool
	// promote has all that can be promoted before and amid the merge, in turn, in
	// chunks of so many blocks.
	promote int

	base, cowf blockio.File
	epoch      *Epoch
	m          *Merger
	journal    *Journal
}

func (r *rig) path(name string) string { return r.dir + "/" + name }

// write makes a file, durably.
func (r *rig) write(name string, content []byte) error {
	f, err := r.fsys.Open(r.path(name), blockio.Create|blockio.Excl)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(content, 0)
	return errors.Join(err, f.Flush(), f.Close(), r.fsys.SyncDir(r.dir))
}

// open opens the merge, making the journal if there is none.
func (r *rig) open() (err error) {
	defer func() {
		if err != nil {
			r.close()
		}
	}()
	if r.base, err = r.fsys.Open(r.path("base"), blockio.Direct); err != nil {
		return err
	}
	flag := blockio.Flag(0)
	if r.inPlace {
		flag = blockio.Direct
	}
	if r.cowf, err = r.fsys.Open(r.path("cow"), flag); err != nil {
		return err
	}
	file, err := cow.Open(r.cowf, r.cowf.Size(), cow.OpenOptions{Label: r.label})
	if err != nil {
		return err
	}
	ops, err := file.Load()
	if err != nil {
		return err
	}
	r.epoch = NewEpoch()
	cfg := Config{Ops: ops, COW: r.cowf, Base: r.base, Epoch: r.epoch, IO: r.io, NoReadAhead: r.noRA, Reflink: r.reflink, ChunkBlocks: r.promote}
	defer func() {
		if r.m != nil && r.commits {
			r.m.batchBytes, r.m.commitBytes = 4*bs, 2*bs
		}
		if r.m != nil {
			r.m.cloneBlocks = 2
		}
	}()
	if r.inPlace {
		if err := CheckUnclaimed(r.base); err != nil {
			return err
		}
		r.m, err = OpenInPlace(cfg, file, r.cowf)
		return err
	}
	if ok, err := r.fsys.Exists(r.path("journal")); err != nil {
		return err
	} else if !ok {
		if err := CheckUnclaimed(r.base); err != nil {
			return err
		}
		seed, err := ReadSeed(file, r.cowf, ops)
		if err != nil {
			return err
		}
		spec := JournalSpec{ID: uuid.New(), WindowBlocks: r.window, BaseSize: r.base.Size(), Layer: 1, Identity: ops.Identity(), Seed: seed}
		if err := CreateJournal(r.fsys, r.dir, "journal", spec); err != nil {
			return err
		}
	}
	if r.journal, err = OpenJournal(r.fsys, r.path("journal")); err != nil {
		return err
	}
	if r.m, err = OpenJournaled(cfg, r.journal, 1, ops.Identity()); err != nil {
		return err
	}
	if r.m.Done() {
		return nil
	}
	return ClaimBase(r.base, r.journal)
}

func (r *rig) close() {
	if r.m != nil {
		r.m.Close()
	}
	for _, f := range []blockio.File{r.base, r.cowf} {
		if f != nil {
			f.Close()
		}
	}
	if r.journal != nil {
		r.journal.Close()
	}
	r.m, r.base, r.cowf, r.journal = nil, nil, nil, nil
}

func (r *rig) view() ([]byte, error) {
	p := make([]byte, r.base.Size())
	defer r.epoch.Enter().Leave()
	return p, r.m.Layer().ReadAt(r.base, p, 0)
}

func (r *rig) content() ([]byte, error) {
	p := make([]byte, r.base.Size())
	_, err := r.base.ReadAt(p, 0)
	if err == io.EOF {
		err = nil
	}
	return p, err
}

// readSome reads a range beside a merge, and checks it.
func (r *rig) readSome(rng *rand.Rand, want []byte) error {
	const sector, most = 512, 80
	off := rng.Int64N(int64(len(want))/sector) * sector
	p := make([]byte, min(int64(1+rng.IntN(most))*sector, int64(len(want))-off))
	stay := r.epoch.Enter()
	defer stay.Leave()
	if err := r.m.Layer().ReadAt(r.base, p, off); err != nil {
		return err
	}
	if !bytes.Equal(p, want[off:off+int64(len(p))]) {
		return fmt.Errorf("read of %d bytes at %d differs", len(p), off)
	}
	return nil
}

// runInPieces merges to the end, stopping often, and returns how often it ran.
func (r *rig) runInPieces(t testing.TB, rng *rand.Rand) (runs int) {
	for ; !r.m.Done(); runs++ {
		ctx, cancel := context.WithCancel(context.Background())
		left := 1 + rng.IntN(8)
		r.m.cfg.Pace = func(ctx context.Context, n int) error {
			if left--; left == 0 {
				cancel()
			}
			return ctx.Err()
		}
		if err := r.m.Run(ctx); err != nil && !errors.Is(err, context.Canceled) {
			t.Fatal(err)
		}
		cancel()
	}
	return runs
}

// failAt runs do, with the nth step that it makes on disk failing with EIO, and tells
// whether it got there.
func failAt(fs *crashfs.FS, n int64, do func() error) (hit bool, err error) {
	start := fs.Steps()
	fs.OnStep(func(s crashfs.Step) error {
		if hit = hit || s.N == start+n; s.N == start+n {
			return syscall.EIO
		}
		return nil
	})
	err = do()
	fs.OnStep(nil)
	return hit, err
}

// checkAll checks the view, merges to the end, and checks view and base.
func (r *rig) checkAll(want []byte) error {
	if err := r.open(); err != nil {
		return fmt.Errorf("open: %w", err)
	}
	defer r.close()
	got, err := r.view()
	if err != nil {
		return fmt.Errorf("view: %w", err)
	}
	if err := cowgen.Check(got, want); err != nil {
		return fmt.Errorf("view before the merge: %w", err)
	}
	if err := r.runPromoting(want); err != nil {
		return fmt.Errorf("merge: %w", err)
	}
	if !r.m.Done() {
		return errors.New("merge returned before it was done")
	}
	if got, err = r.view(); err != nil {
		return err
	}
	if err := cowgen.Check(got, want); err != nil {
		return fmt.Errorf("view after the merge: %w", err)
	}
	if got, err = r.content(); err != nil {
		return err
	}
	if err := cowgen.Check(got, want); err != nil {
		return fmt.Errorf("base after the merge: %w", err)
	}
	return nil
}

func TestFixtures(t *testing.T) {
	t.Parallel()
	kinds := []blockio.Kind{blockio.Sync}
	if err := blockio.ProbeURing(); err != nil {
		t.Logf("without io_uring: %v", err)
	} else {
		kinds = append(kinds, blockio.URing)
	}
	fixtures.Each(t, func(t *testing.T, c fixtures.Case) {
		cowBytes := c.COW
		if c.Unfinished != nil {
			cowBytes = c.Unfinished
		}
		for _, kind := range kinds {
			for _, inPlace := range []bool{false, true} {
				r := &rig{fsys: blockio.OS(), dir: t.TempDir(), inPlace: inPlace, window: 512, io: kind, label: c.Label}
				if err := errors.Join(r.write("base", c.Base), r.write("cow", cowBytes)); err != nil {
					t.Fatal(err)
				}
				if err := r.checkAll(c.Expected); err != nil {
					t.Errorf("%s, in place %v: %v", kind, inPlace, err)
				}
				// Once more: there is nothing left to do, and nothing is done.
				if err := r.checkAll(c.Expected); err != nil {
					t.Errorf("%s, in place %v, again: %v", kind, inPlace, err)
				}
			}
		}
	})
}

// cases are the small images of the crash enumeration.
func cases(t testing.TB, scratch bool) map[string]cowgen.Spec {
	specs := map[string]cowgen.Spec{
		// Window 2 overwrites exactly the sources of window 1: only the header
		// that commits window 1 first keeps it from being redone from them.
		"next window overwrites sources": {Blocks: 6, Ops: []cowgen.Ordered{{Target: 0, Source: 2 * bs}, {Target: 1, Source: 3 * bs}, {Target: 2, Source: 4 * bs}, {Target: 3, Source: 5 * bs}}, Replaces: 2},
		"shift up":                       {Blocks: 12, Ops: cowgen.Shift(0, 11, 1)},
		"shift down":                     {Blocks: 12, Ops: cowgen.Shift(1, 11, -1)},
		"shift far":                      {Blocks: 14, Ops: cowgen.Shift(0, 8, 5)},
		"shift far, then replace":        {Blocks: 20, Ops: cowgen.Shift(0, 9, 5), Replaces: 2, Zeros: 1},
		"xor onto itself":                {Blocks: 6, Ops: []cowgen.Ordered{{Target: 1, Source: bs, Xor: true}, {Target: 2, Source: 3*bs - 100, Xor: true}, {Target: 4, Source: 4 * bs, Xor: true}}},
		"copy onto itself":               {Blocks: 10, Ops: []cowgen.Ordered{{Target: 2, Source: 2 * bs}, {Target: 3, Source: 3 * bs}, {Target: 0, Source: 4 * bs}, {Target: 1, Source: 5 * bs}, {Target: 4, Source: 4 * bs}}, Replaces: 2},
		"replace and zero":               {Blocks: 16, Replaces: 6, Zeros: 4, MaxBlock: 4 * bs, Compression: cow.LZ4},
		"mixed":                          {Blocks: 20, Copies: 8, Xors: 5, Replaces: 3, Zeros: 2, Compression: cow.Gz},
		"dense":                          {Blocks: 10, Copies: 6, Xors: 4, Compression: cow.Zstd},
	}
	for name, s := range specs {
		s.Scratch = scratch
		specs[name] = s
	}
	if !scratch {
		// Without scratch an op that reads the block it writes cannot be merged.
		delete(specs, "xor onto itself")
		delete(specs, "dense")
		m := specs["mixed"]
		m.Xors = 0
		specs["mixed"] = m
	}
	return specs
}

// enumeration is a merge that is looked at, before every step, as a crash would
// leave it: the view must be unchanged, and the merge must go on to the expected
// end.
type enumeration struct {
	t      testing.TB
	rig    rig
	want   []byte
	rng    *rand.Rand
	images int
	failed bool
}

// run merges what is on fs. depth is how many crashes may follow one another.
func (e *enumeration) run(fs *crashfs.FS, depth, perStep int, history string) error {
	r := e.rig
	r.fsys = fs
	if depth == 0 {
		return r.checkAll(e.want)
	}
	var one sync.Mutex // the next window is staged by a goroutine of its own
	fs.OnStep(func(s crashfs.Step) error {
		one.Lock()
		defer one.Unlock()
		e.crash(fs, depth, perStep, history, s.String())
		return nil
	})
	err := r.checkAll(e.want)
	fs.OnStep(nil)
	e.crash(fs, depth, perStep, history, "the end")
	return err
}

func (e *enumeration) crash(fs *crashfs.FS, depth, perStep int, history, at string) {
	if e.failed {
		return
	}
	for class, image := range fs.CrashImages(perStep, e.rng) {
		e.images++
		// What the process leaves in the page cache when it is killed is the
		// most treacherous start for the next crash.
		deeper := 0
		if depth > 1 && (class == "killed" && e.rng.IntN(6) == 0 || e.rng.IntN(200) == 0) {
			deeper = depth - 1
		}
		h := fmt.Sprintf("%s\ncrash before %s, %s", history, at, class)
		if err := e.run(image, deeper, 3, h); err != nil && !e.failed {
			e.failed = true
			e.t.Errorf("%v%s", err, h)
		}
		if e.failed {
			return
		}
	}
}

// enumerate returns the number of crash images.
func enumerate(t testing.TB, r rig, im cowgen.Image, perStep int, rng *rand.Rand) (images int) {
	t.Helper()
	fs := crashfs.New("/v")
	r.fsys, r.dir, r.io = fs, "/v", blockio.Sync
	if err := errors.Join(r.write("base", im.Base), r.write("cow", im.COW), fs.SyncDir("/")); err != nil {
		t.Fatal(err)
	}
	e := enumeration{t: t, rig: r, want: im.Want, rng: rng}
	if err := e.run(fs, 2, perStep, ""); err != nil {
		t.Errorf("without a crash: %v", err)
	}
	return e.images
}

func TestCrash(t *testing.T) {
	t.Parallel()
	total := 0
	seed := uint64(1)
	for _, mode := range []struct {
		name string
		rig  rig
		file bool // the file has scratch space
	}{
		{"journal", rig{window: 2}, false},
		{"journal, wide windows", rig{window: 5}, false},
		{"journal, many commits", rig{window: 5, commits: true}, false},
		{"journal, reflink", rig{window: 5, reflink: true}, false},
		{"journal, no read-ahead", rig{window: 4, noRA: true}, false},
		{"journal, promotion", rig{window: 3, promote: 1}, false},
		{"journal, promotion, many commits", rig{window: 3, commits: true, promote: 2}, false},
		{"in place", rig{inPlace: true}, true},
		{"in place, many commits", rig{inPlace: true, commits: true}, true},
		{"in place, reflink", rig{inPlace: true, reflink: true}, true},
		{"in place without scratch", rig{inPlace: true}, false},
	} {
		t.Run(mode.name, func(t *testing.T) {
			all := cases(t, mode.file || !mode.rig.inPlace)
			for _, name := range slices.Sorted(maps.Keys(all)) { // so that each has its seed
				spec := all[name]
				spec.Scratch = mode.file
				seed++
				if mode.rig.promote > 0 && spec.Replaces < 3 {
					continue // there is little to promote
				}
				t.Run(name, func(t *testing.T) {
					rng := rand.New(rand.NewPCG(seed, 7))
					im, err := cowgen.Make(rng, spec)
					if err != nil {
						t.Fatal(err)
					}
					per := 20
					if testing.Short() {
						per = 5
					}
					if mode.rig.promote > 0 {
						per /= 2 // it takes many steps
					}
					total += enumerate(t, mode.rig, im, per, rng)
				})
			}
		})
	}
	t.Logf("%d crash images", total)
}

// TestReaders reads all the time while a merge goes on and is stopped and taken
// up again; every read must see the view.
func TestReaders(t *testing.T) {
	rng := rand.New(rand.NewPCG(3, 3))
	im, err := cowgen.Make(rng, cowgen.Spec{Blocks: 600, Copies: 250, Xors: 100, Replaces: 80, Zeros: 12, MaxBlock: 4 * bs, Compression: cow.LZ4})
	if err != nil {
		t.Fatal(err)
	}
	r := &rig{fsys: blockio.OS(), dir: t.TempDir(), window: 16, io: blockio.Sync}
	if err := errors.Join(r.write("base", im.Base), r.write("cow", im.COW), r.open()); err != nil {
		t.Fatal(err)
	}
	defer r.close()
	stop := make(chan struct{})
	errs := make(chan error, 3)
	for i := range 3 {
		go func() {
			rng := rand.New(rand.NewPCG(uint64(i), 9))
			for {
				select {
				case <-stop:
					errs <- nil
					return
				default:
				}
				if err := r.readSome(rng, im.Want); err != nil {
					errs <- err
					return
				}
			}
		}()
	}
	stops := r.runInPieces(t, rng)
	close(stop)
	for range 3 {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
	if stops < 3 {
		t.Errorf("merge was stopped only %d times", stops)
	}
	got, err := r.content()
	if err != nil {
		t.Fatal(err)
	}
	if err := cowgen.Check(got, im.Want); err != nil {
		t.Error(err)
	}
	if s := r.m.Stats(); s.Bytes != s.BytesTotal || s.Ops != s.OpsTotal {
		t.Errorf("stats of a finished merge: %+v", s)
	}
}
