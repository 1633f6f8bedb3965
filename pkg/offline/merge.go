// Package offline works on plain files and devices without a volume: it merges
// a COW into a base, verifies it, inspects it, and extracts its view.
package offline

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"time"

	"github.com/google/uuid"
	"golang.org/x/time/rate"

	"github.com/snapmerge/snapmerge/pkg/blockio"
	"github.com/snapmerge/snapmerge/pkg/cow"
	"github.com/snapmerge/snapmerge/pkg/merge"
	"github.com/snapmerge/snapmerge/pkg/snapshot"
)

const bs = blockio.BlockSize

// commitEvery is longer than where a guest waits for commits.
const commitEvery = 5 * time.Second

// MergeOptions say what to merge and how.
type MergeOptions struct {
	Base, COW string
	// Journal is where progress is kept; empty: in the COW itself, as Android
	// does.
	Journal string
	// Label opens an unfinished COW at a label.
	Label *uint64
	IO    blockio.Kind
	// NoReadAhead merges without scratch space.
	NoReadAhead bool
	// Reflink has copies share space where the base's file system can.
	Reflink bool
	// Window is the size of merge windows of a new journal in bytes; 0: the
	// default.
	Window int64
	// Rate limits the merge to so many MiB/s; 0: no limit.
	Rate int
	// Verify compares the base with the view that there was before.
	Verify bool
	// Progress, if set, is called now and then.
	Progress func(merge.Stats)
	// FS is the file system; nil: the real one.
	FS blockio.FS
}

// MergeResult is what a merge did. The JSON keys are those of the command.
type MergeResult struct {
	Done         bool    `json:"done"`
	Seconds      float64 `json:"seconds"` // from the opening to the last commit
	Ops          uint64  `json:"ops"`
	Blocks       uint64  `json:"blocks"` // written to the base
	BytesRead    uint64  `json:"bytes_read"`
	BytesWritten uint64  `json:"bytes_written"` // to the base
	ScratchBytes uint64  `json:"scratch_bytes"`
	Flushes      uint64  `json:"flushes"`
	Windows      uint64  `json:"windows"` // of ordered ops
	IO           string  `json:"io"`
	Resumes      uint64  `json:"resumes"`
}

// BaseError says that a base cannot be used with a COW, or with any.
type BaseError struct {
	File string
	Size int64 // bytes
	err  error
}

func (e *BaseError) Error() string { return fmt.Sprintf("%s: byte %d: %v", e.File, e.Size, e.err) }

// Unwrap returns the rule that is broken.
func (e *BaseError) Unwrap() error { return e.err }

// CheckBase refuses a base that is not made of whole blocks or that the ops read
// or write past the end of, with a *BaseError. ops may be nil.
func CheckBase(base blockio.File, ops cow.Ops) error {
	size := base.Size()
	if size == 0 || size%bs != 0 {
		return &BaseError{base.Name(), size, fmt.Errorf("the base ends here, but its size must be a multiple of %d above 0", bs)}
	}
	if ops == nil {
		return nil
	}
	if err := merge.CheckBase(ops, size); err != nil {
		return &BaseError{base.Name(), size, err}
	}
	return nil
}

// DifferenceError says where two images differ.
type DifferenceError struct {
	What string
	Off  int64 // first byte of the first block that differs; -1: unknown
}

func (e *DifferenceError) Error() string {
	if e.Off < 0 {
		return e.What
	}
	return fmt.Sprintf("byte %d (block %d): %s", e.Off, e.Off/bs, e.What)
}

// merging is the state of one call of Merge.
type merging struct {
	o       MergeOptions
	base    blockio.File
	journal *merge.Journal
	m       *merge.Merger
	epoch   *merge.Epoch
	closers []io.Closer
	started time.Time // when the base was ours
}

// Merge merges the COW into the base, or goes on with a merge that was
// interrupted. With ctx ended it stops, resumable, with ctx's error. The result
// is valid, as far as the merge got, also with an error.
func Merge(ctx context.Context, o MergeOptions) (res MergeResult, err error) {
	if o.FS == nil {
		o.FS = blockio.OS()
	}
	g := &merging{o: o, epoch: merge.NewEpoch()}
	defer func() { err = errors.Join(err, g.close()) }()
	if err := g.open(ctx); err != nil {
		return res, err
	}
	var before [sha256.Size]byte
	if o.Verify {
		if before, err = g.hash(ctx, g.view()); err != nil {
			return res, err
		}
	}
	defer boundGarbage()()
	err = inFile(o.COW, g.run(ctx))
	s := g.m.Stats()
	res = MergeResult{
		Done: g.m.Done(), Seconds: time.Since(g.started).Seconds(), Ops: s.Ops, Blocks: s.BlocksWritten,
		BytesRead: s.BytesRead, BytesWritten: s.BytesWritten, ScratchBytes: s.ScratchBytes, Flushes: s.Flushes, Windows: s.Windows,
		IO: string(g.m.IO()), Resumes: s.Resumes,
	}
	if err != nil || !o.Verify {
		return res, err
	}
	after, err := g.hash(ctx, g.base)
	if err == nil && after != before {
		err = &DifferenceError{What: "the merged base is not the view that there was before", Off: -1}
	}
	return res, err
}

func (g *merging) open(ctx context.Context) (err error) {
	if g.base, err = g.openOwned(ctx, g.o.Base, blockio.Direct); err != nil {
		return err
	}
	g.started = time.Now()
	var pace func(ctx context.Context, n int) error
	if mib := g.o.Rate; mib > 0 {
		l := rate.NewLimiter(rate.Limit(mib<<20), mib<<20)
		pace = l.WaitN
	}
	cfg := merge.Config{
		Base: g.base, Epoch: g.epoch, IO: g.o.IO, NoReadAhead: g.o.NoReadAhead, Reflink: g.o.Reflink, Pace: pace, CommitEvery: commitEvery,
	}
	if g.o.Journal == "" {
		return g.openInPlace(ctx, cfg)
	}
	return g.openJournaled(ctx, cfg)
}

// openOwned opens a file and makes sure that nobody else does.
func (g *merging) openOwned(ctx context.Context, name string, flag blockio.Flag) (f blockio.File, err error) {
	err = WhileLocked(ctx, func() error {
		if f, err = g.o.FS.Open(name, flag); err != nil {
			return err
		}
		if err := f.Lock(); err != nil {
			return errors.Join(err, f.Close())
		}
		g.closers = append(g.closers, f)
		return nil
	})
	return f, err
}

const (
	lockPatience = 5 * time.Second
	lockRetry    = 50 * time.Millisecond
)

// WhileLocked calls fn until it finds no other owner, for some seconds at most:
// a process that was killed keeps its locks until its last I/O has ended.
func WhileLocked(ctx context.Context, fn func() error) error {
	for end := time.Now().Add(lockPatience); ; {
		err := fn()
		if !errors.Is(err, blockio.ErrLocked) || time.Now().After(end) {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(lockRetry):
		}
	}
}

func (g *merging) openInPlace(ctx context.Context, cfg merge.Config) error {
	if err := merge.CheckUnclaimed(g.base); err != nil {
		return err
	}
	f, err := g.openOwned(ctx, g.o.COW, blockio.Direct)
	if err != nil {
		return err
	}
	file, err := cow.Open(f, f.Size(), cow.OpenOptions{Label: g.o.Label})
	if err != nil {
		return fmt.Errorf("%s: %w", g.o.COW, err)
	}
	t, err := file.Load()
	if err != nil {
		return fmt.Errorf("%s: %w", g.o.COW, err)
	}
	if err := CheckBase(g.base, t); err != nil {
		return err
	}
	cfg.Ops, cfg.COW = t, f
	if g.m, err = merge.OpenInPlace(cfg, file, f); err != nil {
		return fmt.Errorf("%s: %w", g.o.COW, err)
	}
	return nil
}

func (g *merging) openJournaled(ctx context.Context, cfg merge.Config) error {
	w, err := snapshot.OpenCOW(g.o.FS, g.o.COW, snapshot.OpenCOWOptions{Label: g.o.Label, CheckIndex: true})
	if err != nil {
		return err
	}
	g.closers = append(g.closers, w)
	if err := CheckBase(g.base, w.Ops); err != nil {
		return err
	}
	cfg.Ops, cfg.COW = w.Ops, w.File
	ok, err := g.o.FS.Exists(g.o.Journal)
	if err != nil {
		return err
	}
	if !ok {
		if err := g.createJournal(w); err != nil {
			return err
		}
	}
	err = WhileLocked(ctx, func() (err error) {
		g.journal, err = merge.OpenJournal(g.o.FS, g.o.Journal)
		return err
	})
	if err != nil {
		return err
	}
	g.closers = append(g.closers, g.journal)
	if g.m, err = merge.OpenJournaled(cfg, g.journal, 1, w.Identity); err != nil {
		return inFile(g.o.COW, err)
	}
	if g.m.Done() {
		return merge.CheckMerged(g.base, g.journal)
	}
	return merge.ClaimBase(g.base, g.journal)
}

// createJournal makes the journal of a merge that starts, or that goes on from
// what the COW itself records.
func (g *merging) createJournal(w *snapshot.COW) error {
	if err := merge.CheckUnclaimed(g.base); err != nil {
		return err
	}
	file, err := cow.Open(w.File, w.File.Size(), cow.OpenOptions{Label: g.o.Label})
	if err != nil {
		return fmt.Errorf("%s: %w", g.o.COW, err)
	}
	seed, err := merge.ReadSeed(file, w.File, w.Ops)
	if err != nil {
		return fmt.Errorf("%s: %w", g.o.COW, err)
	}
	window := uint64(merge.DefaultWindowBlocks)
	if g.o.Window > 0 {
		window = uint64(max(g.o.Window/bs, 1))
	}
	return merge.CreateJournal(g.o.FS, filepath.Dir(g.o.Journal), filepath.Base(g.o.Journal), merge.JournalSpec{
		ID: uuid.New(), WindowBlocks: int(min(window, w.Ops.Ordered())), BaseSize: g.base.Size(),
		Layer: 1, Identity: w.Identity, Seed: seed,
	})
}

func (g *merging) run(ctx context.Context) error {
	if g.o.Progress != nil {
		stop := make(chan struct{})
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			tick := time.NewTicker(200 * time.Millisecond)
			defer tick.Stop()
			for {
				select {
				case <-tick.C:
					g.o.Progress(g.m.Stats())
				case <-stop:
					g.o.Progress(g.m.Stats())
					return
				}
			}
		}()
		defer func() {
			close(stop)
			<-ended
		}()
	}
	if err := g.m.Run(ctx); err != nil {
		return err
	}
	if g.journal == nil {
		return nil
	}
	id, err := merge.Claim(g.base)
	if err != nil || id != g.journal.ID() {
		return err
	}
	if err := merge.MarkMerged(g.base, g.journal); err != nil {
		return err
	}
	return merge.ReleaseBase(g.base)
}

func (g *merging) close() error {
	if g.m != nil {
		g.m.Close()
	}
	var errs []error
	for _, c := range g.closers {
		errs = append(errs, c.Close())
	}
	return errors.Join(errs...)
}
