package volume

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/snapmerge/snapmerge/pkg/cow"
	"github.com/snapmerge/snapmerge/pkg/merge"
	"github.com/snapmerge/snapmerge/pkg/snapshot"
	"github.com/snapmerge/snapmerge/pkg/volume/writelog"
)

// worker is the background work of a volume: merge, then fold, until the stack
// is empty or what is left has to wait.
type worker struct {
	ctx    context.Context
	cancel context.CancelFunc
	done   chan struct{} // closed when the goroutine has ended; nil: not started
	wake   bell

	mu     sync.Mutex
	paused bool
	stop   context.CancelFunc // ends the step that is running
	// stopPromoting ends the promotion that is running, or has run.
	stopPromoting context.CancelFunc
	busy          activity
	lastErr       error
	fails         int   // in a row
	doneAt        int64 // what was committed of the COWs at the last of them, in bytes

	// When work that runs has got something done last, or has begun, as ns of
	// time.Time.UnixNano, and how many bytes of the COWs were committed then.
	progressed atomic.Int64
	committed  atomic.Int64
}

// activity is what the worker is at.
type activity string

const (
	idle    activity = ""
	merging activity = "merging"
	folding activity = "folding"
)

func (w *worker) init() {
	w.ctx, w.cancel = context.WithCancel(context.Background())
	w.wake = newBell()
}

// Start starts background work.
func (v *Volume) Start() {
	v.work.mu.Lock()
	defer v.work.mu.Unlock()
	if v.work.done != nil || v.work.ctx.Err() != nil {
		return
	}
	v.work.paused = v.Record().Paused
	v.work.done = make(chan struct{})
	go v.run()
	v.startPromotion()
}

// started tells whether there is background work beside the calls of Step.
func (v *Volume) started() bool {
	v.work.mu.Lock()
	defer v.work.mu.Unlock()
	return v.work.done != nil
}

// Stop ends background work, within one request of I/O, for good.
func (v *Volume) Stop() {
	v.work.cancel()
	v.work.mu.Lock()
	ends := []chan struct{}{v.work.done, v.promotion.done}
	v.work.mu.Unlock()
	for _, done := range ends {
		if done != nil {
			<-done
		}
	}
	v.freeing.wait()
}

// SetPaused pauses or resumes background work, durably.
func (v *Volume) SetPaused(paused bool) error {
	if err := v.update(func(r *Record) { r.Paused = paused }); err != nil {
		return err
	}
	w := &v.work
	w.mu.Lock()
	w.paused = paused
	for _, stop := range []context.CancelFunc{w.stop, w.stopPromoting} {
		if paused && stop != nil {
			stop()
		}
	}
	w.mu.Unlock()
	w.wake.ring()
	v.promotion.wake.ring()
	return nil
}

const (
	retryFirst = time.Second
	retryMost  = time.Minute
)

func (v *Volume) run() {
	w := &v.work
	defer close(w.done)
	for w.ctx.Err() == nil {
		more, err := v.Step(w.ctx)
		if more && err == nil {
			continue
		}
		var retry <-chan time.Time
		if err != nil {
			v.cfg.Log.Error(err, "Background work failed", "volume", v.ID())
			retry = time.After(v.retryIn())
		}
		select {
		case <-w.ctx.Done():
		case <-w.wake:
		case <-retry:
		}
	}
}

// retryIn is how long to wait after the last failure.
func (v *Volume) retryIn() time.Duration {
	v.work.mu.Lock()
	defer v.work.mu.Unlock()
	return min(retryFirst<<min(max(v.work.fails-1, 0), 10), retryMost)
}

// Step does one unit of background work: a merge until it is done or stopped, a
// fold, a layer dropped. It tells whether there may be more to do at once. The
// worker that Start starts calls it; tests call it by themselves.
func (v *Volume) Step(ctx context.Context) (more bool, err error) {
	w := &v.work
	ctx, stop, ok := w.begin(ctx, &w.stop)
	if !ok {
		return false, nil
	}
	defer stop()

	more, err = v.step(ctx)

	done, _ := v.cowBytes()
	w.mu.Lock()
	w.stop = nil
	w.busy = idle
	if err != nil && ctx.Err() != nil {
		// Stopped or paused, not failed.
		more, err = false, nil
	}
	if err != nil {
		if done > w.doneAt {
			w.lastErr, w.fails = nil, 0 // it had gone on
		}
		v.counts.failures.Add(1)
		if transient(err) && (w.lastErr == nil || !transient(w.lastErr)) {
			v.counts.stalls.Add(1)
		}
		w.lastErr, w.fails, w.doneAt = err, w.fails+1, done
	} else {
		w.lastErr, w.fails = nil, 0
	}
	w.mu.Unlock()
	return more, err
}

// begin has a pause end the context that it returns, by *stop; false: work is paused.
func (w *worker) begin(ctx context.Context, stop *context.CancelFunc) (_ context.Context, cancel context.CancelFunc, ok bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.paused {
		return nil, nil, false
	}
	ctx, cancel = context.WithCancel(ctx)
	*stop = cancel
	return ctx, cancel, true
}

func (v *Volume) step(ctx context.Context) (more bool, err error) {
	st := v.stack.Load()
	if len(st.layers) == 0 {
		v.handOver()
		return false, nil
	}
	if v.failed() != nil || v.Record().ReadOnly && st.layers[0].log != nil {
		return false, nil
	}
	low := st.layers[0]
	if low.cow != nil {
		switch {
		case low.merger == nil:
			return true, v.beginMerge(low)
		case !low.merger.Done():
			return true, low.named(v.merge(ctx, low.merger))
		}
		return true, v.dropMerged(low)
	}
	if c := v.Record().Cut; c != nil && low.id >= c.Layer {
		return false, nil // waits for the encoder
	}
	v.setBusy(folding)
	if len(st.layers) > 1 {
		return true, v.foldSealed(ctx, low)
	}
	return true, v.foldTop(ctx, low)
}

func (v *Volume) setBusy(a activity) {
	v.work.mu.Lock()
	v.work.busy = a
	v.work.mu.Unlock()
	v.work.progressed.Store(time.Now().UnixNano())
}

// DefaultStalledAfter is more than it takes to write a window at the lowest rate.
const DefaultStalledAfter = time.Minute

// noteProgress is called often enough while a merge goes on.
func (v *Volume) noteProgress(now time.Time) {
	done, _ := v.cowBytes()
	if v.work.committed.Swap(done) != done {
		v.work.progressed.Store(now.UnixNano())
	}
}

// stuck is for how long work that runs has got nothing done, if that is too long; a
// merge that is at its floor rate gets something done.
func (v *Volume) stuck(now time.Time) time.Duration {
	v.noteProgress(now)
	limit := v.cfg.StalledAfter
	if limit == 0 {
		limit = DefaultStalledAfter
	}
	if d := now.Sub(time.Unix(0, v.work.progressed.Load())); d >= limit {
		return d
	}
	return 0
}

// merge runs the merge of the lowest layer when one of the node's slots is free,
// for as long as its turn lasts.
func (v *Volume) merge(ctx context.Context, m *merge.Merger) error {
	// A log that has to get shorter cannot wait for others' merges.
	turn, release, err := v.cfg.Slots.acquire(ctx, v.mustShrink)
	if err != nil {
		return err
	}
	defer release()
	v.setBusy(merging)
	return m.RunTurn(ctx, turn.over)
}

// beginMerge gives the lowest layer, a COW, the merger that it could not be given when the
// one below it was dropped.
func (v *Volume) beginMerge(low *layer) error {
	v.changing.Lock()
	defer v.changing.Unlock()
	if v.stack.Load().layers[0] != low {
		return nil
	}
	return v.reopenMerger()
}

// dropMerged drops the lowest layer, a COW that is merged.
func (v *Volume) dropMerged(low *layer) error {
	v.changing.Lock()
	defer v.changing.Unlock()
	if v.stack.Load().layers[0] != low {
		return nil
	}
	return v.dropLowest()
}

// transient tells whether err means that work can go on where it stands once
// something outside has changed: space, a request to go on.
func transient(err error) bool {
	return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT)
}

// corrupt tells whether err means that a snapshot's data is damaged.
func corrupt(err error) bool {
	var f *cow.FormatError
	return errors.As(err, &f) || errors.Is(err, snapshot.ErrMismatch) || errors.Is(err, snapshot.ErrIndex)
}

// damaged tells whether err means that data of the volume is lost: a snapshot's
// or its own.
func damaged(err error) bool {
	return corrupt(err) || errors.Is(err, writelog.ErrDamaged) || errors.Is(err, merge.ErrDamaged) || errors.Is(err, ErrRecord)
}
