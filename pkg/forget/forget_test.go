package forget

import (
	"errors"
	"slices"
	"strings"
	"testing"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/util/yaml"
	"k8s.io/client-go/dynamic/fake"
	clienttesting "k8s.io/client-go/testing"
)

// cluster has an API with objects; as in the real one, what has finalizers is only
// marked when it is deleted.
func cluster(t *testing.T, objects ...string) *fake.FakeDynamicClient {
	t.Helper()
	var all []runtime.Object
	for _, text := range objects {
		o := &unstructured.Unstructured{}
		if err := yaml.Unmarshal([]byte(text), &o.Object); err != nil {
			t.Fatal(err)
		}
		all = append(all, o)
	}
	c := fake.NewSimpleDynamicClientWithCustomListKinds(runtime.NewScheme(), map[schema.GroupVersionResource]string{
		nodes: "NodeList", volumes: "PersistentVolumeList", claims: "PersistentVolumeClaimList",
		contents: "VolumeSnapshotContentList", snapshots: "VolumeSnapshotList",
	}, all...)
	c.PrependReactor("delete", "*", func(a clienttesting.Action) (bool, runtime.Object, error) {
		d := a.(clienttesting.DeleteAction)
		got, err := c.Tracker().Get(d.GetResource(), d.GetNamespace(), d.GetName())
		if err != nil {
			return true, nil, err
		}
		o := got.(*unstructured.Unstructured)
		if len(o.GetFinalizers()) == 0 {
			return false, nil, nil
		}
		now := metav1.Now()
		o.SetDeletionTimestamp(&now)
		return true, nil, c.Tracker().Update(d.GetResource(), o, d.GetNamespace())
	})
	return c
}

func pv(name, driver, node, claim string) string {
	text := `
apiVersion: v1
kind: PersistentVolume
metadata: {name: ` + name + `, finalizers: [kubernetes.io/pv-protection, external-provisioner.volume.kubernetes.io/finalizer]}
spec:
  csi: {driver: ` + driver + `, volumeHandle: ` + name + `}
  nodeAffinity: {required: {nodeSelectorTerms: [{matchExpressions: [{key: topology.csi.snapmerge.io/node, operator: In, values: [` + node + `]}]}]}}
`
	if claim != "" {
		text += "  claimRef: {namespace: default, name: " + claim + "}\n"
	}
	return text
}

func content(name, node, snapshot string) string {
	return `
apiVersion: snapshot.storage.k8s.io/v1
kind: VolumeSnapshotContent
metadata:
  name: ` + name + `
  labels: {snapshot.storage.kubernetes.io/managed-by: ` + node + `}
  finalizers: [snapshot.storage.kubernetes.io/volumesnapshotcontent-bound-protection]
spec:
  driver: csi.snapmerge.io
  volumeSnapshotRef: {namespace: default, name: ` + snapshot + `}
`
}

func named(kind, group, name string) string {
	return `
apiVersion: ` + group + `
kind: ` + kind + `
metadata: {name: ` + name + `, namespace: default}
`
}

const snapshotGroup = "snapshot.storage.k8s.io/v1"

var lost = []string{
	pv("released", "csi.snapmerge.io", "gone", "deleted"),
	pv("used", "csi.snapmerge.io", "gone", "claim"),
	pv("never", "csi.snapmerge.io", "gone", ""),
	pv("elsewhere", "csi.snapmerge.io", "here", "other"),
	pv("both", "csi.snapmerge.io", "gone, here", "other"),
	pv("foreign", "csi.example.com", "gone", "other"),
	named("PersistentVolumeClaim", "v1", "claim"),
	named("PersistentVolumeClaim", "v1", "other"),
	content("stuck", "gone", "deleted"),
	content("wanted", "gone", "snapshot"),
	content("waiting", "gone", "terminating"),
	content("far", "here", "deleted"),
	named("VolumeSnapshot", snapshotGroup, "snapshot"),
	"apiVersion: " + snapshotGroup + "\nkind: VolumeSnapshot\nmetadata: {name: terminating, namespace: default, deletionTimestamp: 2026-01-01T00:00:00Z, finalizers: [x]}\n",
}

func TestFind(t *testing.T) {
	items, err := Find(t.Context(), cluster(t, lost...), "gone")
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, i := range items {
		got = append(got, i.Kind+" "+i.Name+" "+i.User)
	}
	want := []string{
		"PersistentVolume never ", "PersistentVolume released ", "PersistentVolume used default/claim",
		"VolumeSnapshotContent stuck ", "VolumeSnapshotContent waiting ", "VolumeSnapshotContent wanted default/snapshot",
	}
	if !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestNodeExists(t *testing.T) {
	node := "apiVersion: v1\nkind: Node\nmetadata: {name: gone}\n"
	if items, err := Find(t.Context(), cluster(t, append(lost, node)...), "gone"); !errors.Is(err, ErrNodeExists) {
		t.Errorf("got %v, %v", items, err)
	}
}

// TestRemove: what is removed keeps no finalizer that nobody would take away, and
// those of others; what refers to it is deleted as well.
func TestRemove(t *testing.T) {
	c := cluster(t, lost...)
	items, err := Find(t.Context(), c, "gone")
	if err != nil {
		t.Fatal(err)
	}
	remove := func() {
		t.Helper()
		for _, i := range items {
			if err := i.Remove(t.Context(), c); err != nil {
				t.Fatal(err)
			}
		}
	}
	remove()
	for _, i := range items {
		o, err := c.Tracker().Get(i.resource, "", i.Name)
		if err != nil {
			t.Fatal(err)
		}
		u := o.(*unstructured.Unstructured)
		var want []string
		if i.resource == volumes {
			want = []string{"kubernetes.io/pv-protection"}
		}
		if u.GetDeletionTimestamp() == nil || !slices.Equal(u.GetFinalizers(), want) {
			t.Errorf("%s %s: deleted at %v, finalizers %v, want %v", i.Kind, i.Name, u.GetDeletionTimestamp(), u.GetFinalizers(), want)
		}
	}
	for gvr, name := range map[schema.GroupVersionResource]string{claims: "claim", snapshots: "snapshot"} {
		if _, err := c.Tracker().Get(gvr, "default", name); err == nil {
			t.Errorf("%s is still there", name)
		}
	}
	for gvr, name := range map[schema.GroupVersionResource]string{volumes: "elsewhere", contents: "far"} {
		o, err := c.Tracker().Get(gvr, "", name)
		if err != nil || o.(*unstructured.Unstructured).GetDeletionTimestamp() != nil {
			t.Errorf("%s is deleted: %v", name, err)
		}
	}
	remove() // most of it is gone
}

// TestAnotherOfItsName: a claim, or a snapshot, that has the name of the one that is gone
// belongs to another volume, on a node that lives.
func TestAnotherOfItsName(t *testing.T) {
	with := func(text, old, new string) string {
		t.Helper()
		changed := strings.Replace(text, old, new, 1)
		if changed == text {
			t.Fatalf("no %q in %s", old, text)
		}
		return changed
	}
	c := cluster(t,
		with(pv("old", "csi.snapmerge.io", "gone", "data-0"), "name: data-0", "name: data-0, uid: one"),
		with(named("PersistentVolumeClaim", "v1", "data-0"), "namespace: default", "namespace: default, uid: two"),
		with(content("old", "gone", "daily"), "name: daily", "name: daily, uid: one"),
		with(named("VolumeSnapshot", snapshotGroup, "daily"), "namespace: default", "namespace: default, uid: two"),
		with(pv("bound", "csi.snapmerge.io", "gone", "data-1"), "name: data-1", "name: data-1, uid: three"),
		with(named("PersistentVolumeClaim", "v1", "data-1"), "namespace: default", "namespace: default, uid: three"),
	)
	// As in the real API, a deletion that names an object spares another of its name.
	c.PrependReactor("delete", "*", func(a clienttesting.Action) (bool, runtime.Object, error) {
		d := a.(clienttesting.DeleteActionImpl)
		got, err := c.Tracker().Get(d.GetResource(), d.GetNamespace(), d.GetName())
		if err != nil {
			return true, nil, err
		}
		if p := d.DeleteOptions.Preconditions; p != nil && p.UID != nil && *p.UID != got.(*unstructured.Unstructured).GetUID() {
			return true, nil, apierrors.NewConflict(d.GetResource().GroupResource(), d.GetName(), errors.New("another UID"))
		}
		return false, nil, nil
	})
	items, err := Find(t.Context(), c, "gone")
	if err != nil {
		t.Fatal(err)
	}
	var users []string
	for _, i := range items {
		users = append(users, i.Name+" "+i.User)
	}
	if want := []string{"bound default/data-1", "old ", "old "}; !slices.Equal(users, want) {
		t.Errorf("used by %q, want %q", users, want)
	}
	// Between finding and removing data-1 is made anew, too.
	anew := &unstructured.Unstructured{}
	if err := yaml.Unmarshal([]byte(with(named("PersistentVolumeClaim", "v1", "data-1"), "namespace: default", "namespace: default, uid: four")), &anew.Object); err != nil {
		t.Fatal(err)
	}
	if err := c.Tracker().Update(claims, anew, "default"); err != nil {
		t.Fatal(err)
	}
	for _, i := range items {
		if err := i.Remove(t.Context(), c); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"data-0", "data-1"} {
		if _, err := c.Tracker().Get(claims, "default", name); err != nil {
			t.Errorf("the claim of another volume: %v", err)
		}
	}
	if _, err := c.Tracker().Get(snapshots, "default", "daily"); err != nil {
		t.Errorf("another snapshot: %v", err)
	}
}
