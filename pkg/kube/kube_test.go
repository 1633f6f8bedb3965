package kube

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/dynamic/fake"
	clienttest "k8s.io/client-go/testing"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/record"

	"github.com/snapmerge/snapmerge/pkg/volume"
)

const (
	mib      = 1 << 20
	patience = 3 * time.Minute
)

// api is a small Kubernetes API, and the node's volumes.
type api struct {
	*testing.T
	client *fake.FakeDynamicClient

	mu      sync.Mutex
	volumes map[string]*Volume
	now     time.Time
	uids    int
}

func newAPI(t *testing.T) *api {
	a := &api{T: t, volumes: map[string]*Volume{}, now: time.Date(2026, 1, 2, 3, 4, 5, 678, time.UTC)}
	a.client = fake.NewSimpleDynamicClientWithCustomListKinds(runtime.NewScheme(), map[schema.GroupVersionResource]string{
		merges: "VolumeMergeList", claims: "PersistentVolumeClaimList", events: "EventList",
	})
	// What the API does and the fake does not.
	a.client.PrependReactor("create", "*", func(action clienttest.Action) (bool, runtime.Object, error) {
		o := action.(clienttest.CreateAction).GetObject().(*unstructured.Unstructured)
		a.mu.Lock()
		a.uids++
		o.SetUID(types.UID(fmt.Sprint("uid-", a.uids)))
		a.mu.Unlock()
		o.SetGeneration(1)
		return false, nil, nil
	})
	change := clienttest.ObjectReaction(a.client.Tracker())
	a.client.PrependReactor("patch", "volumemerges", func(action clienttest.Action) (bool, runtime.Object, error) {
		if action.GetSubresource() != "" {
			return false, nil, nil
		}
		_, o, err := change(action)
		if err != nil {
			return true, nil, err
		}
		u := o.(*unstructured.Unstructured)
		u.SetGeneration(u.GetGeneration() + 1)
		return true, u, a.client.Tracker().Update(merges, u, u.GetNamespace())
	})
	return a
}

// process is a reporter as a new process has one. Events are collected.
func (a *api) process() (*Reporter, *record.FakeRecorder) {
	a.Helper()
	ctx, cancel := context.WithCancel(a.Context())
	a.Cleanup(cancel)
	r := newReporter(a.client, "node1", a)
	r.now = func() time.Time { return a.now }
	r.start(ctx)
	seen := record.NewFakeRecorder(100)
	r.recorder = seen
	if !cache.WaitForCacheSync(ctx.Done(), r.synced) {
		a.Fatal("not synced")
	}
	return r, seen
}

func (a *api) List() []Volume {
	a.mu.Lock()
	defer a.mu.Unlock()
	var all []Volume
	for _, v := range a.volumes {
		all = append(all, *v)
	}
	slices.SortFunc(all, func(a, b Volume) int { return strings.Compare(a.Status.ID, b.Status.ID) })
	return all
}

func (a *api) SetPaused(id string, paused bool) error {
	a.change(id, func(v *Volume) { v.Record.Paused = paused })
	return nil
}

func (a *api) SetRate(id string, mib int) error {
	a.change(id, func(v *Volume) { v.Record.Rate = mib })
	return nil
}

func (a *api) change(id string, change func(v *Volume)) {
	a.mu.Lock()
	defer a.mu.Unlock()
	v := *a.volumes[id]
	if v.Record != nil {
		r := *v.Record
		v.Record = &r
	}
	change(&v)
	a.volumes[id] = &v
}

// restore makes a volume of 100 MiB from a snapshot for a claim of its name.
func (a *api) restore(id string) {
	claim := volume.Claim{Namespace: "shop", PVC: "claim-" + id, PV: id}
	a.volumes[id] = &Volume{
		Status: volume.Status{ID: id, State: volume.Merging, BytesTotal: 100 * mib, ETASeconds: -1, Claim: claim},
		Record: &volume.Record{ID: id, Created: a.now, Restored: true, Source: "snap-1", Rate: 7, Claim: claim,
			Layers: []volume.LayerRecord{{ID: 1, File: "layer-001.cow", COW: &volume.COWRecord{}}}},
	}
}

func (a *api) merged(v *Volume) {
	v.Status.State, v.Status.BytesDone, v.Status.Percent, v.Status.RateMiB = volume.Merged, 100*mib, 100, 0
	v.Record.Layers, v.Record.Merged, v.Record.MergedAt = nil, 100*mib, v.Record.Created.Add(12500*time.Millisecond)
}

// bind makes the claim of a volume, bound to that of another name or to nothing.
func (a *api) bind(claim, volume string) {
	a.Helper()
	o := &unstructured.Unstructured{Object: map[string]any{
		"apiVersion": "v1", "kind": "PersistentVolumeClaim",
		"metadata": map[string]any{"namespace": "shop", "name": claim},
		"spec":     map[string]any{"volumeName": volume},
	}}
	c := a.client.Resource(claims).Namespace("shop")
	if _, err := c.Create(a.Context(), o, metav1.CreateOptions{}); err == nil {
		return
	}
	o.SetUID("uid-of-claim")
	if _, err := c.Update(a.Context(), o, metav1.UpdateOptions{}); err != nil {
		a.Fatal(err)
	}
}

// look has the reporter look at everything, after d, with what there is at the API
// known to it.
func (a *api) look(r *Reporter, d time.Duration) {
	a.Helper()
	for end := time.Now().Add(patience); !a.known(r); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			a.Fatal("the reporter is not told of what changes")
		}
	}
	a.now = a.now.Add(d)
	r.look(a.Context())
}

func (a *api) known(r *Reporter) bool {
	l, err := a.client.Resource(merges).Namespace("").List(a.Context(), metav1.ListOptions{LabelSelector: nodeLabel + "=node1"})
	if err != nil {
		return true // it will not get more
	}
	if len(r.store.List()) != len(l.Items) {
		return false
	}
	for i := range l.Items {
		have, ok, _ := r.store.Get(&l.Items[i])
		x, _ := json.Marshal(have)
		y, _ := json.Marshal(&l.Items[i])
		if !ok || string(x) != string(y) {
			return false
		}
	}
	return true
}

// merge is the object of a volume; nil: there is none.
func (a *api) merge(id string) *VolumeMerge {
	a.Helper()
	u, err := a.client.Resource(merges).Namespace("shop").Get(a.Context(), id, metav1.GetOptions{})
	if err != nil {
		return nil
	}
	m, err := fromUnstructured(u)
	if err != nil {
		a.Fatal(err)
	}
	return m
}

// edit changes an object as people do.
func (a *api) edit(id string, change func(m *VolumeMerge)) {
	a.Helper()
	m := a.merge(id)
	change(m)
	m.Generation++
	u, err := toUnstructured(m)
	if err == nil {
		_, err = a.client.Resource(merges).Namespace("shop").Update(a.Context(), u, metav1.UpdateOptions{})
	}
	if err != nil {
		a.Fatal(err)
	}
}

// wrote is how many statuses have been written.
func (a *api) wrote() int {
	n := 0
	for _, x := range a.client.Actions() {
		if x.Matches("patch", "volumemerges/status") {
			n++
		}
	}
	return n
}

// heard compares the events since the last time with want, by their beginnings.
func heard(t *testing.T, r *record.FakeRecorder, want ...string) {
	t.Helper()
	var have []string
	for len(r.Events) > 0 {
		have = append(have, <-r.Events)
	}
	if !slices.EqualFunc(have, want, strings.HasPrefix) {
		t.Errorf("events %q, want %q", have, want)
	}
}

// TestLife follows a restored volume from its claim to its end.
func TestLife(t *testing.T) {
	a := newAPI(t)
	r, seen := a.process()
	a.restore("v")
	a.look(r, 0) // there is no claim yet
	a.bind("claim-v", "")
	a.look(r, 2*time.Second)
	a.bind("claim-v", "other")
	a.look(r, 5*time.Second)
	if m := a.merge("v"); m != nil {
		t.Fatalf("made for a claim that is not the volume's: %+v", m)
	}
	a.bind("claim-v", "v")
	a.look(r, 10*time.Second)
	m := a.merge("v")
	if m == nil {
		t.Fatal("not made")
	}
	if o := m.OwnerReferences; len(o) != 1 || o[0].Kind != "PersistentVolumeClaim" || o[0].Name != "claim-v" || o[0].UID != "uid-of-claim" || o[0].BlockOwnerDeletion != nil {
		t.Errorf("owners %+v", o)
	}
	if m.Labels[nodeLabel] != "node1" || len(m.Finalizers) > 0 || m.Spec != (Spec{RateMiBPerSecond: 7}) {
		t.Errorf("made %+v", m)
	}
	s := m.Status
	if s.Claim != "claim-v" || s.Node != "node1" || s.Snapshot != "snap-1" || s.State != "Merging" || s.Progress != "0.0%" ||
		s.Rate != "" || s.ETA != "" || s.BytesTotal != 100*mib || s.StartTime != nil || s.ObservedGeneration != 1 {
		t.Errorf("status %+v", s)
	}
	heard(t, seen)

	a.change("v", func(v *Volume) { v.StagedIn = 85123 * time.Microsecond })
	a.look(r, time.Second)
	heard(t, seen, "Normal RestoreStaged The volume restored from snapshot snap-1 was staged in 85.1ms")
	a.change("v", func(v *Volume) {
		v.Status.BytesDone, v.Status.RateMiB, v.Status.ETASeconds = 10*mib+1, 10.25, 9
	})
	a.look(r, time.Second)
	heard(t, seen, "Normal MergeStarted Merging 100 MiB of snapshot snap-1")
	if s := a.merge("v").Status; s.Progress != "10.0%" || s.Rate != "10.25 MiB/s" || s.ETA != "9s" || !s.StartTime.Equal(&metav1.Time{Time: a.volumes["v"].Record.Created.Truncate(time.Second)}) {
		t.Errorf("status %+v", s)
	}

	// Progress is written now and then, a change of the state at once, nothing never.
	before := a.wrote()
	for i := range 10 {
		a.change("v", func(v *Volume) { v.Status.BytesDone = int64(20+i) * mib })
		a.look(r, time.Second)
	}
	if n := a.wrote() - before; n != 2 {
		t.Errorf("%d writes in 10 s", n)
	}
	before = a.wrote()
	a.change("v", func(v *Volume) { v.Status.State, v.Record.Paused = volume.Paused, true })
	a.look(r, time.Second) // the spec follows
	a.look(r, time.Second)
	if s := a.merge("v").Status; s.State != "Paused" || s.Rate != "" || s.ETA != "" || s.Progress != "29.0%" {
		t.Errorf("status %+v", s)
	}
	for range 10 {
		a.look(r, 10*time.Second)
	}
	if n := a.wrote() - before; n != 1 {
		t.Errorf("%d writes for one change", n)
	}

	// Another process takes over in the middle, and at the end.
	r, seen = a.process()
	a.look(r, time.Second)
	heard(t, seen)
	a.change("v", a.merged)
	a.look(r, time.Second)
	heard(t, seen, "Normal MergeCompleted Merged 100 MiB (104857600 bytes) in 12.5 seconds")
	s = a.merge("v").Status
	if s.State != "Merged" || s.Progress != "100%" || s.CompletionTime.Sub(s.StartTime.Time) != 12*time.Second {
		t.Errorf("status %+v", s)
	}
	for _, c := range s.Conditions {
		if c.Status != metav1.ConditionTrue {
			t.Errorf("condition %+v", c)
		}
	}
	before = a.wrote()
	r, seen = a.process()
	for range 3 {
		a.look(r, time.Hour)
	}
	heard(t, seen)
	if n := a.wrote() - before; n != 0 {
		t.Errorf("%d writes when nothing changes", n)
	}

	// What happens to the volume later is not its merge.
	a.change("v", func(v *Volume) { v.Status.State = volume.Encoding })
	a.look(r, time.Hour)
	if s := a.merge("v").Status; s.State != "Merged" {
		t.Errorf("status %+v", s)
	}
	a.mu.Lock()
	delete(a.volumes, "v")
	a.mu.Unlock()
	a.look(r, time.Second)
	if a.merge("v") != nil {
		t.Error("the object stays when the volume is gone")
	}
	heard(t, seen)
}

// TestFast: a merge that is over before anybody looks is told of in full.
func TestFast(t *testing.T) {
	a := newAPI(t)
	r, seen := a.process()
	a.restore("v")
	a.bind("claim-v", "v")
	a.change("v", a.merged)
	a.change("v", func(v *Volume) { v.StagedIn = time.Second })
	a.now = a.now.Add(13 * time.Second)
	a.look(r, 0)
	heard(t, seen, "Normal RestoreStaged", "Normal MergeStarted", "Normal MergeCompleted")
	if m := a.merge("v"); m == nil || m.Status.State != "Merged" {
		t.Errorf("object %+v", m)
	}
}

// TestNone: no objects and no news of volumes that are not being merged or have no
// claim.
func TestNone(t *testing.T) {
	a := newAPI(t)
	r, seen := a.process()
	for i, change := range []func(v *Volume){
		func(v *Volume) { v.Record.Restored, v.Record.Layers = false, nil }, // never restored
		func(v *Volume) { a.merged(v); v.Record.MergedAt = v.Record.MergedAt.Add(-time.Hour) },
		func(v *Volume) { a.merged(v); v.Record.MergedAt = time.Time{} }, // by an older program
		func(v *Volume) { v.Status.Claim = volume.Claim{} },
	} {
		id := fmt.Sprint("v", i)
		a.restore(id)
		a.bind("claim-"+id, id)
		a.change(id, func(v *Volume) { v.StagedIn = time.Second; change(v) })
		a.look(r, time.Hour)
		if m := a.merge(id); m != nil {
			t.Errorf("volume %d: %+v", i, m)
		}
		heard(t, seen)
	}
}

// TestOrders: the last word counts, wherever it is said.
func TestOrders(t *testing.T) {
	a := newAPI(t)
	r, _ := a.process()
	a.restore("v")
	a.bind("claim-v", "v")
	a.look(r, 0)
	a.edit("v", func(m *VolumeMerge) { m.Spec = Spec{Paused: true, RateMiBPerSecond: 3} })
	a.look(r, time.Second)
	if rec := a.volumes["v"].Record; !rec.Paused || rec.Rate != 3 {
		t.Errorf("the order is not obeyed: %+v", rec)
	}
	if g := a.merge("v").Status.ObservedGeneration; g != 2 {
		t.Errorf("observed generation %d", g)
	}
	// On the node somebody resumes.
	a.change("v", func(v *Volume) { v.Record.Paused = false })
	a.look(r, time.Second)
	if m := a.merge("v"); m.Spec != (Spec{RateMiBPerSecond: 3}) {
		t.Errorf("the spec does not follow: %+v", m.Spec)
	}
	if a.volumes["v"].Record.Paused {
		t.Error("an old order is obeyed")
	}
	// And once more before the next look: the spec that was made here is no order.
	a.change("v", func(v *Volume) { v.Record.Paused = true })
	a.look(r, time.Second)
	if m := a.merge("v"); !m.Spec.Paused {
		t.Errorf("the spec does not follow: %+v", m.Spec)
	}
	a.change("v", func(v *Volume) { v.Record.Paused = false })
	for range 2 {
		a.look(r, time.Second)
	}
	if a.volumes["v"].Record.Paused || a.merge("v").Spec.Paused {
		t.Error("the volume is paused though it was resumed last")
	}
	// Both at once: the spec counts, also for a process that starts just then.
	a.edit("v", func(m *VolumeMerge) { m.Spec = Spec{RateMiBPerSecond: 9} })
	a.change("v", func(v *Volume) { v.Record.Rate = 1 })
	r, _ = a.process()
	a.look(r, time.Second)
	if rec := a.volumes["v"].Record; rec.Rate != 9 {
		t.Errorf("rate %d", rec.Rate)
	}
}

// TestTroubles: each trouble is told once, until it is over.
func TestTroubles(t *testing.T) {
	a := newAPI(t)
	r, seen := a.process()
	a.restore("v")
	a.bind("claim-v", "v")
	a.look(r, 0)
	stall := func(v *Volume) { v.Status.State, v.Status.Error = volume.Stalled, "no space left" }
	goOn := func(v *Volume) { v.Status.State, v.Status.Error = volume.Merging, "" }
	healthy := func(want metav1.ConditionStatus, reason string) {
		t.Helper()
		for _, c := range a.merge("v").Status.Conditions {
			if c.Type == Healthy && (c.Status != want || c.Reason != reason) {
				t.Errorf("condition %+v", c)
			}
		}
	}
	a.change("v", stall)
	a.look(r, time.Second)
	heard(t, seen, "Warning MergeStalled no space left")
	healthy(metav1.ConditionFalse, "MergeStalled")
	if s := a.merge("v").Status; s.State != "Stalled" || s.Error != "no space left" {
		t.Errorf("status %+v", s)
	}
	for range 100 { // it comes and goes
		a.change("v", goOn)
		a.look(r, time.Second)
		a.change("v", stall)
		a.look(r, time.Second)
	}
	heard(t, seen)
	// The next process does not know at once.
	r, seen = a.process()
	a.change("v", goOn)
	a.look(r, time.Second)
	a.change("v", stall)
	a.look(r, time.Second)
	heard(t, seen)
	a.change("v", goOn)
	a.look(r, over)
	healthy(metav1.ConditionTrue, "Healthy")
	if s := a.merge("v").Status; s.State != "Merging" || s.Error != "" {
		t.Errorf("status %+v", s)
	}
	a.change("v", stall)
	a.look(r, time.Second)
	heard(t, seen, "Warning MergeStalled")
	a.change("v", func(v *Volume) { v.Status.State, v.Status.Error = volume.Failed, "input/output error" })
	a.look(r, time.Second)
	heard(t, seen, "Warning MergeFailed input/output error")
	// Such a one cannot even be opened.
	a.change("v", func(v *Volume) {
		v.Status = volume.Status{ID: "v", State: volume.Failed, Corrupt: true, Error: "bad\xff", Claim: v.Status.Claim}
		v.Record = nil
	})
	a.look(r, over)
	heard(t, seen, "Warning SnapshotCorrupt bad?")
	healthy(metav1.ConditionFalse, "SnapshotCorrupt")
	if s := a.merge("v").Status; s.State != "Failed" || s.BytesTotal != 100*mib || s.Snapshot != "snap-1" {
		t.Errorf("status %+v", s)
	}
}

// TestOthersTroubles: a volume without a merge has events.
func TestOthersTroubles(t *testing.T) {
	a := newAPI(t)
	r, seen := a.process()
	a.restore("v")
	a.change("v", func(v *Volume) { v.Record.Restored, v.Record.Layers = false, nil })
	a.change("v", func(v *Volume) { v.Status.State, v.Status.Error = volume.Stalled, "no space left" })
	a.look(r, time.Second) // there is no claim
	heard(t, seen)
	a.bind("claim-v", "v")
	a.look(r, time.Minute)
	a.look(r, time.Minute)
	heard(t, seen, "Warning MergeStalled")
	if a.merge("v") != nil {
		t.Error("there is an object")
	}
}
