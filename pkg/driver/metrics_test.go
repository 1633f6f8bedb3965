package driver

import (
	"bytes"
	"crypto/rand"
	"fmt"
	"io"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
)

// metricsAddr is an address that no other test process uses.
func metricsAddr() string {
	pid := os.Getpid()
	return fmt.Sprintf("127.%d.%d.%d:9809", 1+pid>>16&63, pid>>8&255, pid&255)
}

// scrape is what /metrics says: values by name and labels, sorted.
func (n *node) scrape() map[string]float64 {
	n.t.Helper()
	r, err := http.Get("http://" + n.cfg.MetricsAddr + "/metrics")
	if err != nil {
		n.t.Fatal(err)
	}
	defer r.Body.Close()
	text, err := io.ReadAll(r.Body)
	if err != nil || r.StatusCode != http.StatusOK {
		n.t.Fatalf("%s, %v: %s", r.Status, err, text)
	}
	problems, err := promlint.New(bytes.NewReader(text)).Lint()
	if err != nil {
		n.t.Fatal(err)
	}
	for _, p := range problems {
		if strings.HasPrefix(p.Metric, "snapmerge_") {
			n.t.Errorf("%s: %s", p.Metric, p.Text)
		}
	}
	values := map[string]float64{}
	for line := range strings.Lines(string(text)) {
		at := strings.LastIndexByte(line, ' ')
		if v, err := strconv.ParseFloat(strings.TrimSpace(line[at+1:]), 64); err == nil && line[0] != '#' {
			values[line[:at]] = v
		}
	}
	return values
}

// TestMetrics looks at the metrics of a restored volume while it is merged, when
// it is merged, and when it is gone.
func TestMetrics(t *testing.T) {
	needDevices(t)
	n := newNode(t, func(c *Config) { c.MetricsAddr = metricsAddr() })
	c := blockCap(writer)
	const data = 24 * mib
	content := make([]byte, data)
	rand.Read(content)
	source := n.create("source", 64*mib, "", c)
	if err := os.WriteFile(n.use(source, c), content, 0); err != nil {
		t.Fatal(err)
	}
	n.leave(source)
	snap := n.snapshot("snap", source)
	r, err := n.CreateVolume(t.Context(), &csi.CreateVolumeRequest{
		Name: "restored", VolumeCapabilities: []*csi.VolumeCapability{c}, VolumeContentSource: fromSnapshot(snap.SnapshotId),
		CapacityRange: &csi.CapacityRange{RequiredBytes: 64 * mib},
		Parameters:    map[string]string{"mergeRate": "1", sidecarPrefix + "pvc/name": "data", sidecarPrefix + "pvc/namespace": "shop"},
	})
	if err != nil {
		t.Fatal(err)
	}
	id := r.Volume.VolumeId
	series := func(name string, own ...string) string {
		labels := []string{`namespace="shop"`, `pvc="data"`, fmt.Sprintf("volume_id=%q", id)}
		for i := 0; i < len(own); i += 2 {
			labels = append(labels, fmt.Sprintf("%s=%q", own[i], own[i+1]))
		}
		slices.Sort(labels)
		return fmt.Sprintf("snapmerge_%s{%s}", name, strings.Join(labels, ","))
	}
	target := n.use(id, c)
	dev, err := os.OpenFile(target, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer dev.Close()
	got := make([]byte, data)
	if _, err := dev.ReadAt(got, 0); err != nil || !bytes.Equal(got, content) {
		t.Fatalf("the restored volume is not the snapshot: %v", err)
	}
	if _, err := dev.WriteAt(content[:mib], data-mib); err != nil { // the merge comes there last
		t.Fatal(err)
	}
	if err := dev.Sync(); err != nil {
		t.Fatal(err)
	}

	// While it is merged.
	first := n.scrape()
	for name, want := range map[string]float64{
		series("volume_state", "state", "merging"):   1,
		series("volume_unresponsive"):                0,
		series("volume_device_down"):                 0,
		series("volume_size_bytes"):                  64 * mib,
		series("volume_layers"):                      2,
		series("merge_size_bytes"):                   data,
		series("write_bytes_total", "target", "log"): mib,
		series("io_bytes_total", "op", "write"):      mib,
		series("io_errors_total", "op", "read"):      0,
		"snapmerge_ready":                            1,
		"snapmerge_devices":                          1,
		`snapmerge_volumes{state="merging"}`:         1,
		`snapmerge_csi_call_duration_seconds_count{code="OK",method="NodeStageVolume"}`:            2,
		`snapmerge_csi_call_duration_seconds_bucket{code="OK",method="NodeStageVolume",le="+Inf"}`: 2,
	} {
		if v, ok := first[name]; !ok || v != want {
			t.Errorf("%s is %v (there: %v), want %v", name, v, ok, want)
		}
	}
	for _, name := range []string{
		series("read_bytes_total", "source", "cow"), series("io_seconds_total", "op", "read"), series("log_bytes"),
		series("merge_remaining_bytes"), series("io_requests_total", "op", "flush"), "snapmerge_pool_size_bytes",
	} {
		if first[name] <= 0 {
			t.Errorf("%s is %v", name, first[name])
		}
	}
	next := first
	for end := time.Now().Add(patience); ; time.Sleep(50 * time.Millisecond) {
		next = n.scrape()
		if next[series("merge_committed_bytes")] > first[series("merge_committed_bytes")] &&
			next[series("merge_rate_bytes_per_second")] > 0 && next[series("merge_flushes_total")] > first[series("merge_flushes_total")] {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("values stand still at %v of %v", next[series("merge_committed_bytes")], next[series("merge_size_bytes")])
		}
	}
	if next[series("merge_committed_bytes")]+next[series("merge_remaining_bytes")] != data {
		t.Errorf("%v bytes are committed, %v remain", next[series("merge_committed_bytes")], next[series("merge_remaining_bytes")])
	}

	// When it is merged.
	v, err := n.p.volumes.Get(id)
	if err != nil {
		t.Fatal(err)
	}
	if err := v.SetRate(maxRate); err != nil {
		t.Fatal(err)
	}
	n.checkMerged(id)
	last := n.scrape()
	for name, want := range map[string]float64{
		series("volume_state", "state", "merged"): 1,
		series("volume_layers"):                   0,
		series("merge_committed_bytes"):           data,
		series("merge_remaining_bytes"):           0,
		series("merge_errors_total"):              0,
		series("fold_bytes_total"):                mib,
		series("log_bytes"):                       0,
	} {
		if v, ok := last[name]; !ok || v != want {
			t.Errorf("merged: %s is %v (there: %v), want %v", name, v, ok, want)
		}
	}
	if last[series("merge_written_bytes_total")] < data || last[series("merge_read_bytes_total")] < data {
		t.Errorf("merged: %v bytes written, %v read", last[series("merge_written_bytes_total")], last[series("merge_read_bytes_total")])
	}
	for name, v := range first {
		if strings.Contains(name, "_total") && last[name] < v {
			t.Errorf("%s went from %v down to %v", name, v, last[name])
		}
	}

	// When it is gone.
	dev.Close()
	n.leave(id)
	n.delete(id)
	for name := range n.scrape() {
		if strings.Contains(name, fmt.Sprintf("volume_id=%q", id)) {
			t.Errorf("%s is still there", name)
		}
	}
}
