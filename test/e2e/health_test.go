package e2e

import (
	"fmt"
	"strings"
	"time"

	"github.com/snapmerge/snapmerge/test/e2e/internal/cluster"
)

// health is how the kubelet tells the health of the volume of pod original-0.
type health interface {
	healthy(*env)
	// down: the volume's device is gone.
	down(*env)
}

// condition is that of kubelets up to 1.36, which read VolumeCondition: a metric,
// and an event.
type condition struct{}

func (condition) metric(e *env, value int) {
	e.Helper()
	want := fmt.Sprintf(`kubelet_volume_stats_health_status_abnormal{namespace="default",persistentvolumeclaim="data-original-0"} %d`, value)
	e.until(2*time.Minute, fmt.Sprintf("metric of the condition is %d", value), func() (bool, string) {
		out := e.kubectl("get", "--raw", "/api/v1/nodes/"+cluster.Node+"/proxy/metrics")
		_, found, _ := strings.Cut(out, "\nkubelet_volume_stats_health_status_abnormal{")
		return strings.Contains(out, want), found[:min(len(found), 300)]
	})
}

func (c condition) healthy(e *env) {
	e.Helper()
	c.metric(e, 0)
}

func (c condition) down(e *env) {
	e.Helper()
	c.metric(e, 1)
	e.until(time.Minute, "event of the condition", func() (bool, string) {
		out := e.kubectl("get", "events", "--field-selector", "involvedObject.name=original-0,reason=VolumeConditionAbnormal", "--output", "jsonpath={.items[*].message}")
		return out != "", out
	})
}

// volumeHealth is that of kubelets from 1.37 on, which call NodeGetVolumeHealth: a
// field of the pod's status, with what is wrong alone.
type volumeHealth struct{}

func (volumeHealth) is(e *env, want string) {
	e.Helper()
	e.until(2*time.Minute, fmt.Sprintf("volume health of the pod is %q", want), func() (bool, string) {
		out := e.kubectl("get", "pod", "original-0", "--output",
			`jsonpath={range .status.volumeHealth[*].healthConditions[*]}{.status}/{.reason}{end}`)
		return out == want, out
	})
}

func (h volumeHealth) healthy(e *env) {
	e.Helper()
	h.is(e, "")
}

func (h volumeHealth) down(e *env) {
	e.Helper()
	h.is(e, "Inaccessible/TransportDown")
}

// loseDevices is what must not happen: keeper and node plugin of a node are gone
// together. Then the kubelet tells, and once the pod is replaced its volume is there
// again with all that it had. (There must be no other: the loop device of a volume
// that is not staged again stays.)
func (e *env) loseDevices(h health) {
	e.ours("delete", "pods", "--selector", "app.kubernetes.io/component in (keeper,node)", "--grace-period=0", "--force")
	h.down(e)
	e.ours("rollout", "status", "--timeout=2m", "daemonset/snapmerge-node")
	e.kubectl("delete", "--timeout=1m", "pod", "original-0")
	e.kubectl("rollout", "status", "--timeout=2m", "statefulset/original")
	e.kubectl("exec", "original-0", "--", "sh", "-ec", "cd /data; sha256sum -c -s sums")
	h.healthy(e)
	e.Log("the volume is there again")
}
