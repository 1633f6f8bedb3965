package kube

import (
	"context"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/dynamic"
)

// sink is where the event recorder writes to: the dynamic client, which spares the
// program all the other kinds of Kubernetes.
type sink struct {
	ctx    context.Context
	client dynamic.Interface
}

func (s sink) Create(e *corev1.Event) (*corev1.Event, error) {
	o, err := runtime.DefaultUnstructuredConverter.ToUnstructured(e)
	if err != nil {
		return nil, err
	}
	u := &unstructured.Unstructured{Object: o}
	u.SetAPIVersion("v1")
	u.SetKind("Event")
	ctx, cancel := context.WithTimeout(s.ctx, callTimeout)
	defer cancel()
	return eventOf(s.client.Resource(events).Namespace(e.Namespace).Create(ctx, u, metav1.CreateOptions{}))
}

// Update is not what the recorder calls.
func (s sink) Update(e *corev1.Event) (*corev1.Event, error) { return e, nil }

func (s sink) Patch(e *corev1.Event, patch []byte) (*corev1.Event, error) {
	ctx, cancel := context.WithTimeout(s.ctx, callTimeout)
	defer cancel()
	return eventOf(s.client.Resource(events).Namespace(e.Namespace).
		Patch(ctx, e.Name, types.StrategicMergePatchType, patch, metav1.PatchOptions{}))
}

func eventOf(u *unstructured.Unstructured, err error) (*corev1.Event, error) {
	if err != nil {
		return nil, err
	}
	e := &corev1.Event{}
	return e, runtime.DefaultUnstructuredConverter.FromUnstructured(u.Object, e)
}
