package main

import (
	"strings"
	"testing"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/dynamic/fake"
)

// TestForgetNode: without --yes nothing is changed, without --claims nothing that is
// used.
func TestForgetNode(t *testing.T) {
	object := func(kind, name string, spec map[string]any) *unstructured.Unstructured {
		return &unstructured.Unstructured{Object: map[string]any{
			"apiVersion": "v1", "kind": kind, "metadata": map[string]any{"name": name, "namespace": map[string]string{"PersistentVolumeClaim": "default"}[kind]}, "spec": spec,
		}}
	}
	volume := func(name, claim string) *unstructured.Unstructured {
		return object("PersistentVolume", name, map[string]any{
			"csi": map[string]any{"driver": "csi.snapmerge.io"}, "claimRef": map[string]any{"namespace": "default", "name": claim},
			"nodeAffinity": map[string]any{"required": map[string]any{"nodeSelectorTerms": []any{map[string]any{"matchExpressions": []any{
				map[string]any{"key": "topology.csi.snapmerge.io/node", "operator": "In", "values": []any{"gone"}},
			}}}}},
		})
	}
	volumes := schema.GroupVersionResource{Version: "v1", Resource: "persistentvolumes"}
	for _, c := range []struct {
		name        string
		yes, claims bool
		used, free  string // action
		left        int    // volumes
	}{
		{"list", false, false, "keep", "remove", 2},
		{"list with claims", false, true, "remove", "remove", 2},
		{"remove", true, false, "keep", "removed", 1},
		{"remove with claims", true, true, "removed", "removed", 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			client := fake.NewSimpleDynamicClientWithCustomListKinds(runtime.NewScheme(), map[schema.GroupVersionResource]string{
				volumes: "PersistentVolumeList",
				{Group: "snapshot.storage.k8s.io", Version: "v1", Resource: "volumesnapshotcontents"}: "VolumeSnapshotContentList",
			}, volume("free", "deleted"), volume("used", "claim"), object("PersistentVolumeClaim", "claim", nil))
			var out strings.Builder
			if err := forgetNode(t.Context(), client, "gone", c.yes, c.claims, &out); err != nil {
				t.Fatal(err)
			}
			actions := map[string]string{}
			for line := range strings.Lines(out.String()) {
				if f := strings.Fields(line); len(f) > 2 && f[0] == "PersistentVolume" {
					actions[f[1]] = f[len(f)-1]
				}
			}
			if actions["used"] != c.used || actions["free"] != c.free {
				t.Errorf("actions %v, want %s and %s:\n%s", actions, c.used, c.free, &out)
			}
			left := 0
			for _, name := range []string{"used", "free"} {
				if _, err := client.Tracker().Get(volumes, "", name); err == nil {
					left++
				}
			}
			if left != c.left {
				t.Errorf("%d volumes are left, want %d", left, c.left)
			}
		})
	}
}
