package e2e

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// volumeMerge is an object of that kind, as far as it matters here.
type volumeMerge struct {
	Metadata struct {
		Generation      int64
		OwnerReferences []struct{ Kind, Name string }
	}
	Spec struct {
		Paused           bool
		RateMiBPerSecond int
	}
	Status struct {
		ObservedGeneration          int64
		PersistentVolumeClaim, Node string
		State, Progress             string
		BytesDone, BytesTotal       int64
		StartTime, CompletionTime   string
		Conditions                  []struct{ Type, Status, Reason string }
	}
}

func (m volumeMerge) condition(name string) string {
	for _, c := range m.Status.Conditions {
		if c.Type == name {
			return c.Status + "/" + c.Reason
		}
	}
	return ""
}

// merge is the object of a volume.
func (e *env) merge(volume string) volumeMerge {
	e.Helper()
	var m volumeMerge
	e.check(json.Unmarshal([]byte(e.kubectl("get", "volumemerge", volume, "--output", "json")), &m))
	return m
}

// untilMerge waits until the object of a volume is as wanted.
func (e *env) untilMerge(limit time.Duration, volume, what string, probe func(m volumeMerge) bool) volumeMerge {
	e.Helper()
	var m volumeMerge
	e.until(limit, what, func() (bool, string) {
		out, err := e.c.Output(e.Context(), "kubectl", "get", "volumemerge", volume, "--output", "json")
		if err != nil {
			return false, err.Error()
		}
		m = volumeMerge{}
		e.check(json.Unmarshal([]byte(out), &m))
		return probe(m), fmt.Sprintf("%+v", m)
	})
	return m
}

// order changes the spec of a volume's object.
func (e *env) order(volume, spec string) {
	e.Helper()
	e.kubectl("patch", "volumemerge", volume, "--type=merge", "--patch", `{"spec": `+spec+`}`)
}

// inForce are the orders that the volume's record has.
func (e *env) inForce(volume string) (paused bool, rate int) {
	e.Helper()
	b, err := os.ReadFile(filepath.Join(e.c.StateDir(), "volumes", volume, "volume.json"))
	e.check(err)
	var r struct {
		Paused           bool
		RateMiBPerSecond int
	}
	e.check(json.Unmarshal(b, &r))
	return r.Paused, r.RateMiBPerSecond
}

// watchMerge looks at the object of the volume of claim restored while it is merged,
// and gives orders by it. At the end the merge is slow.
func (e *env) watchMerge(volume string) {
	e.Helper()
	m := e.untilMerge(time.Minute, volume, "object of the merge", func(m volumeMerge) bool { return m.Status.State == "Merging" && m.Status.BytesDone > 0 })
	if o := m.Metadata.OwnerReferences; len(o) != 1 || o[0].Kind != "PersistentVolumeClaim" || o[0].Name != "restored" {
		e.Errorf("owners %+v", o)
	}
	for range 2 { // it climbs
		before := m.Status.BytesDone
		m = e.untilMerge(time.Minute, volume, "progress", func(m volumeMerge) bool { return m.Status.BytesDone > before })
	}
	table := e.kubectl("get", "volumemerges")
	e.Logf("\n%s", table)
	header, _, _ := strings.Cut(table, "\n")
	if have := strings.Join(strings.Fields(header), " "); have != "NAME PVC NODE STATE PROGRESS RATE ETA AGE" {
		e.Errorf("columns %s", have)
	}

	e.order(volume, `{"paused": true}`)
	m = e.untilMerge(time.Minute, volume, "paused by the object", func(m volumeMerge) bool {
		return m.Status.State == "Paused" && m.Status.ObservedGeneration == m.Metadata.Generation
	})
	if paused, _ := e.inForce(volume); !paused {
		e.Error("the volume is not paused")
	}
	if s, err := e.status(volume); err != nil || s.State != "paused" {
		e.Errorf("the node says %+v, %v", s, err)
	}
	e.order(volume, `{"paused": false, "rateMiBPerSecond": 2}`)
	at := m.Status.BytesDone
	e.untilMerge(time.Minute, volume, "going on by the object", func(m volumeMerge) bool {
		return m.Status.State == "Merging" && m.Status.BytesDone > at && m.Status.ObservedGeneration == m.Metadata.Generation
	})
	if paused, rate := e.inForce(volume); paused || rate != 2 {
		e.Errorf("in force are paused %v, rate %d", paused, rate)
	}
	if _, err := e.c.Output(e.Context(), "kubectl", "patch", "volumemerge", volume, "--type=merge", "--patch", `{"spec": {"rateMiBPerSecond": -1}}`); err == nil {
		e.Error("a negative rate is taken")
	}
	// What is said on the node is seen in the object.
	e.ours("exec", "daemonset/snapmerge-node", "--container", "node", "--", "snapmerge", "rate", volume, "1")
	e.untilMerge(time.Minute, volume, "order of the node in the object", func(m volumeMerge) bool { return m.Spec.RateMiBPerSecond == 1 })
}

// finishMerge has the merge go as fast as it can, to its end.
func (e *env) finishMerge(volume string) {
	e.Helper()
	e.order(volume, `{"rateMiBPerSecond": 0}`)
	m := e.untilMerge(3*time.Minute, volume, "merged", func(m volumeMerge) bool { return m.Status.State == "Merged" })
	for _, c := range []struct{ name, want string }{
		{"Staged", "True/RestoreStaged"}, {"Merged", "True/MergeCompleted"}, {"Healthy", "True/Healthy"},
	} {
		if have := m.condition(c.name); have != c.want {
			e.Errorf("condition %s is %s", c.name, have)
		}
	}
	if s := m.Status; s.Progress != "100%" || s.BytesDone != s.BytesTotal || s.StartTime == "" || s.CompletionTime < s.StartTime || s.PersistentVolumeClaim != "restored" {
		e.Errorf("status %+v", s)
	}
}

// events are the messages of the driver's events of a claim by their reasons, one for
// each time.
func (e *env) events(claim string) map[string][]string {
	e.Helper()
	var l struct {
		Items []struct {
			Reason, Message string
			Count           int
			Source          struct{ Component string }
		}
	}
	e.check(json.Unmarshal([]byte(e.kubectl("get", "events", "--output", "json", "--field-selector",
		"involvedObject.kind=PersistentVolumeClaim,involvedObject.name="+claim)), &l))
	all := map[string][]string{}
	for _, i := range l.Items {
		for range i.Count {
			if i.Source.Component == "csi.snapmerge.io" {
				all[i.Reason] = append(all[i.Reason], i.Message)
			}
		}
	}
	return all
}

// checkEvents wants each of the reasons to have been told once, and no other.
func (e *env) checkEvents(claim string, reasons ...string) {
	e.Helper()
	var all map[string][]string
	e.until(time.Minute, fmt.Sprint("events of ", claim), func() (bool, string) {
		all = e.events(claim)
		return len(all) >= len(reasons), fmt.Sprint(all)
	})
	for _, reason := range reasons {
		if len(all[reason]) != 1 {
			e.Errorf("claim %s: events %s: %q", claim, reason, all[reason])
		}
	}
	if len(all) > len(reasons) {
		e.Errorf("claim %s: more events than %v", claim, reasons)
	}
	e.Logf("events of claim %s: %q", claim, all)
}

// noMerge waits until the object of a volume is gone.
func (e *env) noMerge(volume string) {
	e.Helper()
	e.until(time.Minute, "object of the merge gone", func() (bool, string) {
		left := e.kubectl("get", "volumemerge", volume, "--ignore-not-found", "--output", "name")
		return left == "", left
	})
}
