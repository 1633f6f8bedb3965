package volume

import (
	"context"
	"errors"
	"fmt"
	"path"

	"github.com/google/uuid"

	"github.com/snapmerge/snapmerge/pkg/snapshot"
)

// VolumeSpec is what is asked of a new volume of the node.
type VolumeSpec struct {
	ID, Name string
	// Size in bytes; rounded up to whole blocks.
	Size int64
	// Snapshot to restore; empty: a blank volume.
	Snapshot string
	// Claim is what the volume is for, if that is known. It makes no difference to
	// the volume.
	Claim Claim
	// Params are the caller's, kept with the volume.
	Params map[string]string
	Limits Limits
	Rate   int
	// ReadAhead is the mode, as package readahead has it; empty: the node's.
	ReadAhead string
	// ReadPromotion is PromotionOn or PromotionOff; empty: the node's.
	ReadPromotion string
}

// RoundUp rounds a size in bytes up to whole blocks.
func RoundUp(size int64) int64 { return (size + bs - 1) / bs * bs }

// CreateVolume makes a volume, blank or from a snapshot. If there is one of that
// id already, made from the same, of at least that size, it is returned; else
// ErrConflict.
func (m *Manager) CreateVolume(ctx context.Context, spec VolumeSpec) (*Volume, error) {
	spec.Size = RoundUp(spec.Size)
	e := m.reserve(spec.ID)
	defer e.mu.Unlock()
	if v, err := m.existing(ctx, e, spec); v != nil || err != nil {
		return v, err
	}
	v, err := m.createVolume(ctx, spec)
	m.mu.Lock()
	defer m.mu.Unlock()
	if err != nil {
		if made, xerr := m.made(spec.ID); made || xerr != nil {
			e.err = err // it is a volume, if not one that can be used yet
			return nil, err
		}
		e.gone = true
		delete(m.volumes, spec.ID)
		return nil, err
	}
	e.v, e.err = v, nil
	return v, nil
}

// errBeingMade is why a volume cannot be used that is about to be there.
var errBeingMade = errors.New("volume is being made")

// reserve returns the entry of that id, a new one if there is none, with its mu
// held.
func (m *Manager) reserve(id string) *entry {
	for {
		m.mu.Lock()
		e := m.volumes[id]
		if e == nil {
			e = &entry{id: id, err: errBeingMade}
			m.volumes[id] = e
		}
		m.mu.Unlock()
		e.mu.Lock()
		if !e.gone {
			return e
		}
		e.mu.Unlock()
	}
}

// existing compares what the spec asks for with the volume that is there; nil
// if there is none. e.mu is held.
func (m *Manager) existing(ctx context.Context, e *entry, spec VolumeSpec) (*Volume, error) {
	ok, err := m.made(spec.ID)
	if err != nil || !ok {
		return nil, err
	}
	v, err := m.opened(ctx, e)
	if err != nil {
		return nil, err
	}
	if r := v.Record(); r.Source != spec.Snapshot || r.Name != spec.Name {
		return nil, fmt.Errorf("volume %s, made from snapshot %q: %w", spec.ID, r.Source, ErrConflict)
	}
	return v, nil
}

// made tells whether there is a volume of that id on disk.
func (m *Manager) made(id string) (bool, error) {
	return m.cfg.FS.Exists(path.Join(m.volumeDir(id), recordName))
}

func (m *Manager) createVolume(ctx context.Context, spec VolumeSpec) (*Volume, error) {
	if err := snapshot.CheckID(spec.ID); err != nil {
		return nil, err
	}
	vs := Spec{ID: spec.ID, Name: spec.Name, Size: spec.Size, Blank: spec.Snapshot == "", Source: spec.Snapshot,
		Claim: spec.Claim, Params: spec.Params, Limits: spec.Limits, Rate: spec.Rate, ReadAhead: spec.ReadAhead, ReadPromotion: spec.ReadPromotion}
	if spec.Snapshot != "" {
		r, err := m.ReadySnapshot(spec.Snapshot)
		if err != nil {
			return nil, err
		}
		if spec.Size < r.Size {
			return nil, fmt.Errorf("size %d is smaller than snapshot %s with %d: %w", spec.Size, r.ID, r.Size, ErrConflict)
		}
		vs.Grow, vs.Blank, vs.FSType = spec.Size > r.Size, r.Blank, r.FSType
		vs.COWs = []COWSource{{Path: m.store.COWPath(r.ID), Link: true}}
	}
	_, total, err := m.Capacity()
	if err != nil {
		return nil, err
	}
	if spec.Size > total {
		return nil, fmt.Errorf("volume of %d bytes, the pool has %d: %w", spec.Size, total, ErrPoolFull)
	}
	dir := m.volumeDir(spec.ID)
	if err := Create(m.cfg.FS, dir, vs); err != nil {
		return nil, errors.Join(err, m.cfg.FS.RemoveAll(dir))
	}
	if err := m.cfg.FS.SyncDir(m.path(volumesDir)); err != nil {
		return nil, errors.Join(err, m.cfg.FS.RemoveAll(dir))
	}
	v, err := Open(m.volumeConfig(dir))
	if err != nil {
		return nil, err
	}
	v.Start()
	return v, nil
}

// DeleteVolume removes a volume; one that is not there is no error. A snapshot
// that is being made of it goes on from the volume's files, which it then owns.
// A merge is stopped within one request of I/O.
func (m *Manager) DeleteVolume(id string) error {
	e, err := m.hold(id)
	if errors.Is(err, ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	defer e.mu.Unlock()
	m.mu.Lock()
	v, dev := e.v, e.dev
	_, left := m.leftovers[id]
	m.mu.Unlock()
	if dev != nil || left {
		return fmt.Errorf("volume %s: %w", id, ErrStaged)
	}
	kept, err := m.handOver(v)
	if err != nil {
		return fmt.Errorf("volume %s: %w", id, err)
	}
	gone := m.path(volumesDir, gonePrefix+id+"-"+uuid.NewString())
	switch {
	case v == nil:
		err = errors.Join(m.cfg.FS.Rename(m.volumeDir(id), gone), m.cfg.FS.SyncDir(m.path(volumesDir)))
	case !kept:
		v.Stop()
		err = v.moveTo(gone)
	}
	if err != nil {
		return fmt.Errorf("volume %s: %w", id, err)
	}
	m.mu.Lock()
	e.gone = true
	delete(m.volumes, id)
	m.mu.Unlock()
	if kept {
		return nil
	}
	m.wg.Go(func() {
		var err error
		if v != nil {
			err = v.discard()
		}
		if err := errors.Join(err, m.cfg.FS.RemoveAll(gone)); err != nil {
			m.cfg.Log.Error(err, "Files of a deleted volume stay behind until the next start", "volume", id)
		}
	})
	return nil
}

// handOver gives a volume that is to be deleted to the snapshot that is being
// encoded from it, if there is one: a rename, after which it is found there.
func (m *Manager) handOver(v *Volume) (bool, error) {
	n := m.encodeOf(v)
	if n == nil {
		return false, nil
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.ended {
		return false, nil
	}
	v.Stop() // what is left to do for it is the encoding alone
	if err := v.moveTo(path.Join(m.store.Path(n.snapshot), orphanDir)); err != nil {
		return false, err
	}
	n.orphan = true
	return true, nil
}

// cutOf is the snapshot that is being made of a volume, or "".
func cutOf(v *Volume) string {
	if v == nil || v.Record().Cut == nil {
		return ""
	}
	return v.Record().Cut.Snapshot
}

// Expand makes a volume at least size bytes long, device included.
func (m *Manager) Expand(id string, size int64) (int64, error) {
	e, err := m.hold(id)
	if err != nil {
		return 0, err
	}
	defer e.mu.Unlock()
	v, err := m.Get(id)
	if err != nil {
		return 0, err
	}
	size = max(RoundUp(size), v.Size())
	_, total, err := m.Capacity()
	if err != nil {
		return 0, err
	}
	if size > v.Size() && size > total {
		return 0, fmt.Errorf("volume of %d bytes, the pool has %d: %w", size, total, ErrPoolFull)
	}
	if err := v.Expand(size); err != nil {
		return 0, err
	}
	m.mu.Lock()
	dev := e.dev
	m.mu.Unlock()
	if dev != nil {
		defer v.work.wake.ring() // it may be handed over to its base again
		if err := dev.Resize(); err != nil {
			return 0, fmt.Errorf("volume %s: device: %w", id, err)
		}
	}
	return size, nil
}
