package volume

import (
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/snapmerge/snapmerge/pkg/blockio"
)

var (
	// ErrCutInFlight says that a snapshot of the volume is still being encoded.
	ErrCutInFlight = errors.New("another snapshot of the volume is being made")
	// ErrCutEnded says that there is no frozen view any more.
	ErrCutEnded = errors.New("the cut has ended")
)

// Cut freezes the view as it is at one moment between the call and its return,
// for the snapshot of that id (design, rule 3). freeze, if not nil, freezes the
// guest's file system and returns how to thaw it. A cut that is in flight for
// the same snapshot is no error.
func (v *Volume) Cut(id string, freeze func() (thaw func(), err error)) error {
	return v.cut(CutRecord{Snapshot: id}, freeze)
}

func (v *Volume) cut(cut CutRecord, freeze func() (thaw func(), err error)) error {
	v.changing.Lock()
	defer v.changing.Unlock()
	if err := v.failed(); err != nil {
		return err
	}
	if c := v.Record().Cut; c != nil {
		if c.Snapshot == cut.Snapshot {
			return nil
		}
		return fmt.Errorf("%w: %s", ErrCutInFlight, c.Snapshot)
	}
	if err := v.comeBack(); err != nil {
		return err
	}
	return v.rotate(&cut, freeze)
}

// EndCut ends the cut for the snapshot, which is encoded or given up.
func (v *Volume) EndCut(id string) error {
	v.changing.Lock()
	defer v.changing.Unlock()
	if c := v.Record().Cut; c == nil || c.Snapshot != id {
		return nil
	}
	err := v.update(func(r *Record) { r.Cut = nil })
	v.work.wake.ring()
	return err
}

// Frozen is the view below a cut. It stays the same until EndCut, whatever is
// written, merged or folded meanwhile; after that there is nothing to read but
// ErrCutEnded.
type Frozen struct {
	v    *Volume
	cut  CutRecord
	size int64
}

// Frozen returns the frozen view of the cut that is in flight, or nil.
func (v *Volume) Frozen() *Frozen {
	c := v.Record().Cut
	if c == nil {
		return nil
	}
	return &Frozen{v: v, cut: *c, size: c.Size}
}

// Size is the volume's size at the cut, in bytes.
func (f *Frozen) Size() int64 { return f.size }

// Time is the moment of the cut.
func (f *Frozen) Time() time.Time { return f.cut.Time }

// Snapshot is the id of the snapshot that the view is of.
func (f *Frozen) Snapshot() string { return f.cut.Snapshot }

// ReadAt reads the frozen view.
func (f *Frozen) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 || off%blockio.SectorSize != 0 || len(p)%blockio.SectorSize != 0 || off > f.size-int64(len(p)) {
		return 0, fmt.Errorf("read of %d bytes at %d of a frozen view of %d", len(p), off, f.size)
	}
	defer f.v.epoch.Enter().Leave()
	n, err := f.v.stack.Load().below(f.cut.Layer).ReadAt(p, off)
	if f.ended() {
		return 0, fmt.Errorf("read of the frozen view of snapshot %s: %w", f.cut.Snapshot, ErrCutEnded)
	}
	return n, err
}

// ended tells whether the cut is over. What was read before it says no is frozen:
// nothing is written or folded below a cut that the record has, and no later cut
// is above the same layer.
func (f *Frozen) ended() bool {
	c := f.v.Record().Cut
	return c == nil || c.Snapshot != f.cut.Snapshot || c.Layer != f.cut.Layer
}

// NextData returns the first range at or after off that may hold anything but
// zeros; io.EOF if there is none.
func (f *Frozen) NextData(off int64) (start, end int64, err error) {
	if off >= f.size {
		return 0, 0, io.EOF
	}
	defer f.v.epoch.Enter().Leave()
	start = f.size
	take := func(s, e int64) {
		if s = max(s, off); s < start {
			start, end = s, min(e, f.size)
		}
	}
	for _, l := range f.v.stack.Load().layers {
		if l.id >= f.cut.Layer {
			break
		}
		if l.log != nil {
			if e, ok := l.log.Next(off); ok {
				take(e.Off, e.Off+e.N)
			}
			continue
		}
		op, _, ok, err := l.cow.Ops.Next(uint64(off / bs))
		if err != nil {
			return 0, 0, err
		}
		if ok {
			take(int64(op.NewBlock)*bs, int64(op.NewBlock+uint64(op.Blocks))*bs)
		}
	}
	s, e, err := f.v.base.NextData(off)
	if err == nil {
		take(s, e)
	} else if err != io.EOF {
		return 0, 0, err
	}
	if f.ended() {
		return 0, 0, fmt.Errorf("frozen view of snapshot %s: %w", f.cut.Snapshot, ErrCutEnded)
	}
	if start >= f.size {
		return 0, 0, io.EOF
	}
	return start, end, nil
}
