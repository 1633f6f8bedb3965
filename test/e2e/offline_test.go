package e2e

import (
	"encoding/json"
	"fmt"
	"strings"
	"time"
)

// offline is a pod, and its claim, of a StorageClass with snapshots: offline.
const offline = "offline"

// startOffline starts the pod, if the machine can take a volume to its base and does
// not do it by device-mapper anyway. It tells whether it has.
func (e *env) startOffline() bool {
	e.Helper()
	var probe struct {
		Transports map[string]struct {
			Passthrough struct {
				OK  bool
				Why string
			}
		}
		HandOver struct{ OK bool } `json:"hand_over"`
	}
	out := e.ours("exec", "daemonset/snapmerge-node", "--container", "node", "--", "snapmerge", "probe", "--json")
	e.check(json.Unmarshal([]byte(out), &probe))
	if p := probe.Transports["fuse"].Passthrough; !p.OK || probe.HandOver.OK {
		e.Logf("snapshots: offline is not tested: passthrough %+v, hand-over %+v", p, probe.HandOver)
		return false
	}
	e.apply("offline.yaml")
	return true
}

// checkOffline looks at the pod's volume after the node plugin was replaced: it goes
// past it, and takes no snapshot while the pod uses it.
func (e *env) checkOffline() {
	e.Helper()
	rounds := e.rounds(offline)
	e.until(time.Minute, "pod of class offline goes on", func() (bool, string) {
		now := e.rounds(offline)
		return now > rounds, fmt.Sprint(now, " rounds")
	})
	e.checkReader(offline)
	if s, err := e.status(e.volume(offline)); err != nil || s.State != "native" {
		e.Errorf("volume of class offline: %+v, %v", s, err)
	}
	e.apply("offline-snapshot.yaml")
	e.until(time.Minute, "snapshot refused", func() (bool, string) {
		out := e.kubectl("get", "volumesnapshot", offline, "--output", "jsonpath={.status.readyToUse} {.status.error.message}")
		return strings.HasPrefix(out, "false ") && strings.Contains(out, "FailedPrecondition") && strings.Contains(out, "snapshots: offline"), out
	})
}

// endOffline ends the pod, so that the snapshot is made, and restores it.
func (e *env) endOffline() {
	e.Helper()
	e.checkReader(offline)
	e.kubectl("delete", "--timeout=1m", "pod/"+offline)
	e.kubectl("wait", "--for=jsonpath={.status.readyToUse}=true", "--timeout=2m", "volumesnapshot/"+offline)
	e.apply("offline-restored.yaml")
	e.kubectl("wait", "--for=jsonpath={.status.phase}=Succeeded", "--timeout=1m", "pod/offline-restored")
	e.volume("offline-restored")
	e.kubectl("delete", "--timeout=1m", "pod/offline-restored", "persistentvolumeclaim/offline-restored", "persistentvolumeclaim/"+offline, "volumesnapshot/"+offline)
}
