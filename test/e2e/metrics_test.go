package e2e

import (
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/snapmerge/snapmerge/test/e2e/internal/rig"
)

// metricsPort is the chart's.
const metricsPort = 9809

// metrics are what Prometheus would get from the node plugin's port.
func (e *env) metrics() (map[string]float64, error) {
	e.Helper()
	out, err := e.c.Output(e.Context(), "kubectl", "get", "--raw", fmt.Sprintf("/api/v1/namespaces/%s/pods/%s:%d/proxy/metrics", rig.Namespace, e.plugin(), metricsPort))
	if err != nil {
		return nil, err
	}
	values := map[string]float64{}
	for line := range strings.Lines(out) {
		at := strings.LastIndexByte(line, ' ')
		if v, err := strconv.ParseFloat(strings.TrimSpace(line[at+1:]), 64); err == nil && line[0] != '#' {
			values[line[:at]] = v
		}
	}
	return values, nil
}

// checkMetrics makes sure that the merge of a claim's volume can be followed, after
// a restart of the node plugin.
func (e *env) checkMetrics(claim, volume string) {
	e.Helper()
	m, err := e.metrics()
	e.check(err)
	labels := fmt.Sprintf("{namespace=\"default\",pvc=%q,volume_id=%q}", claim, volume)
	done, left := m["snapmerge_merge_committed_bytes"+labels], m["snapmerge_merge_remaining_bytes"+labels]
	state := m[fmt.Sprintf("snapmerge_volume_state{namespace=\"default\",pvc=%q,state=\"merging\",volume_id=%q}", claim, volume)]
	if state != 1 || done <= 0 || left <= 0 || m["snapmerge_merge_size_bytes"+labels] != done+left {
		e.Errorf("metrics of %s: %v bytes are merged, %v remain, merging: %v", claim, done, left, state)
	}
	adopted := m["snapmerge_devices_adopted_total"]
	if m["snapmerge_ready"] != 1 || adopted < 2 || m["snapmerge_pool_free_bytes"] <= 0 {
		e.Errorf("ready: %v, %v devices were taken over, %v bytes free", m["snapmerge_ready"], adopted, m["snapmerge_pool_free_bytes"])
	}
	e.Logf("metrics: %v bytes are merged, %v remain, %v devices were taken over", done, left, adopted)
}

// untilMetric waits until a metric of a claim's volume has that value. label is one
// more label of the series, or empty.
func (e *env) untilMetric(name, claim, label string, value float64) {
	e.Helper()
	e.until(time.Minute, fmt.Sprintf("%s{%s} of %s is %v", name, label, claim, value), func() (bool, string) {
		m, err := e.metrics()
		if err != nil {
			return false, err.Error()
		}
		var seen []string
		for series, v := range m {
			if !strings.HasPrefix(series, name+"{") || !strings.Contains(series, fmt.Sprintf("pvc=%q", claim)) {
				continue
			}
			if v == value && strings.Contains(series, label) {
				return true, ""
			}
			seen = append(seen, fmt.Sprint(series, " ", v))
		}
		return false, fmt.Sprint(seen)
	})
}
