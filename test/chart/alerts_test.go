package chart

import (
	"maps"
	"strings"
	"testing"
	"time"

	monitoring "github.com/prometheus-operator/prometheus-operator/pkg/apis/monitoring/v1"
	"github.com/prometheus/prometheus/promql/promqltest"
)

// TestAlerts evaluates the alerts' expressions as Prometheus does: on series as
// the node plugins of two nodes have them, one of which is in the trouble that
// the alert is about.
func TestAlerts(t *testing.T) {
	const (
		up      = `up{job="snapmerge/snapmerge-node",namespace="snapmerge",node="a"}`
		claim   = `{node="a",namespace="shop",pvc="data",volume_id="v"}`
		healthy = `
			up{job="snapmerge/snapmerge-node",namespace="snapmerge",node="b"} 1
			snapmerge_ready{node="b"} 1
			snapmerge_volume_state{node="b",namespace="shop",pvc="other",volume_id="w",state="merging"} 1
			snapmerge_volume_device_down{node="b",namespace="shop",pvc="other",volume_id="w"} 0
			snapmerge_volume_unresponsive{node="b",namespace="shop",pvc="other",volume_id="w"} 0
			snapmerge_volume_corrupt{node="b",namespace="shop",pvc="other",volume_id="w"} 0
			snapmerge_pool_free_bytes{node="b"} 11
			snapmerge_pool_size_bytes{node="b"} 100
			snapmerge_log_bytes{node="b",namespace="shop",pvc="other",volume_id="w"} 80
			snapmerge_log_hard_limit_bytes{node="b",namespace="shop",pvc="other",volume_id="w"} 100
			snapmerge_log_bytes{node="b",namespace="shop",pvc="unlimited",volume_id="x"} 80
			snapmerge_log_hard_limit_bytes{node="b",namespace="shop",pvc="unlimited",volume_id="x"} 0`
	)
	state := func(s string) string {
		return `snapmerge_volume_state{node="a",namespace="shop",pvc="data",volume_id="v",state="` + s + `"} 1`
	}
	troubles := []struct{ alert, series string }{
		{"", ""},
		{"SnapmergeDriverDown", up + " 0"},
		{"SnapmergeDriverDown", up + " 1\nsnapmerge_ready{node=\"a\"} 0"},
		{"SnapmergeDeviceLost", "snapmerge_volume_device_down" + claim + " 1"},
		{"SnapmergeVolumeUnresponsive", "snapmerge_volume_unresponsive" + claim + " 1"},
		{"SnapmergeDataDamaged", "snapmerge_volume_corrupt" + claim + " 1"},
		{"SnapmergeMergeFailed", state("failed")},
		{"SnapmergeMergeStalled", state("stalled")},
		{"SnapmergePoolNearlyFull", "snapmerge_pool_free_bytes{node=\"a\"} 9\nsnapmerge_pool_size_bytes{node=\"a\"} 100"},
		{"SnapmergeLogNearLimit", "snapmerge_log_bytes" + claim + " 81\nsnapmerge_log_hard_limit_bytes" + claim + " 100"},
	}
	rules := map[string]string{}
	for _, m := range monitored(t) {
		if r, ok := decode(t, m).(*monitoring.PrometheusRule); ok {
			for _, rule := range r.Spec.Groups[0].Rules {
				rules[rule.Alert] = rule.Expr.String()
			}
		}
	}
	engine := promqltest.NewTestEngine(t, false, 0, 1000)
	// firing counts the alerts of each name.
	firing := func(series string) map[string]int {
		t.Helper()
		load := "load 1m"
		for line := range strings.Lines(series) {
			if line = strings.TrimSpace(line); line != "" {
				load += "\n  " + line
			}
		}
		storage := promqltest.LoadedStorage(t, load+"\n")
		defer storage.Close()
		count := map[string]int{}
		for alert, expr := range rules {
			q, err := engine.NewInstantQuery(t.Context(), storage, nil, expr, time.Unix(0, 0))
			check(t, err)
			v, err := q.Exec(t.Context()).Vector()
			check(t, err)
			if len(v) > 0 {
				count[alert] = len(v)
			}
			q.Close()
		}
		return count
	}
	const nobody = "SnapmergeNoDriver"
	if got := firing(`up{job="else"} 1`); got[nobody] != 1 || len(got) != 1 {
		t.Errorf("no driver: %v", got)
	}
	tried := map[string]bool{nobody: true}
	for _, c := range troubles {
		tried[c.alert] = true
		want := map[string]int{}
		if c.alert != "" {
			want[c.alert] = 1
		}
		if got := firing(healthy + "\n" + c.series); !maps.Equal(got, want) {
			t.Errorf("%v with %s, want %v", got, c.series, want)
		}
	}
	for alert := range rules {
		if !tried[alert] {
			t.Errorf("%s has no case", alert)
		}
	}
}
