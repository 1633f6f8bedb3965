package kube

import (
	"fmt"
	"time"

	"github.com/dustin/go-humanize"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/snapmerge/snapmerge/pkg/health"
	"github.com/snapmerge/snapmerge/pkg/volume"
)

// Reasons of events, besides those of package health. They are stable.
const (
	RestoreStaged  = "RestoreStaged"
	MergeStarted   = "MergeStarted"
	MergeCompleted = "MergeCompleted"
)

// over is for how long a trouble has to be gone before it is over. What comes back
// sooner, as after a restart of the plugin, was never gone.
const over = 10 * time.Second

// Volume is a volume as the volume manager tells of it.
type Volume struct {
	Status volume.Status
	// Record is nil if the volume cannot be opened. It must not be changed.
	Record *volume.Record
	// StagedIn is how long the first staging took; 0: there was none as far as this
	// process knows.
	StagedIn time.Duration
}

// merging tells whether anything of the snapshot is still outside of the base.
func (v *Volume) merging() bool {
	if v.Record == nil {
		return false
	}
	for _, l := range v.Record.Layers {
		if l.COW != nil {
			return true
		}
	}
	return false
}

func (v *Volume) merged() bool { return v.Record != nil && !v.Record.MergedAt.IsZero() && !v.merging() }

// name is that of the persistent volume, and of the VolumeMerge.
func (v *Volume) name() string {
	if pv := v.Status.Claim.PV; pv != "" {
		return pv
	}
	return v.Status.ID
}

// told is what people know of a volume already. It is remembered in the conditions
// of the VolumeMerge, so that another process does not tell it again.
type told struct {
	staged, started, completed bool
	troubles                   []trouble // the worst first
}

type trouble struct {
	reason, message string
	seen            time.Time // last
}

// remember adds what the object says.
func (t *told) remember(s *Status, now time.Time) {
	t.staged = t.staged || meta.IsStatusConditionTrue(s.Conditions, Staged)
	t.started = t.started || s.StartTime != nil
	t.completed = t.completed || meta.IsStatusConditionTrue(s.Conditions, Merged)
	if c := meta.FindStatusCondition(s.Conditions, Healthy); c != nil && c.Status == metav1.ConditionFalse && len(t.troubles) == 0 {
		t.troubles = []trouble{{c.Reason, c.Message, now}}
	}
}

func (t *told) worst() (reason, message string) {
	if len(t.troubles) == 0 {
		return "", ""
	}
	return t.troubles[0].reason, t.troubles[0].message
}

// event is one that is to be recorded.
type event struct{ kind, reason, message string }

// next is what will have been told when the events are recorded. merge: also what
// there is to tell of a merge.
func (t told) next(v *Volume, merge bool, now time.Time) (told, []event) {
	var news []event
	normal := func(reason, format string, args ...any) {
		news = append(news, event{corev1.EventTypeNormal, reason, fmt.Sprintf(format, args...)})
	}
	if r := v.Record; r != nil && merge {
		if !t.staged && (v.StagedIn > 0 || r.Stage != nil) {
			t.staged = true
			took := ""
			if v.StagedIn > 0 {
				took = " in " + short(v.StagedIn)
			}
			normal(RestoreStaged, "The volume restored from snapshot %s was staged%s and can be used", r.Source, took)
		}
		if !t.started && (v.Status.BytesDone > 0 || v.merged()) {
			t.started = true
			normal(MergeStarted, "Merging %s of snapshot %s in the background", humanize.IBytes(uint64(v.Status.BytesTotal)), r.Source)
		}
		if !t.completed && v.merged() {
			t.completed = true
			normal(MergeCompleted, "%s", completed(v))
		}
	}
	old := t.troubles
	t.troubles = nil
	for _, h := range health.Troubles(v.Status) {
		message := text(h.Message)
		if !has(old, h.Reason) {
			news = append(news, event{corev1.EventTypeWarning, h.Reason, message})
		}
		t.troubles = append(t.troubles, trouble{h.Reason, message, now})
	}
	for _, o := range old {
		if !has(t.troubles, o.reason) && now.Sub(o.seen) < over {
			t.troubles = append(t.troubles, o)
		}
	}
	return t, news
}

func has(all []trouble, reason string) bool {
	for _, t := range all {
		if t.reason == reason {
			return true
		}
	}
	return false
}
