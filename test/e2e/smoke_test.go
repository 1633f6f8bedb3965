// Package e2e tests snapmerge in a real Kubernetes of one node, which it brings up
// and takes down itself. See docs/kubernetes.md.
package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/snapmerge/snapmerge/test/e2e/internal/cluster"
	"github.com/snapmerge/snapmerge/test/e2e/internal/rig"
)

// TestSmoke is the main job on every line of Kubernetes: a StatefulSet's volume is
// snapshot and restored, and the copy is used at once, while it is merged and while
// the node plugin is replaced.
func TestSmoke(t *testing.T) {
	onAllLines(t, rig.Plain, func(e *env, line string) { smoke(e, healthOf[line]) })
}

// healthOf is how the kubelets of a line tell a volume's health.
var healthOf = map[string]health{
	"1.36": condition{},
	"1.37": volumeHealth{},
}

func smoke(e *env, h health) {
	e.apply("classes.yaml")
	e.apply("original.yaml")
	e.kubectl("rollout", "status", "--timeout=2m", "statefulset/original")
	e.volume("data-original-0")
	e.apply("snapshot.yaml")
	e.kubectl("wait", "--for=jsonpath={.status.readyToUse}=true", "--timeout=2m", "volumesnapshot/snapshot")

	e.apply("restored.yaml")
	passes := e.startOffline()
	e.until(time.Minute, "restored volume is in use", func() (bool, string) {
		out, err := e.c.Output(e.Context(), "kubectl", "logs", "restored")
		return strings.Contains(out, "verified"), fmt.Sprint(out, err)
	})
	volume := e.volume("restored")
	e.watchMerge(volume)
	before := e.merging(volume)

	// The second time nobody is asked: like kill -9.
	e.replacePlugin()
	e.replacePlugin("--grace-period=0", "--force")
	e.checkReader(reader)
	if after := e.merging(volume); after < before {
		e.Errorf("the merge stood at %v %%, and after a restart at %v %%", before, after)
	}
	e.checkMetrics("restored", volume)
	h.healthy(e, original)
	if passes { // the merge may end meanwhile
		e.checkOffline()
		e.endOffline()
	}

	e.finishMerge(volume)
	e.until(time.Minute, "nothing left to do", func() (bool, string) {
		s, err := e.status(volume)
		return s.State == "merged" || s.State == "native", fmt.Sprint(s, err) // with device-mapper it is native
	})
	e.checkReader(reader)
	e.checkEvents("restored", "RestoreStaged", "MergeStarted", "MergeCompleted")
	e.kubectl("delete", "--timeout=1m", "pod/restored", "persistentvolumeclaim/restored")
	e.noMerge(volume)
	e.expand()
	e.trouble(h)
	e.loseDevices(h)
	e.uninstall()
}

// merging makes sure that the merge is under way and returns how far it is.
func (e *env) merging(volume string) float64 {
	e.Helper()
	s, err := e.status(volume)
	e.check(err)
	if s.State != "merging" || s.Error != "" || s.Percent >= 100 {
		e.Fatalf("volume is not being merged: %+v", s)
	}
	e.Logf("the merge is at %v %%", s.Percent)
	return s.Percent
}

// replacePlugin deletes the node plugin's pod and waits for the next one.
func (e *env) replacePlugin(how ...string) {
	e.Helper()
	old := e.plugin()
	rounds := e.rounds(reader)
	e.ours(append([]string{"delete", "pod", old}, how...)...)
	e.until(time.Minute, "another node plugin "+strings.Join(how, " "), func() (bool, string) {
		out, err := e.c.Output(e.Context(), "kubectl", "--namespace", rig.Namespace, "get", "pods", "--selector", selector,
			"--field-selector", "metadata.name!="+old, "--output", `jsonpath={.items[0].status.conditions[?(@.type=="Ready")].status}`)
		return err == nil && out == "True", fmt.Sprint(out, err)
	})
	e.until(time.Minute, "reader goes on", func() (bool, string) {
		now := e.rounds(reader)
		return now > rounds+5, fmt.Sprint(now, " rounds")
	})
}

const selector = "app.kubernetes.io/name=snapmerge,app.kubernetes.io/component=node"

func (e *env) plugin() string {
	e.Helper()
	return e.ours("get", "pods", "--selector", selector, "--output", "jsonpath={.items[0].metadata.name}")
}

// reader is the pod that uses the restored volume.
const reader = "restored"

// rounds is how often a pod has read and written.
func (e *env) rounds(pod string) int {
	e.Helper()
	return strings.Count(e.kubectl("logs", pod), "round")
}

// checkReader makes sure that a pod that reads and writes has met no error, and logs
// how long it had to wait at most.
func (e *env) checkReader(pod string) {
	e.Helper()
	if phase := e.kubectl("get", "pod", pod, "--output", "jsonpath={.status.phase}"); phase != "Running" {
		e.Fatalf("pod %s is %s: %s", pod, phase, e.kubectl("logs", pod, "--tail=3"))
	}
	var last time.Time
	var longest time.Duration
	lines := strings.Split(e.kubectl("logs", pod, "--timestamps"), "\n")
	for _, line := range lines {
		stamp, _, _ := strings.Cut(line, " ")
		at, err := time.Parse(time.RFC3339Nano, stamp)
		e.check(err)
		if !last.IsZero() {
			longest = max(longest, at.Sub(last))
		}
		last = at
	}
	e.Logf("pod %s has done %d rounds, the longest took %.1f s", pod, len(lines), longest.Seconds())
}

// expand grows a volume that is in use: with xfs, for growing a mounted ext4 takes
// a capability that the machine may not have.
func (e *env) expand() {
	e.apply("grown.yaml")
	e.kubectl("wait", "--for=condition=Ready", "--timeout=1m", "pod/grown")
	e.volume("grown")
	e.kubectl("patch", "persistentvolumeclaim", "grown", "--patch", `{"spec":{"resources":{"requests":{"storage":"700Mi"}}}}`)
	e.kubectl("wait", "--for=jsonpath={.status.capacity.storage}=700Mi", "--timeout=2m", "persistentvolumeclaim/grown")
	if out := e.kubectl("exec", "grown", "--", "df", "-m", "/data"); !strings.Contains(out, " 6") {
		e.Errorf("the file system has not grown:\n%s", out)
	}
	e.kubectl("delete", "--timeout=1m", "pod/grown", "persistentvolumeclaim/grown")
}

// uninstall deletes all volumes and then snapmerge, as the documentation says.
func (e *env) uninstall() {
	e.kubectl("delete", "--timeout=1m", "statefulset/original")
	e.kubectl("delete", "--timeout=1m", "persistentvolumeclaim", "--all")
	e.kubectl("delete", "--timeout=1m", "volumesnapshot", "--all")
	e.noVolumes()
	e.deleteManifest()
}

// deleteManifest removes what rig.Plain has installed.
func (e *env) deleteManifest() {
	e.Helper()
	manifest, err := filepath.Abs(rig.Manifest(repo))
	e.check(err)
	e.kubectl("delete", "--timeout=2m", "--filename", manifest)
}

// noVolumes waits until there is no volume, and makes sure that nothing of any is
// left on the node.
func (e *env) noVolumes() {
	for _, kind := range []string{"persistentvolumes", "volumesnapshotcontents"} {
		e.until(time.Minute, "no "+kind, func() (bool, string) {
			left := e.kubectl("get", kind, "--output", "name")
			return left == "", left
		})
	}
	for _, kind := range []string{"volumes", "snapshots"} {
		left, err := os.ReadDir(filepath.Join(e.c.StateDir(), kind))
		if err != nil || len(left) > 0 {
			e.Errorf("%s are left: %v, %v", kind, left, err)
		}
	}
	e.sidecars()
	mounts, err := e.c.Output(e.Context(), "cat", "/proc/mounts")
	e.check(err)
	for line := range strings.Lines(mounts) {
		if strings.HasPrefix(line, "/dev/loop") && !strings.Contains(line, " "+cluster.StateDir+" ") {
			e.Errorf("a mount is left: %s", line)
		}
	}
}

// sidecars makes sure that they may do all that they want to.
func (e *env) sidecars() {
	e.Helper()
	for _, of := range []string{"daemonset/snapmerge-node", "deployment/snapmerge-resizer"} {
		for line := range strings.Lines(e.ours("logs", of, "--all-containers")) {
			if strings.Contains(line, "forbidden") {
				e.Errorf("%s: %s", of, line)
			}
		}
	}
}
