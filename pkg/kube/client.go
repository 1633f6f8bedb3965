package kube

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/record"
	"k8s.io/klog/v2"
)

// Mode is whether the API is used.
type Mode string

// The modes. Auto uses the API if the process runs in a pod that has access to it.
const (
	Off  Mode = "off"
	Auto Mode = "auto"
	On   Mode = "on"
)

// ErrMode says that there is no such mode, or that it is not possible here.
var ErrMode = errors.New("use of the Kubernetes API")

const (
	// callTimeout bounds every call but watches.
	callTimeout = 5 * time.Second
	// callsPerSecond and callsAtOnce bound what a node asks of the API.
	callsPerSecond, callsAtOnce = 10, 20

	component = "csi.snapmerge.io" // of events
)

// Open prepares reports about the node's volumes; nil if the API is not to be used.
// Nothing is sent before Run.
func Open(mode Mode, node, version string, v Volumes) (*Reporter, error) {
	switch mode {
	case Off:
		klog.InfoS("The Kubernetes API is not used: only CSI tells of merges", "why", "switched off")
		return nil, nil
	case Auto, On:
	default:
		return nil, fmt.Errorf("%w: %q, want %s, %s or %s", ErrMode, mode, Off, Auto, On)
	}
	cfg, err := rest.InClusterConfig()
	if mode == Auto && err != nil {
		klog.InfoS("The Kubernetes API is not used: only CSI tells of merges", "why", err)
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrMode, err)
	}
	cfg.UserAgent = "snapmerge/" + version
	cfg.QPS, cfg.Burst = callsPerSecond, callsAtOnce
	client, err := dynamic.NewForConfig(cfg)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrMode, err)
	}
	return newReporter(client, node, v), nil
}

// start starts what the reporter needs beside itself: the watch of its objects, and
// the recorder of events.
func (r *Reporter) start(ctx context.Context) {
	api := r.client.Resource(merges)
	mine := func(o *metav1.ListOptions) { o.LabelSelector = nodeLabel + "=" + labelOf(r.node) }
	lw := &cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
			mine(&o)
			l, err := api.List(ctx, o)
			return l, r.noted(ctx, err)
		},
		WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
			mine(&o)
			w, err := api.Watch(ctx, o)
			return w, r.noted(ctx, err)
		},
	}
	informer := cache.NewSharedInformer(cache.ToListWatcherWithWatchListSemantics(lw, r.client), &unstructured.Unstructured{}, 0)
	// Fails only once the informer runs.
	_ = informer.SetWatchErrorHandlerWithContext(func(_ context.Context, _ *cache.Reflector, err error) {
		klog.V(4).InfoS("Watch of the Kubernetes API ended", "why", err) // it begins anew
	})
	r.store, r.synced = informer.GetStore(), informer.HasSynced
	go informer.RunWithContext(ctx)

	broadcaster := record.NewBroadcaster(record.WithContext(ctx))
	broadcaster.StartRecordingToSink(sink{ctx, r.client})
	r.recorder = broadcaster.NewRecorder(runtime.NewScheme(), corev1.EventSource{Component: component, Host: r.node})
	context.AfterFunc(ctx, broadcaster.Shutdown)
}

// noted returns err. As long as it is not known what there is at the API, nothing can
// be reported: then the watch is what finds out that the API cannot be used.
func (r *Reporter) noted(ctx context.Context, err error) error {
	if err != nil && ctx.Err() == nil && !r.synced() {
		r.unreachable(err)
	}
	return err
}

// unreachable and reached log the changes from one to the other, and nothing else.
func (r *Reporter) unreachable(err error) {
	if !r.down.Swap(true) {
		klog.ErrorS(err, "The Kubernetes API cannot be used: until it can only CSI tells of merges")
	}
}

func (r *Reporter) reached() {
	if r.down.Swap(false) {
		klog.InfoS("The Kubernetes API can be used again")
	}
}

// labelOf is a node's name as a label has it: of at most 63 bytes.
func labelOf(node string) string {
	if len(node) <= 63 {
		return node
	}
	sum := sha256.Sum256([]byte(node))
	return hex.EncodeToString(sum[:16])
}
