package e2e

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/snapmerge/snapmerge/test/e2e/internal/cluster"
)

// user is a pod and the claim that it uses.
type user struct{ pod, claim string }

// health is how the kubelet tells the health of the volume of a pod.
type health interface {
	healthy(*env, user)
	sick(e *env, u user, reason string)
}

// condition is that of kubelets up to 1.36, which read VolumeCondition: a metric,
// and an event.
type condition struct{}

func (condition) metric(e *env, u user, value int) {
	e.Helper()
	const name = "\nkubelet_volume_stats_health_status_abnormal"
	want := fmt.Sprintf(`%s{namespace="default",persistentvolumeclaim="%s"} %d`, name, u.claim, value)
	e.until(2*time.Minute, fmt.Sprintf("metric of the condition of %s is %d", u.claim, value), func() (bool, string) {
		out := e.kubectl("get", "--raw", "/api/v1/nodes/"+cluster.Node+"/proxy/metrics")
		_, found, _ := strings.Cut(out, name)
		return strings.Contains(out, want), found[:min(len(found), 300)]
	})
}

func (c condition) healthy(e *env, u user) {
	e.Helper()
	c.metric(e, u, 0)
}

func (c condition) sick(e *env, u user, reason string) {
	e.Helper()
	c.metric(e, u, 1)
	e.until(time.Minute, "event of the condition "+reason, func() (bool, string) {
		out := e.kubectl("get", "events", "--field-selector", "involvedObject.name="+u.pod+",reason=VolumeConditionAbnormal", "--output", "jsonpath={.items[*].message}")
		return strings.Contains(out, reason), out
	})
}

// volumeHealth is that of kubelets from 1.37 on, which call NodeGetVolumeHealth: a
// field of the pod's status, with what is wrong alone.
type volumeHealth struct{}

func (volumeHealth) is(e *env, u user, want string) {
	e.Helper()
	e.until(2*time.Minute, fmt.Sprintf("volume health of pod %s is %q", u.pod, want), func() (bool, string) {
		out := e.kubectl("get", "pod", u.pod, "--output",
			`jsonpath={range .status.volumeHealth[*].healthConditions[*]}{.status}/{.reason}{end}`)
		return out == want, out
	})
}

func (h volumeHealth) healthy(e *env, u user) {
	e.Helper()
	h.is(e, u, "")
}

func (h volumeHealth) sick(e *env, u user, reason string) {
	e.Helper()
	status := "Degraded"
	if reason == transportDown {
		status = "Inaccessible"
	}
	h.is(e, u, status+"/"+reason)
}

// Reasons of trouble.
const (
	mergeStalled  = "MergeStalled"
	mergeFailed   = "MergeFailed"
	transportDown = "TransportDown"
)

var original = user{"original-0", "data-original-0"}

// trouble has a merge stall, for the disk is full, and then fail, for its file may
// not be written to. Both are told everywhere, and both are over when their cause is.
// The pod only reads, so it is not concerned.
func (e *env) trouble(h health) {
	e.apply("troubled.yaml")
	e.kubectl("wait", "--for=condition=Ready", "--timeout=1m", "pod/troubled")
	u := user{"troubled", "troubled"}
	volume := e.volume(u.claim)
	// The pod may be ready before it.
	e.kubectl("wait", "--for=create", "--timeout=1m", "volumemerge/"+volume)
	e.order(volume, `{"rateMiBPerSecond": 1}`)
	e.untilMerge(time.Minute, volume, "merging slowly", func(m volumeMerge) bool {
		return m.Status.State == "Merging" && m.Status.BytesDone > 0 && m.Status.ObservedGeneration == m.Metadata.Generation
	})
	base := filepath.Join(e.c.StateDir(), "volumes", volume, "base.img")
	for _, c := range []struct {
		reason, state string
		cause, cure   func() error
	}{
		{mergeStalled, "Stalled", e.fill, e.unfill},
		{mergeFailed, "Failed", func() error { return chattr("+i", base) }, func() error { return chattr("-i", base) }},
	} {
		e.check(c.cause())
		e.untilMerge(time.Minute, volume, c.state, func(m volumeMerge) bool {
			return m.Status.State == c.state && m.condition("Healthy") == "False/"+c.reason
		})
		h.sick(e, u, c.reason)
		e.untilMetric("snapmerge_volume_state", u.claim, fmt.Sprintf("state=%q", strings.ToLower(c.state)), 1)
		e.check(c.cure())
		// It tries again by itself, but after a while.
		e.order(volume, `{"paused": true}`)
		e.untilMerge(time.Minute, volume, "paused", func(m volumeMerge) bool { return m.Status.ObservedGeneration == m.Metadata.Generation })
		e.order(volume, `{"paused": false}`)
		e.untilMerge(time.Minute, volume, "not "+c.state, func(m volumeMerge) bool {
			return m.Status.State == "Merging" && m.condition("Healthy") == "True/Healthy"
		})
		h.healthy(e, u)
	}
	e.order(volume, `{"rateMiBPerSecond": 0}`)
	e.untilMerge(time.Minute, volume, "merged after all", func(m volumeMerge) bool { return m.Status.State == "Merged" })
	e.checkEvents(u.claim, "RestoreStaged", "MergeStarted", mergeStalled, mergeFailed, "MergeCompleted")
	e.kubectl("exec", "troubled", "--", "sh", "-ec", "cd /data; sha256sum -c -s sums")
	e.kubectl("delete", "--timeout=1m", "pod/troubled", "persistentvolumeclaim/troubled")
	e.noMerge(volume)
}

func chattr(flag, file string) error {
	if out, err := exec.Command("chattr", flag, file).CombinedOutput(); err != nil {
		return fmt.Errorf("chattr %s %s: %w: %s", flag, file, err, out)
	}
	return nil
}

func (e *env) ballast() string { return filepath.Join(e.c.StateDir(), "ballast") }

// fill takes all the room that there is on the node's disk for volumes.
func (e *env) fill() error {
	f, err := os.Create(e.ballast())
	if err != nil {
		return err
	}
	defer f.Close()
	off := int64(0)
	for step := int64(1 << 40); step >= 4096; {
		err := unix.Fallocate(int(f.Fd()), 0, off, step)
		switch {
		case err == nil:
			off += step
		case errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EFBIG):
			step /= 2
		default:
			return fmt.Errorf("fallocate: %w", err)
		}
	}
	return nil
}

func (e *env) unfill() error { return os.Remove(e.ballast()) }

// loseDevices is what must not happen: keeper and node plugin of a node are gone
// together. Then the kubelet tells, and once the pod is replaced its volume is there
// again with all that it had. (There must be no other: the loop device of a volume
// that is not staged again stays.)
func (e *env) loseDevices(h health) {
	e.ours("delete", "pods", "--selector", "app.kubernetes.io/component in (keeper,node)", "--grace-period=0", "--force")
	h.sick(e, original, transportDown)
	e.untilMetric("snapmerge_volume_device_down", original.claim, "", 1)
	e.ours("rollout", "status", "--timeout=2m", "daemonset/snapmerge-node")
	e.kubectl("delete", "--timeout=1m", "pod", "original-0")
	e.kubectl("rollout", "status", "--timeout=2m", "statefulset/original")
	e.kubectl("exec", "original-0", "--", "sh", "-ec", "cd /data; sha256sum -c -s sums")
	h.healthy(e, original)
	e.untilMetric("snapmerge_volume_device_down", original.claim, "", 0)
	e.Log("the volume is there again")
}
