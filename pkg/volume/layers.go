package volume

import (
	"crypto/sha256"
	"fmt"
	"path"
	"slices"
	"time"

	"github.com/snapmerge/snapmerge/pkg/merge"
	"github.com/snapmerge/snapmerge/pkg/volume/writelog"
)

const layerPrefix = "layer-"

func cowName(id uint64) string { return fmt.Sprintf("%s%03d.cow", layerPrefix, id) }
func logName(id uint64) string { return fmt.Sprintf("%s%03d.log", layerPrefix, id) }

// volumeHash is what a log's file keeps of its volume's id.
func volumeHash(id string) (h [16]byte) {
	sum := sha256.Sum256([]byte(id))
	copy(h[:], sum[:])
	return h
}

// publish makes the layers what readers and writers go by, and returns when
// nobody uses the stack that was.
func (v *Volume) publish(layers []*layer) {
	v.stack.Store(v.newStack(layers))
	v.epoch.Synchronize()
}

// newLog makes the file of a log that no record names yet.
func (v *Volume) newLog(id uint64) (*layer, error) {
	name := v.path(logName(id))
	if err := v.cfg.FS.RemoveAll(name); err != nil {
		return nil, err
	}
	if err := writelog.Create(v.cfg.FS, name, id, volumeHash(v.ID()), v.Record().SegmentBytes); err != nil {
		return nil, err
	}
	if err := v.cfg.FS.SyncDir(v.dirName()); err != nil {
		return nil, err
	}
	return v.openLayer(&LayerRecord{ID: id, File: logName(id), Log: &LogRecord{}})
}

// rotate puts a fresh log on top and seals the one that was, if any. With cut
// everything below the fresh log becomes a frozen view. freeze, if not nil, is
// called before the gate closes, and what it returned when the new log is in
// service.
func (v *Volume) rotate(cut *CutRecord, freeze func() (thaw func(), err error)) error {
	id := v.Record().NextLayer
	fresh, err := v.newLog(id)
	if err != nil {
		return err
	}
	discard := func() {
		_ = fresh.close()
		if v.failed() != nil {
			return // the record on disk may name it; if not, the next opening sweeps it away
		}
		_ = v.cfg.FS.Remove(v.path(fresh.file))
	}
	// Most of what there is to flush goes before the gate closes.
	if err := v.flush(); err != nil {
		discard()
		return err
	}
	if freeze != nil {
		thaw, err := freeze()
		if err != nil {
			discard()
			return err
		}
		defer thaw()
	}
	v.gate.Lock()
	defer v.gate.Unlock()
	if err := v.replaceTop(fresh, cut); err != nil {
		discard()
		return err
	}
	return nil
}

// replaceTop is the part of rotate behind the closed gate.
func (v *Volume) replaceTop(fresh *layer, cut *CutRecord) error {
	if v.Record().Native != "" {
		return ErrNative // comeBack comes first
	}
	if err := v.flushLocked(); err != nil {
		return err
	}
	old := v.stack.Load()
	var last uint64
	if top := old.top(); top != nil {
		var err error
		if last, err = top.log.Seal(); err != nil {
			return err
		}
	}
	if len(old.layers) == 0 {
		if err := merge.ClaimBase(v.base, v.journal); err != nil {
			return err
		}
	}
	err := v.update(func(r *Record) {
		if n := len(r.Layers); n > 0 && r.Layers[n-1].Log != nil {
			r.Layers[n-1].Log.Sealed, r.Layers[n-1].Log.Last = true, last
		}
		r.Layers = append(r.Layers, LayerRecord{ID: fresh.id, File: fresh.file, Log: &LogRecord{}})
		r.NextLayer = fresh.id + 1
		if cut != nil {
			c := *cut
			c.Layer, c.Size, c.Time = fresh.id, r.Size, time.Now().UTC()
			r.Cut = &c
		}
	})
	if err != nil {
		if top := old.top(); top != nil {
			top.log.Unseal()
		}
		return err
	}
	v.publish(append(append([]*layer(nil), old.layers...), fresh))
	return nil
}

// dropLowest takes the lowest layer away, whose content is durably in the base:
// first from the record, then from the stack, then from the disk.
func (v *Volume) dropLowest() error {
	old := v.stack.Load()
	low := old.layers[0]
	var bytes int64
	if low.cow != nil {
		bytes = int64(low.cow.Ops.TargetBlocks()) * bs
	}
	err := v.update(func(r *Record) {
		r.Layers = r.Layers[1:]
		r.Merged += bytes
		if low.cow != nil && !slices.ContainsFunc(r.Layers, func(l LayerRecord) bool { return l.COW != nil }) {
			r.MergedAt = time.Now().UTC()
		}
	})
	if err != nil {
		return err
	}
	v.aheadBase.Forget() // see ahead_base.go
	v.publish(old.layers[1:])
	v.forget(low)
	if low.cow != nil {
		v.forgetPromotions()
	}
	if len(old.layers) > 1 {
		return v.reopenMerger()
	}
	if err := merge.ReleaseBase(v.base); err != nil {
		v.cfg.Log.Error(err, "Mark of an unfinished merge stays on the base", "volume", v.ID())
	}
	return nil
}

// reopenMerger gives the layer that is the lowest now its merger.
func (v *Volume) reopenMerger() error {
	st := v.stack.Load()
	low := *st.layers[0]
	if low.cow == nil {
		return nil
	}
	layers := append([]*layer{&low}, st.layers[1:]...)
	if err := v.openMerger(layers); err != nil {
		return err
	}
	v.publish(layers)
	return nil
}

// forget closes a layer that nothing refers to any more and removes its files.
// What a crash or an error leaves is swept at the next opening.
func (v *Volume) forget(l *layer) {
	err := l.close()
	names := []string{l.file}
	if l.cow != nil {
		names = append(names, companions(l.file)...)
	}
	for _, n := range names {
		if path.IsAbs(n) {
			continue // it was opened where it lies and belongs to somebody else
		}
		if e := v.cfg.FS.RemoveAll(v.path(n)); e != nil && err == nil {
			err = e
		}
	}
	if err != nil {
		v.cfg.Log.Error(err, "Files of a merged layer stay behind", "volume", v.ID(), "layer", l.id)
	}
}
