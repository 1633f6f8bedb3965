package kube

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/rest"
	clienttest "k8s.io/client-go/testing"
	"k8s.io/client-go/tools/cache"
	"sigs.k8s.io/yaml"
)

// TestOutage: when the API is away it is asked less and less, and gets what is true
// when it is there again.
func TestOutage(t *testing.T) {
	a := newAPI(t)
	r, seen := a.process()
	for i := range 5 {
		id := fmt.Sprint("v", i)
		a.restore(id)
		a.bind("claim-"+id, id)
	}
	a.look(r, 0)
	away, asked := true, 0
	a.client.PrependReactor("*", "*", func(clienttest.Action) (bool, runtime.Object, error) {
		if away {
			asked++
			return true, nil, errors.New("connection refused")
		}
		return false, nil, nil
	})
	for i := range 600 {
		for id := range maps.Keys(a.volumes) {
			a.change(id, func(v *Volume) { v.Status.BytesDone = int64(i) * 1000 })
		}
		a.now = a.now.Add(time.Second)
		r.look(t.Context())
	}
	if asked < 5 || asked > 20 {
		t.Errorf("asked %d times in 10 minutes", asked)
	}
	if !r.down.Load() {
		t.Error("not known to be down")
	}
	heard(t, seen)
	away = false
	a.look(r, retryMost)
	if r.down.Load() {
		t.Error("still down")
	}
	if s := a.merge("v4").Status; s.BytesDone != 599000 || s.StartTime == nil {
		t.Errorf("status %+v", s)
	}
	heard(t, seen, slices.Repeat([]string{"Normal MergeStarted"}, 5)...)
}

// TestUnreachable: an API that is not there from the start keeps nobody waiting, and
// Run ends when it is to.
func TestUnreachable(t *testing.T) {
	client, err := dynamic.NewForConfig(&rest.Config{Host: "http://127.0.0.1:1"})
	if err != nil {
		t.Fatal(err)
	}
	a := newAPI(t)
	a.restore("v")
	r := newReporter(client, "node1", a)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); r.Run(ctx) }()
	for end := time.Now().Add(patience); !r.down.Load(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("nobody notices")
		}
	}
	cancel()
	select {
	case <-done:
	case <-time.After(patience):
		t.Error("Run does not end")
	}
}

// TestOtherNodes: what other nodes have is theirs.
func TestOtherNodes(t *testing.T) {
	a := newAPI(t)
	a.restore("v")
	a.bind("claim-v", "v")
	r, _ := a.process()
	a.look(r, 0)
	a.volumes = map[string]*Volume{}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	other := newReporter(a.client, "node2", a)
	other.start(ctx)
	if !cache.WaitForCacheSync(ctx.Done(), other.synced) {
		t.Fatal("not synced")
	}
	other.look(ctx)
	if a.merge("v") == nil {
		t.Error("another node has deleted it")
	}
	a.look(r, time.Second)
	if a.merge("v") != nil {
		t.Error("its own node has not deleted it")
	}
}

// TestOneBad: a volume that the API does not want to hear of keeps no other from
// being told of.
func TestOneBad(t *testing.T) {
	a := newAPI(t)
	r, _ := a.process()
	for _, id := range []string{"ending", "forbidden", "gone", "hooked", "well"} {
		a.restore(id)
		a.bind("claim-"+id, id)
	}
	shop := a.client.Resource(claims).Namespace("shop")
	if err := shop.Delete(t.Context(), "claim-gone", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	o, err := shop.Get(t.Context(), "claim-ending", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	o.SetDeletionTimestamp(&metav1.Time{Time: a.now})
	if _, err := shop.Update(t.Context(), o, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	a.client.PrependReactor("create", "volumemerges", func(x clienttest.Action) (bool, runtime.Object, error) {
		name := x.(clienttest.CreateAction).GetObject().(*unstructured.Unstructured).GetName()
		if name == "hooked" { // by a webhook for some namespaces that does not answer
			return true, nil, apierrors.NewInternalError(errors.New("failed calling webhook"))
		}
		return name == "forbidden", nil, apierrors.NewForbidden(merges.GroupResource(), name, errors.New("exceeded quota"))
	})
	a.look(r, 0)
	for _, id := range []string{"ending", "forbidden", "gone", "hooked"} {
		if m := a.merge(id); m != nil {
			t.Errorf("%s: %+v", id, m)
		}
	}
	if a.merge("well") == nil {
		t.Error("a volume is not told of for another's sake")
	}
	if r.down.Load() {
		t.Error("the API is taken for down")
	}
}

// TestAllBad: an API in which all fails is taken for down.
func TestAllBad(t *testing.T) {
	a := newAPI(t)
	r, _ := a.process()
	for _, id := range []string{"a", "b"} {
		a.restore(id)
		a.bind("claim-"+id, id)
	}
	a.client.PrependReactor("create", "volumemerges", func(clienttest.Action) (bool, runtime.Object, error) {
		return true, nil, apierrors.NewInternalError(errors.New("no leader"))
	})
	a.look(r, 0)
	if !r.down.Load() {
		t.Error("the API is not taken for down")
	}
}

// TestDeleted: an object that somebody deletes comes again as long as there is the
// claim, and nothing is told twice.
func TestDeleted(t *testing.T) {
	a := newAPI(t)
	r, seen := a.process()
	a.restore("v")
	a.bind("claim-v", "v")
	a.look(r, 0)
	a.change("v", func(v *Volume) { v.Status.BytesDone = mib })
	a.look(r, time.Second)
	heard(t, seen, "Normal MergeStarted")
	remove := func() {
		t.Helper()
		if err := a.client.Resource(merges).Namespace("shop").Delete(t.Context(), "v", metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	remove()
	a.look(r, time.Second)
	if m := a.merge("v"); m == nil || m.Status.StartTime == nil || m.Status.State != "Merging" {
		t.Errorf("object %+v", m)
	}
	remove()
	if err := a.client.Resource(claims).Namespace("shop").Delete(t.Context(), "claim-v", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	for range 100 {
		a.look(r, time.Second)
	}
	if m := a.merge("v"); m != nil {
		t.Errorf("object of a claim that is gone: %+v", m)
	}
	heard(t, seen)
}

// TestEnding: the object of a claim that is being deleted, which takes as long as a
// pod uses it, is kept right, also by the next process.
func TestEnding(t *testing.T) {
	a := newAPI(t)
	r, _ := a.process()
	a.restore("v")
	a.bind("claim-v", "v")
	a.look(r, 0)
	if err := a.client.Resource(claims).Namespace("shop").Delete(t.Context(), "claim-v", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	r, seen := a.process()
	a.edit("v", func(m *VolumeMerge) { m.Spec.Paused = true })
	a.change("v", func(v *Volume) { v.Status.BytesDone = mib })
	a.look(r, time.Second)
	if m := a.merge("v"); m.Status.BytesDone != mib || !a.volumes["v"].Record.Paused {
		t.Errorf("object %+v, record %+v", m, a.volumes["v"].Record)
	}
	heard(t, seen, "Normal MergeStarted")
}

// TestEvents: events reach the API, at the claim, and one that is repeated is
// counted.
func TestEvents(t *testing.T) {
	a := newAPI(t)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	r := newReporter(a.client, "node1", a)
	r.start(ctx)
	claim := &corev1.ObjectReference{APIVersion: "v1", Kind: "PersistentVolumeClaim", Namespace: "shop", Name: "claim-v", UID: "uid"}
	for range 3 {
		r.recorder.Event(claim, corev1.EventTypeWarning, "MergeStalled", "no space left")
	}
	for end := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		l, err := a.client.Resource(events).Namespace("shop").List(t.Context(), metav1.ListOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if len(l.Items) == 1 {
			e, err := eventOf(&l.Items[0], nil)
			if err != nil {
				t.Fatal(err)
			}
			if e.InvolvedObject != *claim || e.Reason != "MergeStalled" || e.Message != "no space left" || e.Type != "Warning" ||
				e.Source != (corev1.EventSource{Component: "csi.snapmerge.io", Host: "node1"}) || e.Kind != "Event" {
				t.Fatalf("event %+v", e)
			}
			if e.Count == 3 {
				return
			}
		}
		if len(l.Items) > 1 || time.Now().After(end) {
			t.Fatalf("events %+v", l.Items)
		}
	}
}

// TestSchema: the definition in the manifests has every field of the objects, so that
// the API keeps them.
func TestSchema(t *testing.T) {
	b, err := os.ReadFile("../../deploy/snapmerge.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var root map[string]any
	for _, doc := range strings.Split(string(b), "\n---\n") {
		var d struct {
			Kind string
			Spec struct {
				Versions []struct {
					Schema struct{ OpenAPIV3Schema map[string]any }
				}
			}
		}
		if err := yaml.Unmarshal([]byte(doc), &d); err != nil {
			t.Fatal(err)
		}
		if d.Kind == "CustomResourceDefinition" {
			root = d.Spec.Versions[0].Schema.OpenAPIV3Schema
		}
	}
	at := &metav1.Time{Time: time.Unix(1, 0)}
	full := VolumeMerge{
		Spec: Spec{Paused: true, RateMiBPerSecond: 1},
		Status: Status{ObservedGeneration: 1, Claim: "c", Node: "n", Snapshot: "s", State: "Merging", Progress: "p", Rate: "r", ETA: "e",
			BytesDone: 1, BytesTotal: 2, StartTime: at, CompletionTime: at, Error: "e",
			Conditions: []metav1.Condition{{Type: "t", Status: "True", ObservedGeneration: 1, LastTransitionTime: *at, Reason: "r", Message: "m"}}},
	}
	text, err := json.Marshal(full)
	if err != nil {
		t.Fatal(err)
	}
	var o map[string]any
	if err := json.Unmarshal(text, &o); err != nil {
		t.Fatal(err)
	}
	delete(o, "metadata") // the API's own
	if n := compare(t, "", o, root); n != 24 {
		t.Errorf("%d fields", n)
	}
	states := root["properties"].(map[string]any)["status"].(map[string]any)["properties"].(map[string]any)["state"].(map[string]any)["enum"]
	if want := []any{stateMerging, statePaused, stateStalled, stateFailed, stateMerged}; !slices.Equal(states.([]any), want) {
		t.Errorf("states %v", states)
	}
}

// compare wants a property for each field below o and counts them.
func compare(t *testing.T, path string, o any, schema map[string]any) int {
	t.Helper()
	switch o := o.(type) {
	case []any:
		return compare(t, path, o[0], schema["items"].(map[string]any))
	case map[string]any:
		n := 0
		props, _ := schema["properties"].(map[string]any)
		for name, below := range o {
			p, ok := props[name].(map[string]any)
			if !ok {
				t.Errorf("the schema has no %s.%s", path, name)
				continue
			}
			n += 1 + compare(t, path+"."+name, below, p)
		}
		return n
	}
	return 0
}

func TestOpen(t *testing.T) {
	t.Setenv("KUBERNETES_SERVICE_HOST", "")
	for _, c := range []struct {
		mode Mode
		ok   bool
	}{{Off, true}, {Auto, true}, {On, false}, {"maybe", false}, {"", false}} {
		r, err := Open(c.mode, "node1", "v1", nil)
		if r != nil || (err == nil) != c.ok || !c.ok && !errors.Is(err, ErrMode) {
			t.Errorf("%s: %v, %v", c.mode, r, err)
		}
	}
}

func TestTexts(t *testing.T) {
	for _, c := range []struct{ have, want string }{
		{progress(0, 0), "100%"},
		{progress(999999, 1000000), "99.9%"},
		{progress(1<<60, 1<<61), "50.0%"},
		{progress(5, 5), "100%"},
		{short(85123 * time.Microsecond), "85.1ms"},
		{short(1234 * time.Millisecond), "1.23s"},
		{short(999), "999ns"},
		{text("a\xffb"), "a?b"},
		{labelOf("node1"), "node1"},
	} {
		if c.have != c.want {
			t.Errorf("%q, want %q", c.have, c.want)
		}
	}
	if s := text(strings.Repeat("ä", maxText)); len(s) > maxText || !utf8.ValidString(s) {
		t.Errorf("%d bytes", len(s))
	}
	if s := labelOf(strings.Repeat("n", 64)); len(s) > 63 || s == labelOf(strings.Repeat("n", 65)) {
		t.Errorf("label %s", s)
	}
}
