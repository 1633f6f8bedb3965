package volume

import (
	"context"
	"errors"
	"fmt"
	"syscall"
	"time"

	"github.com/snapmerge/snapmerge/pkg/blockio"
	"github.com/snapmerge/snapmerge/pkg/volume/writelog"
)

const (
	// closedGateBytes is the most live data that is folded while guest writes
	// wait (design, rule 8).
	closedGateBytes = 4 << 20
	// foldBytes and foldExtents bound one batch of a fold.
	foldBytes   = 1 << 20
	foldExtents = 1024
	foldDepth   = 32
	// patience is how often a log is put on top of another before guest writes
	// have to slow down so that there is an end.
	patience = 4
)

// foldSealed folds the lowest layer, a log that nothing is written to any more,
// into the base and drops it. Guest writes go on: none goes straight to a block
// that the log has. A crash makes it start again, which is harmless for the same
// reason.
func (v *Volume) foldSealed(ctx context.Context, low *layer) error {
	if err := v.fold(ctx, low.log, v.paceFold); err != nil {
		return err
	}
	v.changing.Lock()
	defer v.changing.Unlock()
	if v.stack.Load().layers[0] != low {
		return nil
	}
	return v.dropLowest()
}

// foldTop deals with a log that is the only layer and still written to. If
// little is in it, it is folded with the gate closed and the stack is empty;
// else it is sealed under a fresh one.
func (v *Volume) foldTop(ctx context.Context, low *layer) error {
	v.changing.Lock()
	defer v.changing.Unlock()
	if st := v.stack.Load(); len(st.layers) != 1 || st.layers[0] != low || v.Record().Cut != nil {
		return nil // a cut came first
	}
	full := false
	if low.log.LiveBytes() > v.closedGateBytes() {
		v.rounds.Add(1)
		err := v.rotate(nil, nil)
		if full = errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT); !full {
			return err
		}
		// No room for a fresh log: all of this one is folded while guest writes
		// wait, for that is what makes room again.
	}
	if err := v.flush(); err != nil {
		return err
	}
	v.gate.Lock()
	defer v.gate.Unlock()
	if low.log.LiveBytes() > 2*v.closedGateBytes() && !full {
		return nil // the guest was faster; again
	}
	if _, err := low.log.Seal(); err != nil {
		return err
	}
	// Neither cut short nor slowed down: the guest waits.
	err := v.fold(context.WithoutCancel(ctx), low.log, func(context.Context, int) error { return nil })
	if err == nil {
		err = v.dropLowest()
	}
	if err != nil {
		low.log.Unseal()
		return err
	}
	v.rounds.Store(0)
	return nil
}

// closedGateBytes is the constant of that name, or less for tests that want to
// see small logs rotate.
func (v *Volume) closedGateBytes() int64 {
	if s := v.Record().SegmentBytes; s != 0 {
		return min(s/2, closedGateBytes)
	}
	return closedGateBytes
}

// fold writes what the log holds to the base, in the order of the base, and
// flushes it. pace is called before n bytes are written.
func (v *Volume) fold(ctx context.Context, l *writelog.Log, pace func(ctx context.Context, n int) error) error {
	arena, err := blockio.NewArena(foldBytes)
	if err != nil {
		return err
	}
	defer arena.Close()
	q, err := blockio.NewQueue(v.cfg.IO, foldDepth)
	if err != nil {
		return err
	}
	defer q.Close()
	q.Register(arena)
	f := folder{v: v, l: l, q: q, pace: pace, buf: arena.Bytes()}
	for off := int64(0); ; {
		e, ok := l.Next(off)
		if !ok {
			break
		}
		if off, err = f.add(ctx, e); err != nil {
			return fmt.Errorf("fold of the write log: %w", err)
		}
	}
	if err := f.write(ctx); err != nil {
		return fmt.Errorf("fold of the write log: %w", err)
	}
	return v.base.Flush()
}

// folder collects extents of a log until they are worth a batch.
type folder struct {
	v     *Volume
	l     *writelog.Log
	q     blockio.Queue
	pace  func(ctx context.Context, n int) error
	buf   []byte
	used  int
	batch []blockio.Request
	zeros []writelog.Extent
}

// add takes e, or as much of it as there is room for, and returns where it
// stopped.
func (f *folder) add(ctx context.Context, e writelog.Extent) (end int64, err error) {
	if f.used == len(f.buf) || len(f.batch)+len(f.zeros) >= foldExtents {
		if err := f.write(ctx); err != nil {
			return e.Off, err
		}
	}
	if e.Zero {
		f.zeros = append(f.zeros, e)
		return e.Off + e.N, nil
	}
	p := f.buf[f.used:][:min(e.N, int64(len(f.buf)-f.used))]
	if err := f.l.ReadAt(nothing{}, p, e.Off); err != nil {
		return e.Off, err
	}
	f.used += len(p)
	f.batch = append(f.batch, blockio.Request{Buf: p, Off: e.Off})
	return e.Off + int64(len(p)), nil
}

func (f *folder) write(ctx context.Context) error {
	if err := f.pace(ctx, f.used+len(f.zeros)*bs); err != nil {
		return err
	}
	for _, z := range f.zeros {
		if err := f.v.base.Zero(z.Off, z.N); err != nil {
			return err
		}
	}
	if err := f.q.Write(f.v.base, f.batch); err != nil {
		return err
	}
	f.v.meter.folded.Add(int64(f.used))
	f.v.work.progressed.Store(time.Now().UnixNano())
	f.used, f.batch, f.zeros = 0, f.batch[:0], f.zeros[:0]
	return nil
}

// nothing is what lies below a log that is read only where it has data.
type nothing struct{}

func (nothing) ReadAt([]byte, int64) (int, error) {
	return 0, fmt.Errorf("write log lacks what its index has")
}

// freeDeadSoon gives segments of the top log back, in the background, when it
// is worth it.
func (v *Volume) freeDeadSoon() {
	top := v.stack.Load().top()
	if top == nil || top.log.Bytes() < v.freeAbove() || !v.started() {
		return
	}
	if _, bytes := top.log.Dead(); bytes < v.freeAbove()/2 {
		return
	}
	v.freeing.start(func() {
		if err := v.freeDead(); err != nil {
			v.cfg.Log.Error(err, "Dead segments of the write log were not freed", "volume", v.ID())
		}
	})
}

// freeAbove is the size of a log below which dead segments don't matter.
func (v *Volume) freeAbove() int64 {
	if s := v.Record().SegmentBytes; s != 0 {
		return 2 * s
	}
	return 4 * writelog.DefaultSegment
}

// freeDead gives the segments of the top log back that hold nothing any more:
// recorded first, then, when no reader can look at them, their space.
func (v *Volume) freeDead() error {
	v.changing.Lock()
	defer v.changing.Unlock()
	top := v.stack.Load().top()
	if top == nil {
		return nil
	}
	freed, bytes := top.log.Dead()
	if bytes == 0 {
		return nil
	}
	if err := v.update(func(r *Record) { r.layer(top.id).Log.Freed = freed }); err != nil {
		return err
	}
	v.epoch.Synchronize()
	return top.log.Free(freed)
}
