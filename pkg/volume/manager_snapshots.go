package volume

import (
	"context"
	"errors"
	"fmt"
	"path"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/snapmerge/snapmerge/pkg/snapshot"
)

// SnapshotSpec is what is asked of a new snapshot.
type SnapshotSpec struct {
	ID, Name, Volume string
	// Compression is as snapshot.EncodeOptions takes it.
	Compression string
	// FSType is the file system on the volume, if any.
	FSType string
	// Freeze freezes the guest's file system, if it is mounted; see Volume.Cut.
	Freeze func() (thaw func(), err error)
}

// encode is a snapshot that is being encoded.
type encode struct {
	snapshot string
	v        *Volume
	frozen   *Frozen // view of v
	free     int64   // room of the pool when it began, bytes
	cancel   context.CancelFunc
	done     chan struct{}
	// progress and total are in bytes; total is 0 until it is known.
	progress, total atomic.Int64

	// mu is held over the end of the encoding and over the deletion of the
	// volume, which must not meet. It is taken before Manager.mu.
	mu        sync.Mutex
	ended     bool
	orphan    bool // the volume was deleted, what is left of it is ours
	discarded bool // the orphan
}

const (
	// minSnapshotRoom is the free room without which no snapshot is begun, bytes.
	minSnapshotRoom = 64 << 20
	// roomStep is after how many bytes of work an encoder looks whether there still
	// is room.
	roomStep = 16 << 20
)

// CreateSnapshot cuts the volume and starts encoding the frozen view. A snapshot
// of that id that exists is returned as it is, if it is of the same volume. One
// that has failed is made anew, once its cut is ended; if it failed for lack of
// room that takes more than there was, else ErrPoolFull.
func (m *Manager) CreateSnapshot(spec SnapshotSpec) (snapshot.Record, error) {
	e, err := m.hold(spec.Volume)
	if errors.Is(err, ErrNotFound) {
		// The volume may be gone while the snapshot of it is there.
		if r, rerr := m.store.Get(spec.ID); rerr == nil && r.SourceVolumeID == spec.Volume {
			return r, nil
		}
	}
	if err != nil {
		return snapshot.Record{}, err
	}
	defer e.mu.Unlock()
	v, err := m.Get(spec.Volume)
	if err != nil {
		return snapshot.Record{}, err
	}
	r, err := m.store.Get(spec.ID)
	switch {
	case err == nil && r.SourceVolumeID != spec.Volume:
		return r, fmt.Errorf("snapshot %s is of volume %s: %w", r.ID, r.SourceVolumeID, ErrConflict)
	case err == nil && r.State != snapshot.Failed:
		return r, nil
	case err == nil && m.encoding(spec.ID):
		// It has failed, but its cut is not ended yet. What is made anew would take that
		// cut for its own, and lose it in the middle.
		return r, nil
	case err != nil && !errors.Is(err, snapshot.ErrNotFound):
		return r, err
	case err != nil && m.encoding(spec.ID):
		return r, fmt.Errorf("%w: %s, which is being deleted", ErrCutInFlight, spec.ID)
	}
	// Before anything is frozen or written: who asks again and again is told the
	// same each time.
	if err := v.checkOnline(); err != nil {
		return r, fmt.Errorf("volume %s: %w", spec.Volume, err)
	}
	if err := m.checkRoom(spec.ID); err != nil {
		return r, err
	}
	if err := m.mendCut(v); err != nil {
		return r, err
	}
	if r.State == snapshot.Failed {
		if err := m.store.Delete(r.ID); err != nil {
			return r, err
		}
	}
	return m.cut(v, spec)
}

// mendCut sees to the cut of v if no encoding does: the encoding is gone on with, or
// the cut is ended if its snapshot is done with or gone. The entry's mu must be held,
// or the entry is not shared yet.
func (m *Manager) mendCut(v *Volume) error {
	id := cutOf(v)
	if id == "" || m.encodeOf(v) != nil {
		return nil
	}
	r, err := m.store.Get(id)
	switch {
	case err == nil && r.State == snapshot.Pending:
		return m.resumeEncode(v, false)
	case err == nil, errors.Is(err, snapshot.ErrNotFound), errors.Is(err, snapshot.ErrDamaged), errors.Is(err, snapshot.ErrNewer):
		return v.EndCut(id)
	}
	return err
}

// mendCutNow is mendCut; after an error that is tried again in the background.
func (m *Manager) mendCutNow(v *Volume) error {
	err := m.mendCut(v)
	if err != nil {
		m.mendCutSoon(v.ID(), cutOf(v))
	}
	return err
}

// mendCutSoon does mendCut in the background until it succeeds.
func (m *Manager) mendCutSoon(volume, id string) {
	m.wg.Go(func() {
		m.insist(m.ctx, volume, id, func() error {
			if m.ctx.Err() != nil {
				return nil // the next start does it
			}
			e, err := m.hold(volume)
			if err != nil {
				return nil // it is gone
			}
			defer e.mu.Unlock()
			v, err := m.Get(volume)
			if err != nil {
				return nil // it cannot be opened now
			}
			return m.mendCut(v)
		})
	})
}

// checkRoom returns ErrPoolFull if there is too little room to begin a snapshot.
func (m *Manager) checkRoom(id string) error {
	free, _, err := m.Capacity()
	if err != nil {
		return err
	}
	m.mu.Lock()
	tried := m.full[id]
	m.mu.Unlock()
	if need := tried + minSnapshotRoom; free < need {
		return fmt.Errorf("snapshot %s: %d bytes are free, at least %d are needed: %w", id, free, need, ErrPoolFull)
	}
	return nil
}

func (m *Manager) cut(v *Volume, spec SnapshotSpec) (snapshot.Record, error) {
	r, err := m.store.Create(snapshot.Record{
		ID: spec.ID, Name: spec.Name, SourceVolumeID: spec.Volume, Size: v.Size(), FSType: spec.FSType,
		Blank: v.Record().Blank,
	})
	if err != nil {
		return r, err
	}
	if err := v.cut(CutRecord{Snapshot: spec.ID, Compression: spec.Compression}, spec.Freeze); err != nil {
		return r, errors.Join(err, m.store.Delete(spec.ID))
	}
	if r, err = m.startEncode(v); err != nil {
		return r, errors.Join(err, m.store.Delete(spec.ID), m.mendCutNow(v))
	}
	return r, nil
}

// startEncode encodes the view of v that was just frozen, in the background. After an
// error nothing is encoded.
func (m *Manager) startEncode(v *Volume) (snapshot.Record, error) {
	n, err := newEncode(v)
	if err != nil {
		return snapshot.Record{}, err
	}
	r, err := m.beginEncode(n)
	if err != nil {
		return r, err
	}
	m.goEncode(n, func() error { return nil })
	return r, nil
}

// resumeEncode goes on with a view of v that was frozen earlier, in the background. Its
// beginning is tried until it succeeds: nobody else would see to the snapshot.
func (m *Manager) resumeEncode(v *Volume, orphan bool) error {
	n, err := newEncode(v)
	if err != nil {
		return err
	}
	n.orphan = orphan
	m.goEncode(n, func() error {
		_, err := m.beginEncode(n)
		return err
	})
	return nil
}

// newEncode is an encoding of the frozen view of v; ErrCutEnded if there is none.
func newEncode(v *Volume) (*encode, error) {
	f := v.Frozen()
	if f == nil {
		return nil, fmt.Errorf("volume %s: %w", v.ID(), ErrCutEnded)
	}
	return &encode{snapshot: f.Snapshot(), v: v, frozen: f, done: make(chan struct{})}, nil
}

// beginEncode notes what is known since the cut.
func (m *Manager) beginEncode(n *encode) (r snapshot.Record, err error) {
	r, err = m.store.Update(n.snapshot, func(r *snapshot.Record) error {
		r.CreatedAt, r.Size = n.frozen.Time(), n.frozen.Size()
		return nil
	})
	if err != nil {
		return r, err
	}
	n.free, _, err = m.Capacity()
	return r, err
}

// goEncode encodes in the background, when begin has succeeded.
func (m *Manager) goEncode(n *encode, begin func() error) {
	ctx, cancel := context.WithCancel(m.ctx)
	n.cancel = cancel
	m.mu.Lock()
	m.encodes[n.snapshot] = n
	m.mu.Unlock()
	m.wg.Go(func() {
		defer close(n.done)
		defer cancel()
		m.insist(ctx, n.v.ID(), n.snapshot, begin)
		m.encode(ctx, n)
	})
}

// encode encodes a snapshot and ends its cut.
func (m *Manager) encode(ctx context.Context, n *encode) {
	info, err := snapshot.Encode(ctx, m.cfg.FS, m.store.Path(n.snapshot), n.frozen, snapshot.EncodeOptions{
		Compression: n.frozen.cut.Compression, Pace: m.encodePace(n.v),
		OnProgress: func(done, total int64) { n.total.Store(total); n.progress.Store(done) },
	})
	if m.ctx.Err() != nil {
		return // goes on at the next start
	}
	m.noteRoom(n, err)
	record := func() error {
		_, err := m.store.SetReady(n.snapshot, info)
		return err
	}
	if err != nil && ctx.Err() == nil {
		m.cfg.Log.Error(err, "Snapshot failed", "snapshot", n.snapshot, "volume", n.v.ID())
		record = func() error {
			_, rerr := m.store.SetFailed(n.snapshot, err.Error())
			return rerr
		}
	}
	if err == nil || ctx.Err() == nil {
		m.insist(ctx, n.v.ID(), n.snapshot, record)
	}
	m.insist(ctx, n.v.ID(), n.snapshot, func() error { return m.endEncode(n) })
}

// After how long it is tried again to record how a snapshot has begun or ended.
const (
	recordRetry     = 200 * time.Millisecond
	recordRetryMost = time.Minute
)

// insist does something until it succeeds, the snapshot is being deleted (ctx ends), or
// it is gone. Nobody else would before the next start: on a full disk the snapshot would
// be pending, and its volume cut, for as long.
func (m *Manager) insist(ctx context.Context, volume, id string, do func() error) {
	for wait := recordRetry; ; wait = min(2*wait, recordRetryMost) {
		err := do()
		if err == nil || errors.Is(err, snapshot.ErrNotFound) {
			return
		}
		m.cfg.Log.Error(err, "Snapshot is not recorded yet", "snapshot", id, "volume", volume)
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait):
		}
	}
}

// noteRoom remembers how much room was not enough for a snapshot.
func (m *Manager) noteRoom(n *encode, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if errors.Is(err, ErrPoolFull) || errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		m.full[n.snapshot] = n.free
	} else {
		delete(m.full, n.snapshot)
	}
}

// encodePace is v's pace for an encoder, which ends when it has used up the room
// that it may.
func (m *Manager) encodePace(v *Volume) func(ctx context.Context, n int) error {
	left := 0
	return func(ctx context.Context, n int) error {
		if left -= n; left < 0 {
			free, _, err := m.Capacity()
			if err != nil {
				return err
			}
			if free == 0 {
				return fmt.Errorf("the rest is kept for what pods write: %w", ErrPoolFull)
			}
			left = roomStep
		}
		return v.paceEncode(ctx, n)
	}
}

// endEncode ends the cut of an encoding. After an error it can be called again.
func (m *Manager) endEncode(n *encode) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	var err error
	if n.orphan {
		err = errors.Join(n.discard(), m.cfg.FS.RemoveAll(path.Join(m.store.Path(n.snapshot), orphanDir)))
	} else {
		err = n.v.EndCut(n.snapshot)
	}
	if err == nil {
		m.forgetLocked(n)
	}
	return err
}

// giveUp leaves an encoding as it is, as its snapshot is deleted. Its cut may still
// have to be ended.
func (m *Manager) giveUp(n *encode) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.ended {
		return nil
	}
	m.forgetLocked(n)
	if n.orphan {
		return n.discard()
	}
	m.mendCutSoon(n.v.ID(), n.snapshot)
	return nil
}

// forgetLocked: n.mu must be held.
func (m *Manager) forgetLocked(n *encode) {
	n.ended = true
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.encodes[n.snapshot] == n {
		delete(m.encodes, n.snapshot)
	}
}

// encoding tells whether there is an encoding of that snapshot that has not ended.
func (m *Manager) encoding(id string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.encodes[id] != nil
}

// discard closes an orphan, once. mu must be held, unless the encoding has ended.
func (n *encode) discard() error {
	if n.discarded {
		return nil
	}
	n.discarded = true
	return n.v.discard()
}

// encodeOf is the encoding of a snapshot of v that is in flight, or nil.
func (m *Manager) encodeOf(v *Volume) *encode {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.encodes[cutOf(v)]
}

// listSnapshots returns the records of all snapshots that can be read.
func (m *Manager) listSnapshots() ([]snapshot.Record, error) {
	records, unreadable, err := m.store.List()
	for id, err := range unreadable {
		m.cfg.Log.Error(err, "Record of a snapshot cannot be read", "snapshot", id)
	}
	return records, err
}

// resumeSnapshots goes on with what an earlier process was at.
func (m *Manager) resumeSnapshots(ctx context.Context, records []snapshot.Record) {
	for _, r := range records {
		if err := m.resumeSnapshot(ctx, r); err != nil {
			m.cfg.Log.Error(err, "Snapshot cannot be gone on with", "snapshot", r.ID)
		}
	}
	// Cuts whose snapshot is done with or gone.
	for _, e := range m.entries() {
		if e.v == nil {
			continue // see opened
		}
		if err := m.mendCutNow(e.v); err != nil {
			m.cfg.Log.Error(err, "End of a cut", "volume", e.id)
		}
	}
}

func (m *Manager) resumeSnapshot(ctx context.Context, r snapshot.Record) error {
	dir := path.Join(m.store.Path(r.ID), orphanDir)
	orphan, err := m.cfg.FS.Exists(dir)
	if err != nil {
		return err
	}
	if r.State != snapshot.Pending {
		if orphan {
			return m.cfg.FS.RemoveAll(dir)
		}
		return nil
	}
	if orphan {
		var v *Volume
		err := retryInUse(ctx, func() (err error) {
			v, err = Open(m.volumeConfig(dir))
			return err
		})
		if err != nil {
			_, serr := m.store.SetFailed(r.ID, err.Error())
			return errors.Join(err, serr)
		}
		return m.resumeEncode(v, true)
	}
	m.mu.Lock()
	e := m.volumes[r.SourceVolumeID]
	m.mu.Unlock()
	if e != nil && e.v == nil {
		return nil // it cannot be opened now; the cut is in its record, see opened
	}
	if e == nil || cutOf(e.v) != r.ID {
		// The cut never came to be.
		return m.store.Delete(r.ID)
	}
	return m.resumeEncode(e.v, false)
}

// Snapshot returns a snapshot's record.
func (m *Manager) Snapshot(id string) (snapshot.Record, error) { return m.store.Get(id) }

// Snapshots returns the records of all snapshots that can be read.
func (m *Manager) Snapshots() ([]snapshot.Record, error) {
	records, _, err := m.store.List()
	return records, err
}

// ReadySnapshot returns the record of a snapshot that can be restored; else
// ErrNotReady or ErrSnapshotFailed.
func (m *Manager) ReadySnapshot(id string) (snapshot.Record, error) {
	r, err := m.store.Get(id)
	switch {
	case err != nil:
		return r, err
	case r.State == snapshot.Failed:
		return r, fmt.Errorf("snapshot %s: %w: %s", id, ErrSnapshotFailed, r.Message)
	case r.State != snapshot.Ready:
		return r, fmt.Errorf("snapshot %s: %w", id, ErrNotReady)
	}
	return r, nil
}

// WaitSnapshot waits until the snapshot is not being encoded any more, or ctx
// ends, and returns its record as it is then.
func (m *Manager) WaitSnapshot(ctx context.Context, id string) (snapshot.Record, error) {
	m.mu.Lock()
	n := m.encodes[id]
	m.mu.Unlock()
	if n != nil {
		select {
		case <-n.done:
		case <-ctx.Done():
		}
	}
	return m.store.Get(id)
}

// DeleteSnapshot removes a snapshot; one that is not there is no error. Volumes
// restored from it have their own links to its files. If it is still being
// encoded, that is stopped.
func (m *Manager) DeleteSnapshot(id string) error {
	m.mu.Lock()
	n := m.encodes[id]
	m.mu.Unlock()
	if n != nil {
		n.cancel()
		<-n.done
	}
	if err := snapshot.CheckID(id); err != nil {
		return nil // there cannot be one
	}
	m.mu.Lock()
	delete(m.full, id)
	m.mu.Unlock()
	if err := m.store.Delete(id); err != nil || n == nil {
		return err
	}
	// Only now: a cut that has a record but no encoding would be gone on with.
	return m.giveUp(n)
}
