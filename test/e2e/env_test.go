package e2e

import (
	"context"
	"encoding/json"
	"log"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/snapmerge/snapmerge/test/e2e/internal/cluster"
	"github.com/snapmerge/snapmerge/test/e2e/internal/rig"
)

const repo = "../.."

func TestMain(m *testing.M) {
	cluster.Init()
	log.SetFlags(log.Ltime)
	os.Exit(m.Run())
}

// env is a cluster with snapmerge in it, and what the test asks it.
type env struct {
	*testing.T
	c *cluster.Cluster
	// volumes are the ids of all volumes that there have been.
	volumes map[string]bool
}

// up is held while a cluster is brought up: that builds what is not there yet.
var up sync.Mutex

// onAllLines runs test on a cluster of each line of Kubernetes. Mostly it waits for
// what the cluster does in its own time, so all lines are tested at once.
func onAllLines(t *testing.T, how rig.Installer, test func(e *env, line string)) {
	for _, line := range slices.Sorted(maps.Keys(rig.Lines)) {
		t.Run(line, func(t *testing.T) {
			t.Parallel()
			test(newEnv(t, line, how), line)
		})
	}
}

// newEnv brings the cluster up; at the end it goes down, and nothing may be left.
func newEnv(t *testing.T, line string, how rig.Installer) *env {
	if os.Getuid() != 0 {
		t.Skip("a cluster takes root")
	}
	up.Lock()
	c, err := rig.Up(t.Context(), repo, line, how)
	up.Unlock()
	e := &env{t, c, map[string]bool{}}
	if c != nil {
		t.Cleanup(e.down)
	}
	e.check(err)
	return e
}

func (e *env) down() {
	if e.Failed() {
		e.explain()
	}
	if err := e.c.Down(); err != nil {
		e.Error(err)
	}
	e.checkNode()
	if e.Failed() {
		e.Logf("the cluster's files are in %s", e.c.Dir())
	} else if err := os.RemoveAll(e.c.Dir()); err != nil {
		e.Error(err)
	}
}

func (e *env) check(err error) {
	e.Helper()
	if err != nil {
		e.Fatal(err)
	}
}

// kubectl returns what kubectl prints; it has to succeed.
func (e *env) kubectl(args ...string) string {
	e.Helper()
	out, err := e.c.Output(e.Context(), "kubectl", args...)
	e.check(err)
	return out
}

// ours is kubectl in snapmerge's namespace.
func (e *env) ours(args ...string) string {
	e.Helper()
	return e.kubectl(append([]string{"--namespace", rig.Namespace}, args...)...)
}

// apply applies a file of testdata.
func (e *env) apply(name string) {
	e.Helper()
	b, err := os.ReadFile(filepath.Join("testdata", name))
	e.check(err)
	_, err = e.c.Input(e.Context(), string(b), "kubectl", "apply", "--filename", "-")
	e.check(err)
}

// until waits until probe says that it is done. It says what there is instead,
// too.
func (e *env) until(limit time.Duration, what string, probe func() (done bool, state string)) time.Duration {
	e.Helper()
	start, state := time.Now(), ""
	for time.Since(start) < limit {
		var done bool
		if done, state = probe(); done {
			took := time.Since(start)
			e.Logf("%s after %.1f s", what, took.Seconds())
			return took
		}
		time.Sleep(200 * time.Millisecond)
	}
	e.Fatalf("not %s after %s: %s", what, limit, state)
	return 0
}

// status is that of a volume, as snapmerge status has it.
type status struct {
	ID      string  `json:"id"`
	State   string  `json:"state"`
	Percent float64 `json:"percent"`
	Error   string  `json:"error"`
}

// status asks the node plugin; nothing if there is none at the moment.
func (e *env) status(volume string) (status, error) {
	var s status
	out, err := e.c.Output(e.Context(), "kubectl", "--namespace", rig.Namespace, "exec", "daemonset/snapmerge-node", "--container", "node", "--",
		"snapmerge", "status", "--json", volume)
	if err != nil {
		return s, err
	}
	return s, json.Unmarshal([]byte(out), &s)
}

// volume is the volume of a claim that is bound.
func (e *env) volume(claim string) string {
	e.Helper()
	id := e.kubectl("get", "persistentvolumeclaim", claim, "--output", "jsonpath={.spec.volumeName}")
	if id == "" {
		e.Fatalf("claim %s has no volume", claim)
	}
	e.volumes[id] = true
	return id
}

// explain logs what helps to find out why a test has failed.
func (e *env) explain() {
	for _, args := range [][]string{
		{"get", "pods,pvc,pv,volumesnapshots,volumesnapshotcontents", "--all-namespaces", "--output", "wide"},
		{"get", "volumemerges", "--all-namespaces", "--output", "yaml"},
		{"get", "events", "--all-namespaces", "--sort-by=.lastTimestamp"},
		{"--namespace", rig.Namespace, "logs", "daemonset/snapmerge-node", "--all-containers", "--tail=60"},
		{"--namespace", rig.Namespace, "logs", "daemonset/snapmerge-keeper", "--tail=60"},
		{"logs", "original-0", "--tail=20"},
		{"logs", "restored", "--tail=20"},
	} {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		out, err := e.c.Output(ctx, "kubectl", args...)
		cancel()
		e.Logf("kubectl %s: %v\n%s", strings.Join(args, " "), err, out)
	}
}

// checkNode makes sure that the machine is as before.
func (e *env) checkNode() {
	var ids []string
	for id := range e.volumes {
		ids = append(ids, id)
	}
	// The kernel takes its time to take down the mounts of a namespace.
	loops, err := e.c.Loops(ids)
	for end := time.Now().Add(10 * time.Second); len(loops) > 0 && time.Now().Before(end); loops, err = e.c.Loops(ids) {
		time.Sleep(100 * time.Millisecond)
	}
	if err != nil || len(loops) > 0 {
		e.Errorf("loop devices are left: %v, %v", loops, err)
	}
	mounts, err := os.ReadFile("/proc/mounts")
	if err != nil || strings.Contains(string(mounts), e.c.Dir()) || strings.Contains(string(mounts), "snapmerge") {
		e.Errorf("mounts are left (%v):\n%s", err, mounts)
	}
	for _, pattern := range []string{"/sys/fs/cgroup/", "/sys/fs/cgroup/*/"} { // version 2, version 1
		groups, err := filepath.Glob(pattern + e.c.Cgroup())
		if err != nil || len(groups) > 0 {
			e.Errorf("cgroups are left: %v, %v", groups, err)
		}
	}
	all, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		e.Error(err)
	}
	for _, file := range all {
		if b, err := os.ReadFile(file); err == nil && strings.Contains(string(b), e.c.Dir()) {
			e.Errorf("a process is left: %s: %q", file, b)
		}
	}
}
