package e2e

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/snapmerge/snapmerge/test/e2e/internal/rig"
)

// TestDatabase is the main job as the operator of a database sees it: PostgreSQL is
// snapshot at work, the snapshot is restored, and the second database is worked with
// at once, while it is merged, while the node plugin's pod is deleted, and while
// snapmerge is upgraded with Helm. Nobody may see an error, all sums have to agree,
// and after the chart has been uninstalled nothing may be left.
func TestDatabase(t *testing.T) {
	onAllLines(t, rig.Chart, func(e *env, _ string) { e.story() })
}

func (e *env) story() {
	e.check(rig.LoadPostgres(e.Context(), e.c))
	e.apply("classes.yaml")
	original := e.database("original", "snapmerge-ext4", "")
	original.works()
	e.apply("database-snapshot.yaml")
	e.kubectl("wait", "--for=jsonpath={.status.readyToUse}=true", "--timeout=2m", "volumesnapshot/database")
	original.works()

	start := time.Now()
	restored := e.database("restored", "slow", "dataSource: {apiGroup: snapshot.storage.k8s.io, kind: VolumeSnapshot, name: database}")
	restored.works()
	e.Logf("the restored database answers and takes writes after %.1f s", time.Since(start).Seconds())
	merged := e.climbed(restored.volume, 0)
	restored.consistent()

	e.deletePlugin()
	restored.works()
	merged = e.climbed(restored.volume, merged)

	const next = "next"
	e.check(rig.LoadProduct(e.Context(), e.c, repo, next))
	// Without --wait: keepers are not replaced, for which Helm would wait.
	e.check(rig.Helm(e.Context(), e.c, repo, "upgrade", "--set=image.tag="+next))
	e.ours("rollout", "status", "--timeout=2m", "daemonset/snapmerge-node")
	if v := e.ours("exec", "daemonset/snapmerge-node", "--container=node", "--", "snapmerge", "version"); !strings.Contains(v, next) {
		e.Errorf("after the upgrade the version is %s, not %s", v, next)
	}
	restored.works()
	e.climbed(restored.volume, merged)
	e.ours("exec", "daemonset/snapmerge-node", "--container=node", "--", "snapmerge", "rate", restored.volume, "1000")
	e.kubectl("wait", "volumemerge", restored.volume, "--for=condition=Merged", "--timeout=2m")
	for _, d := range []database{original, restored} {
		d.works()
		d.consistent()
		d.unharmed()
	}

	e.forget()
	e.kubectl("delete", "--timeout=1m", "statefulset/original", "statefulset/restored", "configmap/scripts")
	e.kubectl("delete", "--timeout=1m", "persistentvolumeclaim", "--all")
	e.kubectl("delete", "--timeout=1m", "volumesnapshot", "--all")
	e.noVolumes()
	e.check(rig.Uninstall(e.Context(), e.c, repo))
	e.ours("wait", "--for=delete", "--timeout=1m", "pod", "--all")
	if left := e.kubectl("get", "csidrivers,storageclasses,clusterroles,clusterrolebindings", "--selector=app.kubernetes.io/part-of=snapmerge", "--output=name"); left != "" {
		e.Errorf("left after uninstall: %s", left)
	}
}

// database is one that runs, as <name>-0.
type database struct {
	*env
	name, volume string
}

// database starts one with a volume of the class; source is where its claim takes
// its data from.
func (e *env) database(name, class, source string) database {
	e.Helper()
	b, err := os.ReadFile("testdata/database.yaml")
	e.check(err)
	_, err = e.c.Input(e.Context(), strings.NewReplacer("@NAME@", name, "@CLASS@", class, "@SOURCE@", source).Replace(string(b)), "kubectl", "apply", "--filename", "-")
	e.check(err)
	e.kubectl("rollout", "status", "--timeout=3m", "statefulset/"+name)
	return database{e, name, e.volume("data-" + name + "-0")}
}

func (d database) query(sql string) string {
	d.Helper()
	return d.kubectl("exec", d.name+"-0", "--container=postgres", "--", "psql", "--no-psqlrc", "--tuples-only", "--no-align", "--command", sql)
}

// works waits until transactions have been committed meanwhile.
func (d database) works() {
	d.Helper()
	count := func() int {
		n, err := strconv.Atoi(d.query("SELECT count(*) FROM pgbench_history"))
		d.check(err)
		return n
	}
	before := count()
	d.until(time.Minute, d.name+" works", func() (bool, string) {
		now := count()
		return now > before+20, fmt.Sprintf("%d transactions, %d before", now, before)
	})
}

// consistent makes sure that all balances agree, which reads all tables, with the
// pages' checksums.
func (d database) consistent() {
	d.Helper()
	const sums = `SELECT (SELECT sum(abalance) FROM pgbench_accounts), (SELECT sum(tbalance) FROM pgbench_tellers),
		(SELECT sum(bbalance) FROM pgbench_branches), (SELECT coalesce(sum(delta), 0) FROM pgbench_history), (SELECT count(*) FROM pgbench_accounts)`
	all := strings.Split(d.query(sums), "|")
	if len(all) != 5 || all[0] != all[1] || all[0] != all[2] || all[0] != all[3] || all[4] != "1500000" {
		d.Errorf("%s: the sums do not agree: %v", d.name, all)
	}
}

// unharmed makes sure that server and load have seen no error since they started.
func (d database) unharmed() {
	d.Helper()
	if n := d.kubectl("get", "pod", d.name+"-0", "--output", "jsonpath={.status.containerStatuses[*].restartCount}"); n != "0 0" {
		d.Errorf("%s: containers have been restarted: %s", d.name, n)
	}
	for _, container := range []string{"postgres", "load"} {
		for line := range strings.Lines(d.kubectl("logs", d.name+"-0", "--container="+container)) {
			if strings.Contains(line, "ERROR") || strings.Contains(line, "PANIC") || strings.Contains(line, "error:") {
				d.Errorf("%s: %s: %s", d.name, container, line)
			}
		}
	}
}

// deletePlugin deletes the node plugin's pod and waits for the next one.
func (e *env) deletePlugin() {
	e.Helper()
	e.ours("delete", "pod", e.plugin())
	e.ours("rollout", "status", "--timeout=2m", "daemonset/snapmerge-node")
}

// climbed waits until the volume's VolumeMerge has more bytes than before, and
// returns them. The merge must not have ended.
func (e *env) climbed(volume string, before int64) int64 {
	e.Helper()
	m := e.untilMerge(time.Minute, volume, fmt.Sprintf("merged beyond %d bytes", before), func(m volumeMerge) bool { return m.Status.BytesDone > before })
	e.Logf("%s", e.kubectl("get", "volumemerges"))
	if m.Status.State != "Merging" {
		e.Fatalf("the volume is not being merged: %+v", m.Status)
	}
	return m.Status.BytesDone
}
