package driver

import (
	"testing"

	"github.com/snapmerge/snapmerge/pkg/volume"
)

// TestObjects: what package kube is told of volumes, and what it can order.
func TestObjects(t *testing.T) {
	needDevices(t)
	n := newNode(t, nil)
	o := objects{n.p}
	c := blockCap(writer)
	id := n.create("source", 16*mib, "", c)
	of := func(id string) (status volume.Status, rec *volume.Record, staged bool) {
		t.Helper()
		for _, v := range o.List() {
			if v.Status.ID == id {
				return v.Status, v.Record, v.StagedIn > 0
			}
		}
		return
	}
	if s, r, staged := of(id); s.ID != id || r == nil || r.Restored || staged {
		t.Errorf("made: %+v, %+v, staged %v", s, r, staged)
	}
	n.use(id, c)
	first := o.staged.of(id)
	n.leave(id)
	n.use(id, c)
	if first == 0 || o.staged.of(id) != first {
		t.Errorf("staged in %v, then %v", first, o.staged.of(id))
	}
	copied := n.create("copy", 16*mib, n.snapshot("snap", id).SnapshotId, c)
	if err := o.SetPaused(copied, true); err != nil {
		t.Error(err)
	}
	if err := o.SetRate(copied, 3); err != nil {
		t.Error(err)
	}
	if _, r, _ := of(copied); r == nil || !r.Restored || !r.Paused || r.Rate != 3 {
		t.Errorf("restored: %+v", r)
	}
	n.leave(id)
	n.delete(id)
	if s, _, _ := of(id); s.ID != "" || o.staged.of(id) != 0 {
		t.Errorf("deleted: %+v, %v", s, o.staged.of(id))
	}
	if o.SetPaused(id, true) == nil || o.SetRate(id, 1) == nil {
		t.Error("a volume that is not there takes orders")
	}
}
