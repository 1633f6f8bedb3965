package kube

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/record"
	"k8s.io/klog/v2"
)

const (
	// period is how often the volumes are looked at.
	period = time.Second
	// quiet is how long progress alone is not written again.
	quiet = 5 * time.Second
	// retryMost is the longest wait after a failure; the first is period.
	retryMost = time.Minute
	// recent is for how long a merge that is over still gets an object.
	recent = 10 * time.Minute
)

// Volumes are the volumes of the node. The methods do not wait for anybody's I/O but
// their own.
type Volumes interface {
	List() []Volume
	// SetPaused pauses or resumes a merge, SetRate limits it to MiB/s (0: the node's
	// default), both durably.
	SetPaused(id string, paused bool) error
	SetRate(id string, mib int) error
}

// Reporter keeps the objects of a node in step with its volumes. All its work is
// done by Run's goroutine; what it cannot bring to the API it tries again, with what
// is true by then.
type Reporter struct {
	client  dynamic.Interface
	node    string
	volumes Volumes
	now     func() time.Time // time.Now but in tests

	store    cache.Store // of the node's VolumeMerges
	synced   func() bool
	recorder record.EventRecorder
	down     atomic.Bool // the API could not be used the last time

	begun   bool
	reports map[string]*report // by volume
	wait    backoff            // of everything
}

// report is what is known of the report about one volume.
type report struct {
	told    told
	claim   *corev1.ObjectReference // nil: not found yet
	uid     types.UID               // of the object that status was written to
	status  Status                  // last written
	written time.Time
	// made is the generation of the object whose spec was made here: that one is not to
	// be obeyed.
	made int64
	wait backoff
}

// backoff is the wait after failures.
type backoff struct {
	step time.Duration
	till time.Time
}

func (b *backoff) failed(now time.Time) {
	b.step = min(max(2*b.step, period), retryMost)
	b.till = now.Add(b.step)
}

func newReporter(client dynamic.Interface, node string, v Volumes) *Reporter {
	return &Reporter{client: client, node: node, volumes: v, now: time.Now, reports: map[string]*report{}}
}

// Run reports until ctx ends.
func (r *Reporter) Run(ctx context.Context) {
	r.start(ctx)
	t := time.NewTicker(period)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
			r.look(ctx)
		}
	}
}

// look looks at everything once.
func (r *Reporter) look(ctx context.Context) {
	if !r.synced() || r.now().Before(r.wait.till) {
		return
	}
	if !r.begun {
		r.begun = true
		r.reached()
	}
	if err := r.report(ctx); err != nil {
		if ctx.Err() == nil {
			r.unreachable(err)
			r.wait.failed(r.now())
		}
		return
	}
	r.wait = backoff{}
}

// report reports about all volumes. An error means that the API cannot be used at
// all; others are a matter of the volume.
func (r *Reporter) report(ctx context.Context) error {
	all := r.volumes.List()
	var broken error // of the last volume, if that is how it was with all
	succeeded := false
	alive, ids := map[string]bool{}, map[string]bool{}
	for i := range all {
		v := &all[i]
		id := v.Status.ID
		ids[id], alive[id], alive[v.name()] = true, true, true
		if v.Status.Claim.PVC == "" {
			continue
		}
		p := r.reports[id]
		if p == nil {
			p = &report{}
			r.reports[id] = p
		}
		if r.now().Before(p.wait.till) {
			continue
		}
		err := r.one(ctx, v, p)
		switch {
		case err == nil:
			succeeded = true
			p.wait = backoff{}
		case own(err):
			if apierrors.IsInternalError(err) {
				broken = err
			} else {
				succeeded = true
			}
			p.wait.failed(r.now())
			klog.V(2).InfoS("Report about a volume has to wait", "volume", id, "why", err)
		default:
			return err
		}
	}
	if broken != nil && !succeeded {
		return broken
	}
	for id := range r.reports {
		if !ids[id] {
			delete(r.reports, id)
		}
	}
	return r.sweep(ctx, alive)
}

// errLater says that a volume cannot be reported about yet.
var errLater = errors.New("not yet")

// own tells whether an error has to do with the one object alone. What is forbidden is
// that in the one namespace, for it ends or has a quota: without the role there would
// be no watch. What is refused otherwise, or is an internal error, may come from a webhook
// for the one namespace.
func own(err error) bool {
	if errors.Is(err, errLater) {
		return true
	}
	var answer apierrors.APIStatus
	return errors.As(err, &answer) && !apierrors.IsUnauthorized(err) && !apierrors.IsTooManyRequests(err) && !apierrors.IsServiceUnavailable(err) &&
		!apierrors.IsTimeout(err) && !apierrors.IsServerTimeout(err)
}

// one reports about one volume.
func (r *Reporter) one(ctx context.Context, v *Volume, p *report) error {
	m, err := r.object(v)
	if err != nil {
		return err
	}
	if m != nil && p.uid != m.UID { // an earlier process made it
		p.uid, p.status, p.claim, p.made = m.UID, m.Status, m.owner(), 0
		p.told.remember(&m.Status, r.now())
	}
	wanted := m != nil || v.merging() || v.merged() && r.now().Sub(v.Record.MergedAt) < recent
	next, news := p.told.next(v, wanted, r.now())
	if !wanted && len(news) == 0 {
		p.told = next
		return nil
	}
	if m == nil && p.uid != "" { // it is gone, maybe together with its claim
		p.claim, p.uid, p.status, p.made = nil, "", Status{}, 0
	}
	if p.claim == nil {
		if p.claim, err = r.findClaim(ctx, v); err != nil {
			return err
		}
	}
	if wanted {
		if m == nil {
			if m, err = r.create(ctx, v, p.claim); err != nil {
				return err
			}
			p.uid = m.UID
		}
		if err := r.update(ctx, v, p, m, &next); err != nil {
			return err
		}
	}
	// After the status has it: what is told twice is worse than what is not told.
	p.told = next
	for _, e := range news {
		r.recorder.Event(p.claim, e.kind, e.reason, e.message)
	}
	return nil
}

// object is the volume's VolumeMerge as the API has it; nil: there is none.
func (r *Reporter) object(v *Volume) (*VolumeMerge, error) {
	o, found, err := r.store.GetByKey(v.Status.Claim.Namespace + "/" + v.name())
	if err != nil || !found {
		return nil, err
	}
	return fromUnstructured(o.(*unstructured.Unstructured))
}

// findClaim returns the claim that the volume is bound to.
func (r *Reporter) findClaim(ctx context.Context, v *Volume) (*corev1.ObjectReference, error) {
	c := v.Status.Claim
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	o, err := r.client.Resource(claims).Namespace(c.Namespace).Get(ctx, c.PVC, metav1.GetOptions{})
	if err != nil {
		return nil, err
	}
	r.reached()
	if bound, _, err := unstructured.NestedString(o.Object, "spec", "volumeName"); err != nil || bound != v.name() {
		return nil, fmt.Errorf("%w: claim %s/%s is bound to %q", errLater, c.Namespace, c.PVC, bound)
	}
	if o.GetDeletionTimestamp() != nil {
		return nil, fmt.Errorf("%w: claim %s/%s is being deleted", errLater, c.Namespace, c.PVC)
	}
	return &corev1.ObjectReference{APIVersion: "v1", Kind: claimKind, Namespace: c.Namespace, Name: c.PVC, UID: o.GetUID()}, nil
}

// create makes the volume's VolumeMerge, with what is in force as its spec.
func (r *Reporter) create(ctx context.Context, v *Volume, claim *corev1.ObjectReference) (*VolumeMerge, error) {
	m := &VolumeMerge{
		TypeMeta: metav1.TypeMeta{APIVersion: group + "/" + version, Kind: kind},
		ObjectMeta: metav1.ObjectMeta{
			Name: v.name(), Namespace: claim.Namespace, Labels: map[string]string{nodeLabel: labelOf(r.node)},
			OwnerReferences: []metav1.OwnerReference{{APIVersion: claim.APIVersion, Kind: claim.Kind, Name: claim.Name, UID: claim.UID}},
		},
		Spec: Spec{Paused: v.Record.Paused, RateMiBPerSecond: v.Record.Rate},
	}
	u, err := toUnstructured(m)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	if u, err = r.client.Resource(merges).Namespace(m.Namespace).Create(ctx, u, metav1.CreateOptions{}); err != nil {
		return nil, err
	}
	r.reached()
	return fromUnstructured(u)
}

// update has the volume obey the spec, or the spec follow the volume, and writes the
// status if that is worth a call.
func (r *Reporter) update(ctx context.Context, v *Volume, p *report, m *VolumeMerge, t *told) error {
	s := p.status
	s.ObservedGeneration = max(s.ObservedGeneration, m.Status.ObservedGeneration, p.made)
	if v.Record != nil {
		have := Spec{Paused: v.Record.Paused, RateMiBPerSecond: v.Record.Rate}
		switch {
		case m.Generation > s.ObservedGeneration:
			if err := r.obey(v, have, m.Spec); err != nil {
				return fmt.Errorf("%w: %w", errLater, err)
			}
			s.ObservedGeneration = m.Generation
		case have != m.Spec:
			made, err := r.follow(ctx, m, have)
			if err == nil {
				p.made = made
			}
			return err
		}
	}
	s = statusOf(v, t, r.node, s, r.now())
	switch {
	case same(s, p.status):
		return nil
	case same(s.steady(), p.status.steady()) && r.now().Sub(p.written) < quiet:
		return nil
	}
	if _, err := r.patch(ctx, m, "status", []operation{{"test", "/metadata/uid", m.UID}, {"add", "/status", s}}); err != nil {
		return err
	}
	p.status, p.written = s, r.now()
	return nil
}

// obey has the volume do what the spec says.
func (r *Reporter) obey(v *Volume, have, want Spec) error {
	id := v.Status.ID
	if have.Paused != want.Paused {
		if err := r.volumes.SetPaused(id, want.Paused); err != nil {
			return err
		}
	}
	if have.RateMiBPerSecond != want.RateMiBPerSecond {
		if err := r.volumes.SetRate(id, want.RateMiBPerSecond); err != nil {
			return err
		}
	}
	if have != want {
		klog.InfoS("Changed by VolumeMerge", "volume", id, "paused", want.Paused, "rateMiBPerSecond", want.RateMiBPerSecond)
	}
	return nil
}

// follow makes the spec what is in force, unless it has been changed meanwhile, and
// returns the generation that the object has then.
func (r *Reporter) follow(ctx context.Context, m *VolumeMerge, have Spec) (generation int64, err error) {
	return r.patch(ctx, m, "", []operation{{"test", "/metadata/generation", m.Generation}, {"add", "/spec", have}})
}

// operation is one of a JSON patch (RFC 6902).
type operation struct {
	Op    string `json:"op"`
	Path  string `json:"path"`
	Value any    `json:"value"`
}

func (r *Reporter) patch(ctx context.Context, m *VolumeMerge, subresource string, ops []operation) (generation int64, err error) {
	b, err := json.Marshal(ops)
	if err != nil {
		return 0, err
	}
	var sub []string
	if subresource != "" {
		sub = []string{subresource}
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	o, err := r.client.Resource(merges).Namespace(m.Namespace).Patch(ctx, m.Name, types.JSONPatchType, b, metav1.PatchOptions{}, sub...)
	if err != nil {
		return 0, err
	}
	r.reached()
	return o.GetGeneration(), nil
}

// sweep deletes the node's objects whose volumes are gone. (Most go with their
// claim.)
func (r *Reporter) sweep(ctx context.Context, alive map[string]bool) error {
	for _, o := range r.store.List() {
		u := o.(*unstructured.Unstructured)
		if alive[u.GetName()] {
			continue
		}
		ctx, cancel := context.WithTimeout(ctx, callTimeout)
		uid := u.GetUID()
		err := r.client.Resource(merges).Namespace(u.GetNamespace()).
			Delete(ctx, u.GetName(), metav1.DeleteOptions{Preconditions: &metav1.Preconditions{UID: &uid}})
		cancel()
		if err != nil && !own(err) {
			return err
		}
		klog.V(2).InfoS("Object of a volume that is gone is deleted", "volumeMerge", klog.KObj(u))
	}
	return nil
}

// same compares what the API would have.
func same(a, b Status) bool {
	x, errX := json.Marshal(a)
	y, errY := json.Marshal(b)
	return errX == nil && errY == nil && string(x) == string(y)
}
