// Package volume is a volume: a base and the layers above it, the view through
// them, the guest's writes, and the background work (merge, fold, encode) that
// takes the layers away. The numbered rules it keeps are those of the design
// document; docs/design.md tells them.
package volume

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/time/rate"
	"k8s.io/klog/v2"

	"github.com/snapmerge/snapmerge/pkg/blockio"
	"github.com/snapmerge/snapmerge/pkg/merge"
	"github.com/snapmerge/snapmerge/pkg/readahead"
	"github.com/snapmerge/snapmerge/pkg/snapshot"
	"github.com/snapmerge/snapmerge/pkg/volume/pacing"
	"github.com/snapmerge/snapmerge/pkg/volume/writelog"
)

const bs = blockio.BlockSize

// Config is how a volume is opened.
type Config struct {
	FS  blockio.FS
	Dir string // of the volume
	// IO is the back end of the merge, and of reads of scattered places.
	IO blockio.Kind
	// Cache is the node's cache of index pages; nil makes one for the volume.
	Cache *snapshot.Cache
	// Reads reads what lies scattered in a base, for all volumes of the node; nil makes
	// one for the volume.
	Reads *blockio.ReadQueues
	// Slots bounds the merges that run at once on the node; nil: no bound.
	Slots *Slots
	// Rate is the node's default merge rate in MiB/s; 0: no limit.
	Rate int
	// Pacing has background work hold back for the pods; nil: it does not.
	Pacing *pacing.Node
	// StalledAfter is how long background work may get nothing done before the
	// volume is Stalled; 0: DefaultStalledAfter.
	StalledAfter time.Duration
	// WindowBlocks is the size of merge windows where a journal is made anew.
	WindowBlocks int
	// ReadAhead is the node's; nil: none.
	ReadAhead *readahead.Manager
	// ReadPromotion has blocks that pods read of a COW merged early, unless the volume's
	// record says something else.
	ReadPromotion bool
	Log           klog.Logger

	chunkBlocks int // that are promoted as one; 0: the usual; set by tests
}

// Volume is an open volume. It is the transport.Backend of its device. One
// process has a volume open at a time: the files that do its I/O are locked.
type Volume struct {
	cfg     Config
	dir     atomic.Pointer[string] // cfg.Dir, until it is moved
	base    *baseDevice
	reads   *blockio.ReadQueues // its own; nil: the node's are used
	journal *merge.Journal
	// aheadBase reads the base ahead; nil: that is not done.
	aheadBase *readahead.Handle
	epoch     *merge.Epoch
	stack     atomic.Pointer[stack]
	size      atomic.Int64

	// changing is held over a change of the stack, gate shared by guest writes
	// and flushes and exclusively to change where writes go, recMu over a change
	// of the record. They are taken in this order.
	changing sync.Mutex
	gate     sync.RWMutex
	recMu    sync.Mutex

	rec atomic.Pointer[Record]
	// closed ends changes of the record, which may be another's by now. recMu guards it.
	closed bool

	// changing guards device, which is nil unless requests can go past the volume, and
	// deviceKnown: whether there is one has been told.
	device      nativeDevice
	deviceKnown bool
	// isNative is what native said last, for who does not hold changing.
	isNative atomic.Bool
	bypass   bypass

	flushMu   sync.Mutex
	baseDirty atomic.Bool
	poison    atomic.Pointer[error]
	inflight  atomic.Int64 // guest requests, flushes included
	freeing   once
	rounds    atomic.Int64 // logs put on top since the stack was last empty

	work      worker
	promotion promotion
	meter     meter
	limiter   atomic.Pointer[rate.Limiter]
	pacer     *pacing.Pacer
	onPace    func(context.Context) // set by tests
	counts    counts
}

// ErrInUse says that another process has the volume open.
var ErrInUse = errors.New("in use by another process")

// fail makes every later write and flush return err.
func (v *Volume) fail(err error) {
	if v.poison.CompareAndSwap(nil, &err) {
		v.cfg.Log.Error(err, "Volume takes no writes any more", "volume", v.ID())
	}
}

func (v *Volume) failed() error {
	if p := v.poison.Load(); p != nil {
		return *p
	}
	return nil
}

// Open opens the volume in cfg.Dir and recovers what a crash left. Background
// work starts with Start.
func Open(cfg Config) (*Volume, error) {
	// A process that was killed may have replaced the record and died before that
	// was durable. Nothing may be built on it before it is.
	if err := cfg.FS.SyncDir(cfg.Dir); err != nil {
		return nil, err
	}
	rec, err := ReadRecord(cfg.FS, cfg.Dir)
	if err != nil {
		return nil, err
	}
	v := &Volume{cfg: cfg, epoch: merge.NewEpoch()}
	v.dir.Store(&cfg.Dir)
	v.rec.Store(rec)
	v.size.Store(rec.Size)
	v.baseDirty.Store(true) // an earlier process may have left unflushed writes
	v.work.init()
	v.promotion.init()
	if v.cfg.Cache == nil {
		v.cfg.Cache = snapshot.NewCache(0)
	}
	if v.cfg.Reads == nil {
		v.reads = blockio.NewReadQueues(cfg.IO)
		v.cfg.Reads = v.reads
	}
	if err := v.open(rec); err != nil {
		return nil, errors.Join(err, v.closeFiles())
	}
	v.renewRecord(rec)
	v.setRate(rec.Rate)
	v.pacer = cfg.Pacing.Add(v.load)
	return v, nil
}

// renewRecord writes a record of an earlier release as this one would. A guest may wait
// for the volume, so it need not succeed: each change of the record does the same.
func (v *Volume) renewRecord(rec *Record) {
	if rec.Format == rec.format() {
		return
	}
	if err := v.update(func(*Record) {}); err != nil {
		v.cfg.Log.Error(err, "Record stays that of an earlier release", "volume", v.ID(), "format", rec.Format)
	}
}

func (v *Volume) open(rec *Record) error {
	f, err := v.openLocked(rec.file(v.dirName(), rec.Base), blockio.Direct)
	if err != nil {
		return err
	}
	v.base = &baseDevice{f, v}
	if f.Size() < rec.Size {
		return &merge.BaseTooSmallError{Need: rec.Size, Have: f.Size()}
	}
	if v.journal, err = merge.OpenJournal(v.cfg.FS, v.path(journalName)); err != nil {
		return inUse(err)
	}
	if v.journal.ID() != rec.Journal {
		return fmt.Errorf("%w: the journal in %s is %v, the volume's is %v", merge.ErrMismatch, v.dirName(), v.journal.ID(), rec.Journal)
	}
	if err := v.claim(rec); err != nil {
		return err
	}
	v.openAheadBase(rec)
	var layers []*layer
	// Published even if half opened, so that Close finds what is open.
	defer func() { v.stack.Store(v.newStack(layers)) }()
	for i := range rec.Layers {
		l, err := v.openLayer(&rec.Layers[i])
		if err != nil {
			return err
		}
		layers = append(layers, l)
	}
	if err := v.openMerger(layers); err != nil {
		return err
	}
	if len(layers) == 0 || layers[0].cow == nil {
		v.forgetPromotions() // a crash may have come before
	}
	return v.sweep(rec)
}

// openLocked opens a file that the volume does I/O on and takes its lock, which
// is free only when the I/O of an earlier owner, even a dead one, has ended.
func (v *Volume) openLocked(name string, flag blockio.Flag) (blockio.File, error) {
	f, err := v.cfg.FS.Open(name, flag)
	if err != nil {
		return nil, err
	}
	if err := f.Lock(); err != nil {
		return nil, errors.Join(fmt.Errorf("%s: %w", name, inUse(err)), f.Close())
	}
	return f, nil
}

// inUse says of a lock that could not be had what it means for a volume.
func inUse(err error) error {
	if errors.Is(err, blockio.ErrLocked) {
		return fmt.Errorf("%w: %w", ErrInUse, err)
	}
	return err
}

// claim marks the base while there is anything above it, and takes the mark
// away that a crash left when there is not.
func (v *Volume) claim(rec *Record) error {
	if len(rec.Layers) > 0 {
		return merge.ClaimBase(v.base, v.journal)
	}
	id, err := merge.Claim(v.base)
	if err != nil || id != v.journal.ID() {
		return err
	}
	return merge.ReleaseBase(v.base)
}

func (v *Volume) openLayer(r *LayerRecord) (*layer, error) {
	name := v.rec.Load().file(v.dirName(), r.File)
	l := &layer{id: r.ID, file: r.File}
	if r.Log != nil {
		f, err := v.openLocked(name, 0)
		if err != nil {
			return nil, err
		}
		info := writelog.Info{Layer: r.ID, Volume: volumeHash(v.ID()), Freed: r.Log.Freed, Sealed: r.Log.Sealed, Last: r.Log.Last}
		if l.log, err = writelog.Open(f, info); err != nil {
			return nil, errors.Join(err, f.Close())
		}
		return l, nil
	}
	c, err := snapshot.OpenCOW(v.cfg.FS, name, snapshot.OpenCOWOptions{Cache: v.cfg.Cache, Label: r.COW.Label})
	if err != nil {
		return nil, err
	}
	if c.Identity != r.COW.identity() {
		return nil, errors.Join(c.Close(), fmt.Errorf("%w: %s is not the COW that the volume was made from", merge.ErrMismatch, name))
	}
	l.cow = c
	if l.view, err = merge.NewLayer(c.Ops, c.File, nil); err != nil {
		return nil, errors.Join(err, c.Close())
	}
	if err := v.openAhead(l, r.COW); err != nil {
		return nil, errors.Join(err, c.Close())
	}
	return l, nil
}

// openMerger gives the lowest layer its merger if it is a COW.
func (v *Volume) openMerger(layers []*layer) error {
	if len(layers) == 0 || layers[0].cow == nil {
		return nil
	}
	l := layers[0]
	m, err := merge.OpenJournaled(merge.Config{
		Ops: l.cow.Ops, COW: l.cow.File, Base: v.base, Epoch: v.epoch, IO: v.cfg.IO, Pace: v.pace, PaceAhead: v.paceAhead, Counters: &v.counts.merge,
		ChunkBlocks: v.cfg.chunkBlocks,
	}, v.journal, l.id, l.cow.Identity)
	if err != nil {
		return l.named(err)
	}
	l.merger, l.view = m, m.Layer()
	return nil
}

// sweep removes files that the record does not name: a crash came between the
// record and the removal, or before the record.
func (v *Volume) sweep(rec *Record) error {
	keep := map[string]bool{}
	for _, l := range rec.Layers {
		keep[l.File] = true
		if l.COW != nil {
			for _, n := range companions(l.File) {
				keep[n] = true
			}
		}
	}
	names, err := v.cfg.FS.ReadDir(v.dirName())
	if err != nil {
		return err
	}
	swept := false
	for _, n := range names {
		if strings.HasPrefix(n, layerPrefix) && !keep[n] || strings.HasSuffix(n, ".new") || strings.HasSuffix(n, ".tmp") {
			if err := v.cfg.FS.Remove(v.path(n)); err != nil {
				return err
			}
			swept = true
		}
	}
	if swept {
		return v.cfg.FS.SyncDir(v.dirName())
	}
	return nil
}

// Close stops background work, flushes, and closes the files. The volume must
// not be used any more.
func (v *Volume) Close() error {
	v.Stop()
	v.pacer.Close()
	v.gate.Lock()
	defer v.gate.Unlock()
	return errors.Join(v.flushLocked(), v.closeFiles())
}

func (v *Volume) closeFiles() error {
	v.recMu.Lock()
	v.closed = true
	v.recMu.Unlock()
	var errs []error
	if v.aheadBase != nil {
		v.aheadBase.Close() // before what it reads
	}
	if st := v.stack.Load(); st != nil {
		for _, l := range st.layers {
			errs = append(errs, l.close())
		}
	}
	if v.journal != nil {
		errs = append(errs, v.journal.Close())
	}
	if v.base != nil {
		errs = append(errs, v.base.Close())
	}
	if v.reads != nil {
		errs = append(errs, v.reads.Close())
	}
	return errors.Join(errs...)
}

func (v *Volume) dirName() string { return *v.dir.Load() }

// path is the name of a file in the volume's directory.
func (v *Volume) path(name string) string { return path.Join(v.dirName(), name) }

// ID is the volume's id.
func (v *Volume) ID() string { return v.rec.Load().ID }

// Record is what is durably known of the volume. It must not be changed.
func (v *Volume) Record() *Record { return v.rec.Load() }

// Size is the length of the view in bytes.
func (v *Volume) Size() int64 { return v.size.Load() }

// update changes the record durably. If that fails when the new one may be in
// place already, the old one is written again, and if that fails too nobody can
// know which of the two a restart would find, so the volume takes no writes any
// more.
func (v *Volume) update(change func(r *Record)) error {
	v.recMu.Lock()
	defer v.recMu.Unlock()
	if v.closed {
		return fmt.Errorf("record of the volume: %w", fs.ErrClosed)
	}
	old := v.rec.Load()
	next := old.clone()
	change(next)
	next.Format = next.format()
	if err := next.save(v.cfg.FS, v.dirName()); errors.Is(err, blockio.ErrUnchanged) {
		return fmt.Errorf("record of the volume: %w", err)
	} else if err != nil {
		if again := old.save(v.cfg.FS, v.dirName()); again != nil {
			v.fail(fmt.Errorf("record of the volume: %w", again))
		}
		return fmt.Errorf("record of the volume: %w", err)
	}
	v.rec.Store(next)
	return nil
}

// checkRange refuses requests that the view does not have.
func (v *Volume) checkRange(off, n int64) error {
	if off < 0 || n < 0 || off%blockio.SectorSize != 0 || n%blockio.SectorSize != 0 || off > v.Size()-n {
		return fmt.Errorf("request of %d bytes at %d of a volume of %d: %w", n, off, v.Size(), syscall.EINVAL)
	}
	return nil
}

func (v *Volume) readAt(p []byte, off int64) (int, error) {
	if err := v.checkRange(off, int64(len(p))); err != nil {
		return 0, err
	}
	v.inflight.Add(1)
	defer v.inflight.Add(-1)
	defer v.epoch.Enter().Leave()
	return v.stack.Load().view().ReadAt(p, off)
}

// writeAt writes to the base where that is safe, else to the log.
func (v *Volume) writeAt(p []byte, off int64) (int, error) {
	if err := v.checkWrite(off, int64(len(p))); err != nil {
		return 0, err
	}
	v.inflight.Add(1)
	defer v.inflight.Add(-1)
	v.throttle()
	v.gate.RLock()
	defer v.gate.RUnlock()
	defer v.epoch.Enter().Leave()
	st := v.stack.Load()
	for done := 0; done < len(p); {
		direct, n, err := v.route(st, off, len(p)-done)
		if err != nil {
			return done, err
		}
		part := p[done : done+n]
		if direct {
			err = v.toBase(off, int64(n), func() error { _, err := v.base.WriteAt(part, off); return err })
		} else {
			err = st.top().log.Write(part, off)
		}
		if err != nil {
			return done, err
		}
		v.counts.wrote(direct, n)
		done, off = done+n, off+int64(n)
	}
	return len(p), nil
}

func (v *Volume) checkWrite(off, n int64) error {
	if err := v.failed(); err != nil {
		return fmt.Errorf("%w: %w", syscall.EIO, err)
	}
	if v.rec.Load().ReadOnly {
		return syscall.EROFS
	}
	return v.checkRange(off, n)
}

// route tells where the first bytes of a write of n bytes at off go, and how
// many. The gate is shared.
func (v *Volume) route(st *stack, off int64, n int) (direct bool, length int, err error) {
	if len(st.layers) == 0 {
		return true, n, nil
	}
	if v.rec.Load().Cut != nil {
		// The base is part of a frozen view.
		return false, n, nil
	}
	first := uint64(off / bs)
	end := uint64((off + int64(n) + bs - 1) / bs)
	if ok, err := st.settled(first, end-first); ok || err != nil {
		return ok, n, err
	}
	direct, err = st.settled(first, 1)
	if err != nil {
		return false, 0, err
	}
	b := first + 1
	for ; b < end; b++ {
		d, err := st.settled(b, 1)
		if err != nil {
			return false, 0, err
		}
		if d != direct {
			break
		}
	}
	return direct, int(min(int64(b)*bs-off, int64(n))), nil
}

func (v *Volume) zero(off, n int64) error {
	if err := v.checkWrite(off, n); err != nil {
		return err
	}
	if n == 0 {
		return nil
	}
	v.inflight.Add(1)
	defer v.inflight.Add(-1)
	v.throttle()
	v.gate.RLock()
	defer v.gate.RUnlock()
	defer v.epoch.Enter().Leave()
	st := v.stack.Load()
	direct := len(st.layers) == 0
	if !direct && v.rec.Load().Cut == nil {
		first := uint64(off / bs)
		var err error
		if direct, err = st.settled(first, uint64((off+n+bs-1)/bs)-first); err != nil {
			return err
		}
	}
	if direct {
		return v.toBase(off, n, func() error { return v.base.Zero(off, n) })
	}
	return st.top().log.Zero(off, n)
}

func (v *Volume) flush() error {
	v.gate.RLock()
	defer v.gate.RUnlock()
	if err := v.flushLocked(); err != nil {
		return err
	}
	v.freeDeadSoon()
	return nil
}

// flushLocked is flush with the gate held, shared or not.
func (v *Volume) flushLocked() error {
	st := v.stack.Load()
	if st == nil || v.base == nil {
		return nil
	}
	if err := v.failed(); err != nil {
		return fmt.Errorf("%w: %w", syscall.EIO, err)
	}
	if top := st.top(); top != nil {
		if err := top.log.Flush(); err != nil {
			v.fail(fmt.Errorf("flush of the write log failed: %w", err))
			return err
		}
	}
	// One at a time: a second flush must not find the base clean while the
	// first is still at it.
	v.flushMu.Lock()
	defer v.flushMu.Unlock()
	// What went past the volume was not noted.
	if !v.baseDirty.Swap(false) && v.Record().Native == "" {
		return nil
	}
	return v.base.Flush()
}

// Expand makes the volume size bytes long: the base first, then the record.
// Shrinking is refused; the same size is no change.
func (v *Volume) Expand(size int64) error {
	v.changing.Lock()
	defer v.changing.Unlock()
	if size > v.Size() {
		// A device that cannot come back sees its base grow.
		if err := v.comeBack(); err != nil && !errors.Is(err, ErrOffline) {
			return err
		}
	}
	v.gate.Lock()
	defer v.gate.Unlock()
	switch {
	case size%bs != 0:
		return fmt.Errorf("size %d is not a multiple of %d", size, bs)
	case size < v.Size():
		return fmt.Errorf("volume has %d bytes and cannot shrink to %d", v.Size(), size)
	case size == v.Size():
		return nil
	}
	if v.base.Size() < size {
		if err := v.base.Truncate(size); err != nil {
			return err
		}
		if err := v.base.Flush(); err != nil {
			return err
		}
	}
	if err := v.update(func(r *Record) { r.Size, r.Grow = size, true }); err != nil {
		return err
	}
	v.size.Store(size)
	return nil
}

// Update changes the fields of the record that belong to who uses the volume:
// Blank, FSType, Grow, Stage, Params.
func (v *Volume) Update(change func(r *Record)) error { return v.update(change) }

var _ io.ReaderAt = (*Volume)(nil)
