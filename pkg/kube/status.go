package kube

import (
	"fmt"
	"math"
	"strings"
	"time"

	"github.com/dustin/go-humanize"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/snapmerge/snapmerge/pkg/volume"
)

// maxText bounds texts in objects, in bytes; the schema has it as well.
const maxText = 1024

// statusOf is the status of a volume's merge, which was told as t says.
func statusOf(v *Volume, t *told, node string, old Status, now time.Time) Status {
	s := Status{
		ObservedGeneration: old.ObservedGeneration, Claim: v.Status.Claim.PVC, Node: node,
		State: stateOf(v), Error: text(v.Status.Error), Conditions: append([]metav1.Condition(nil), old.Conditions...),
	}
	if r := v.Record; r != nil {
		s.Snapshot, s.BytesDone, s.BytesTotal = r.Source, v.Status.BytesDone, v.Status.BytesTotal
		if t.started {
			s.StartTime = &metav1.Time{Time: r.Created.Truncate(time.Second)}
		}
		if v.merged() {
			s.CompletionTime = &metav1.Time{Time: r.MergedAt.Truncate(time.Second)}
		}
	} else { // it cannot be opened
		s.Snapshot, s.BytesDone, s.BytesTotal, s.StartTime, s.CompletionTime =
			old.Snapshot, old.BytesDone, old.BytesTotal, old.StartTime, old.CompletionTime
		if old.State == stateMerged {
			s.State = stateMerged
		}
	}
	s.Progress = progress(s.BytesDone, s.BytesTotal)
	if s.State == stateMerging {
		if v.Status.RateMiB > 0 {
			s.Rate = fmt.Sprintf("%.4g MiB/s", v.Status.RateMiB)
		}
		if v.Status.ETASeconds > 0 {
			s.ETA = (time.Duration(v.Status.ETASeconds) * time.Second).String()
		}
	}
	s.setConditions(v, t, now)
	return s
}

func (s *Status) setConditions(v *Volume, t *told, now time.Time) {
	set := func(name string, is bool, reason, message string) {
		c := metav1.Condition{Type: name, Status: metav1.ConditionFalse, Reason: reason, Message: message,
			ObservedGeneration: s.ObservedGeneration, LastTransitionTime: metav1.Time{Time: now.Truncate(time.Second)}}
		if is {
			c.Status = metav1.ConditionTrue
		}
		meta.SetStatusCondition(&s.Conditions, c)
	}
	switch {
	case meta.IsStatusConditionTrue(s.Conditions, Staged):
	case t.staged && v.StagedIn > 0:
		set(Staged, true, RestoreStaged, "Staged in "+short(v.StagedIn))
	case t.staged:
		set(Staged, true, RestoreStaged, "Staged")
	default:
		set(Staged, false, "NotStaged", "Not staged yet")
	}
	switch {
	case s.State == stateMerged && v.Record != nil:
		set(Merged, true, MergeCompleted, completed(v))
	case s.State != stateMerged:
		set(Merged, false, s.State, "The snapshot's data is being copied to the volume's own base")
	}
	if reason, message := t.worst(); reason != "" {
		set(Healthy, false, reason, message)
	} else {
		set(Healthy, true, Healthy, "")
	}
}

// stateOf is the state of a volume's merge. Whatever happens to the volume later,
// what is merged is merged.
func stateOf(v *Volume) string {
	if v.merged() {
		return stateMerged
	}
	switch v.Status.State {
	case volume.Paused:
		return statePaused
	case volume.Stalled:
		return stateStalled
	case volume.Failed:
		return stateFailed
	}
	return stateMerging
}

// steady is the part of a status that is written as soon as it changes.
func (s Status) steady() Status {
	s.Progress, s.Rate, s.ETA, s.BytesDone = "", "", "", 0
	return s
}

func progress(done, total int64) string {
	if done >= total {
		return "100%"
	}
	return fmt.Sprintf("%.1f%%", math.Floor(float64(done)/float64(total)*1000)/10) // 100 is the end
}

// completed says how much was merged, and how long that took.
func completed(v *Volume) string {
	r := v.Record
	return fmt.Sprintf("Merged %s (%d bytes) in %.1f seconds", humanize.IBytes(uint64(r.Merged)), r.Merged, r.MergedAt.Sub(r.Created).Seconds())
}

// short is d with three digits.
func short(d time.Duration) string {
	unit := time.Nanosecond
	for d/unit >= 1000 {
		unit *= 10
	}
	return d.Round(unit).String()
}

// text is s as objects can have it: names of files may be any bytes.
func text(s string) string {
	s = strings.ToValidUTF8(s, "?")
	if len(s) > maxText {
		s = strings.ToValidUTF8(s[:maxText-3], "") + "..."
	}
	return s
}
