// Package kube shows the merges of a node where people look for them: as objects
// VolumeMerge beside the claims, and as events of the claims. It takes orders there,
// too: pause, and the rate.
//
// A VolumeMerge is named after the persistent volume and lives in the namespace of
// its claim, which owns it: who may see the claim can be let see its merge, and it
// goes with the claim. There is one for each restored volume, from the restore on.
// Its node's plugin alone writes it, but for the spec.
//
// The cluster decides nothing that a merge needs. All of this works on what the
// volume manager tells once a second, in goroutines of its own; when the API does
// not answer, the latest state waits for it, and nothing else does.
package kube

import (
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

const (
	group   = "snapmerge.io"
	version = "v1alpha1"
	kind    = "VolumeMerge"

	claimKind = "PersistentVolumeClaim"

	// nodeLabel has the node, so that a plugin is told of its own objects alone.
	nodeLabel = group + "/node"
)

var (
	merges = schema.GroupVersionResource{Group: group, Version: version, Resource: "volumemerges"}
	claims = schema.GroupVersionResource{Version: "v1", Resource: "persistentvolumeclaims"}
	events = schema.GroupVersionResource{Version: "v1", Resource: "events"}
)

// VolumeMerge is the merge of a restored volume. Its schema is the custom resource
// definition in the Helm chart.
type VolumeMerge struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	Spec   Spec   `json:"spec"`
	Status Status `json:"status,omitzero"`
}

// Spec is what the merge is told. Where the commands pause, resume and rate change a
// merge on its node the spec follows, so the last word counts wherever it is said.
type Spec struct {
	Paused bool `json:"paused"`
	// RateMiBPerSecond is the most that the merge writes; 0: the node's default.
	RateMiBPerSecond int `json:"rateMiBPerSecond"`
}

// Status is what the merge has come to.
type Status struct {
	// ObservedGeneration is that of the spec that is in force.
	ObservedGeneration int64  `json:"observedGeneration,omitempty"`
	Claim              string `json:"persistentVolumeClaim,omitempty"`
	Node               string `json:"node,omitempty"`
	Snapshot           string `json:"snapshot,omitempty"` // id on the node
	State              string `json:"state,omitempty"`
	// Progress, Rate and ETA are for reading: "41.5%", "118 MiB/s", "1m20s". The last
	// two are empty when nothing is being merged.
	Progress   string `json:"progress,omitempty"`
	Rate       string `json:"rate,omitempty"`
	ETA        string `json:"eta,omitempty"`
	BytesDone  int64  `json:"bytesDone"`
	BytesTotal int64  `json:"bytesTotal"`
	// StartTime is when the volume was restored, with which the merge begins. It is
	// set when the first bytes are merged.
	StartTime      *metav1.Time `json:"startTime,omitempty"`
	CompletionTime *metav1.Time `json:"completionTime,omitempty"`
	Error          string       `json:"error,omitempty"`
	// Conditions are of the types below.
	Conditions []metav1.Condition `json:"conditions,omitempty"`
}

// Types of conditions.
const (
	Staged  = "Staged"  // the volume has been in service; it stays so
	Merged  = "Merged"  // the snapshot's data is in the volume's base
	Healthy = "Healthy" // False has the reasons of package health
)

// States of a merge.
const (
	stateMerging = "Merging"
	statePaused  = "Paused"
	stateStalled = "Stalled"
	stateFailed  = "Failed"
	stateMerged  = "Merged"
)

// owner is the claim that owns the object; nil: none does.
func (m *VolumeMerge) owner() *corev1.ObjectReference {
	for _, o := range m.OwnerReferences {
		if o.Kind == claimKind {
			return &corev1.ObjectReference{APIVersion: o.APIVersion, Kind: o.Kind, Namespace: m.Namespace, Name: o.Name, UID: o.UID}
		}
	}
	return nil
}

func fromUnstructured(u *unstructured.Unstructured) (*VolumeMerge, error) {
	m := &VolumeMerge{}
	return m, runtime.DefaultUnstructuredConverter.FromUnstructured(u.Object, m)
}

func toUnstructured(m *VolumeMerge) (*unstructured.Unstructured, error) {
	o, err := runtime.DefaultUnstructuredConverter.ToUnstructured(m)
	return &unstructured.Unstructured{Object: o}, err
}
