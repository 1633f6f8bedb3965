// Package forget removes from the Kubernetes API what is left there of a node that
// is gone for good.
//
// A volume is deleted by the provisioner of its own node, a snapshot by the
// snapshotter of its own, so that of a lost node both stay for ever: a
// PersistentVolume keeps the provisioner's finalizer, a VolumeSnapshotContent the
// snapshotter's. Their data is gone with the node's disk; here the objects go, too.
package forget

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/util/retry"

	"github.com/snapmerge/snapmerge/pkg/driver"
)

var (
	nodes     = schema.GroupVersionResource{Version: "v1", Resource: "nodes"}
	volumes   = schema.GroupVersionResource{Version: "v1", Resource: "persistentvolumes"}
	claims    = schema.GroupVersionResource{Version: "v1", Resource: "persistentvolumeclaims"}
	contents  = schema.GroupVersionResource{Group: "snapshot.storage.k8s.io", Version: "v1", Resource: "volumesnapshotcontents"}
	snapshots = schema.GroupVersionResource{Group: "snapshot.storage.k8s.io", Version: "v1", Resource: "volumesnapshots"}
)

// What keeps the objects: the finalizer of the provisioner (package controller of
// sig-storage-lib-external-provisioner) and of the snapshotter (package utils of
// external-snapshotter).
var finalizers = map[schema.GroupVersionResource]string{
	volumes:  "external-provisioner.volume.kubernetes.io/finalizer",
	contents: "snapshot.storage.kubernetes.io/volumesnapshotcontent-bound-protection",
}

// managedBy is the label that the snapshot controller gives a content, with the name
// of its node.
const managedBy = "snapshot.storage.kubernetes.io/managed-by"

// ErrNodeExists: the node is not gone.
var ErrNodeExists = errors.New("the node exists")

// Item is an object that is left of the node.
type Item struct {
	Kind string // PersistentVolume or VolumeSnapshotContent
	Name string
	// User is what refers to it, a PersistentVolumeClaim or VolumeSnapshot, as
	// namespace/name; empty if nobody does any more.
	User string

	// userUID is the user's: one of the same name may be another object, which is none
	// of ours. Empty: the reference does not say.
	userUID                types.UID
	resource, userResource schema.GroupVersionResource
}

// UserKind is the kind of the object that User names.
func (i Item) UserKind() string {
	if i.resource == volumes {
		return "PersistentVolumeClaim"
	}
	return "VolumeSnapshot"
}

// Find returns all that is left of the node, by kind and name. The error is
// ErrNodeExists if the node has not been deleted.
func Find(ctx context.Context, c dynamic.Interface, node string) ([]Item, error) {
	switch _, err := c.Resource(nodes).Get(ctx, node, metav1.GetOptions{}); {
	case err == nil:
		return nil, fmt.Errorf("node %s: %w; if it will never come back: kubectl delete node %s", node, ErrNodeExists, node)
	case !apierrors.IsNotFound(err):
		return nil, err
	}
	var items []Item
	all, err := c.Resource(volumes).List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, err
	}
	for _, pv := range all.Items {
		if volumeOf(&pv, node) {
			items = append(items, newItem(&pv, volumes, "claimRef", claims))
		}
	}
	all, err = c.Resource(contents).List(ctx, metav1.ListOptions{LabelSelector: managedBy + "=" + node})
	if err != nil && !apierrors.IsNotFound(err) { // there may be no snapshots in the cluster
		return nil, err
	}
	if err == nil {
		for _, content := range all.Items {
			if of, _, _ := unstructured.NestedString(content.Object, "spec", "driver"); of == driver.Name {
				items = append(items, newItem(&content, contents, "volumeSnapshotRef", snapshots))
			}
		}
	}
	for i := range items {
		if err := items[i].checkUser(ctx, c); err != nil {
			return nil, err
		}
	}
	slices.SortFunc(items, func(a, b Item) int { return strings.Compare(a.Kind+a.Name, b.Kind+b.Name) })
	return items, nil
}

// volumeOf tells whether a PersistentVolume is of this driver and can be used on
// that node alone.
func volumeOf(pv *unstructured.Unstructured, node string) bool {
	if of, _, _ := unstructured.NestedString(pv.Object, "spec", "csi", "driver"); of != driver.Name {
		return false
	}
	terms, _, _ := unstructured.NestedSlice(pv.Object, "spec", "nodeAffinity", "required", "nodeSelectorTerms")
	for _, t := range terms {
		term, _ := t.(map[string]any)
		expressions, _, _ := unstructured.NestedSlice(term, "matchExpressions")
		for _, e := range expressions {
			expression, _ := e.(map[string]any)
			values, _, _ := unstructured.NestedStringSlice(expression, "values")
			if expression["key"] == driver.TopologyKey && len(values) == 1 && values[0] == node {
				return true
			}
		}
	}
	return false
}

// newItem is the object, and as its user what a field of its specification refers to.
func newItem(o *unstructured.Unstructured, resource schema.GroupVersionResource, field string, userResource schema.GroupVersionResource) Item {
	text := func(name string) string {
		s, _, _ := unstructured.NestedString(o.Object, "spec", field, name)
		return s
	}
	i := Item{Kind: "PersistentVolume", Name: o.GetName(), resource: resource, userResource: userResource}
	if resource == contents {
		i.Kind = "VolumeSnapshotContent"
	}
	if name := text("name"); name != "" {
		i.User, i.userUID = text("namespace")+"/"+name, types.UID(text("uid"))
	}
	return i
}

// checkUser forgets the user if it does not exist any more, even if there is another of
// its name, or is being deleted: a VolumeSnapshot waits for its content, then.
func (i *Item) checkUser(ctx context.Context, c dynamic.Interface) error {
	if i.User == "" {
		return nil
	}
	namespace, name, _ := strings.Cut(i.User, "/")
	user, err := c.Resource(i.userResource).Namespace(namespace).Get(ctx, name, metav1.GetOptions{})
	switch {
	case apierrors.IsNotFound(err):
		i.User = ""
	case err != nil:
		return err
	case user.GetDeletionTimestamp() != nil, i.userUID != "" && i.userUID != user.GetUID():
		i.User = ""
	default:
		i.userUID = user.GetUID()
	}
	return nil
}

// Remove deletes the object, and takes away the finalizer that nobody would; with
// it the object that refers to it, which may have to wait for pods.
func (i Item) Remove(ctx context.Context, c dynamic.Interface) error {
	if i.User != "" {
		namespace, name, _ := strings.Cut(i.User, "/")
		err := c.Resource(i.userResource).Namespace(namespace).Delete(ctx, name, metav1.DeleteOptions{Preconditions: &metav1.Preconditions{UID: &i.userUID}})
		if err != nil && !apierrors.IsNotFound(err) && !apierrors.IsConflict(err) { // a conflict: it is gone, and another has its name
			return fmt.Errorf("%s %s: %w", i.UserKind(), i.User, err)
		}
	}
	err := c.Resource(i.resource).Delete(ctx, i.Name, metav1.DeleteOptions{})
	if err == nil {
		err = retry.RetryOnConflict(retry.DefaultRetry, func() error { return i.release(ctx, c) })
	}
	if err != nil && !apierrors.IsNotFound(err) {
		return fmt.Errorf("%s %s: %w", i.Kind, i.Name, err)
	}
	return nil
}

// release takes the finalizer away.
func (i Item) release(ctx context.Context, c dynamic.Interface) error {
	o, err := c.Resource(i.resource).Get(ctx, i.Name, metav1.GetOptions{})
	if err != nil {
		return err
	}
	all := o.GetFinalizers()
	rest := slices.DeleteFunc(slices.Clone(all), func(f string) bool { return f == finalizers[i.resource] })
	if len(rest) == len(all) {
		return nil
	}
	// The resource version makes it fail if somebody else has changed the list.
	patch, err := json.Marshal(map[string]any{"metadata": map[string]any{"finalizers": rest, "resourceVersion": o.GetResourceVersion()}})
	if err != nil {
		return err
	}
	_, err = c.Resource(i.resource).Patch(ctx, i.Name, types.MergePatchType, patch, metav1.PatchOptions{})
	return err
}
