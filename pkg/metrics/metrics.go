// Package metrics shows a node plugin to Prometheus: its volumes, read when a
// scrape asks for them, and its CSI calls, counted as they come. docs/metrics.md
// is made from the tables in volumes.go, node.go, ahead.go and csi.go.
//
// A scrape never waits for a volume that hangs: see collector. Series of volumes
// are bounded in number and vanish with the volume: see MaxVolumes.
package metrics

import (
	"net/http"
	"slices"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/snapmerge/snapmerge/pkg/volume"
)

// Metrics are the metrics of a node plugin.
type Metrics struct {
	reg     *prometheus.Registry
	volumes *collector
	calls   *calls
}

// New makes the metrics of a node plugin of that version.
func New(version string) *Metrics {
	m := &Metrics{reg: prometheus.NewRegistry(), volumes: newCollector(version), calls: newCalls()}
	m.reg.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	m.reg.MustRegister(m.volumes, m.calls.seconds, m.calls.inFlight)
	return m
}

// Show shows the volumes of v from now on. hung is why a volume's file system is
// thought to hang, or nil; it must not wait.
func (m *Metrics) Show(v *volume.Manager, hung func(id string) error) {
	m.volumes.source.Store(&source{v, hung})
}

// Handler answers scrapes.
func (m *Metrics) Handler() http.Handler {
	// Should one metric be wrong, the others are told all the same.
	return promhttp.HandlerFor(m.reg, promhttp.HandlerOpts{ErrorHandling: promhttp.ContinueOnError, Registry: m.reg})
}

// Description is what is known of a metric without its values.
type Description struct {
	Name   string
	Type   string   // counter, gauge or histogram
	Labels []string // beside those of its group
	Help   string
}

// Group is a number of metrics that belong together.
type Group struct {
	Title   string
	Labels  []string // of each of them
	Metrics []Description
}

// List describes all metrics but those that every Go program has.
func List() []Group {
	return []Group{
		{"Volumes", volumeLabels, describe(volumeMetrics)},
		{"Node", nil, describe(nodeMetrics)},
		{"Read-ahead", nil, slices.Concat(describe(aheadMetrics), describeTimes())},
		{"CSI calls", nil, callMetrics},
	}
}

// metric is one that is read when it is asked for, from an R.
type metric[R any] struct {
	name, help string
	kind       prometheus.ValueType
	labels     []string // its own
	// values gives the values there are with the values of the labels.
	values func(r R, emit func(value float64, labels ...string))
}

func describe[R any](all []metric[R]) (d []Description) {
	for _, m := range all {
		kind := "gauge"
		if m.kind == counter {
			kind = "counter"
		}
		d = append(d, Description{m.name, kind, m.labels, m.help})
	}
	return d
}

// descs are the descriptions that Prometheus wants. common are the labels that
// all of them have.
func descs[R any](all []metric[R], common []string) (d []*prometheus.Desc) {
	for _, m := range all {
		d = append(d, prometheus.NewDesc(m.name, m.help, slices.Concat(common, m.labels), nil))
	}
	return d
}

const (
	counter = prometheus.CounterValue
	gauge   = prometheus.GaugeValue
)

// always gives a metric one value.
func always[R any](value func(r R) float64) func(R, func(float64, ...string)) {
	return func(r R, emit func(float64, ...string)) { emit(value(r)) }
}

func truth(b bool) float64 {
	if b {
		return 1
	}
	return 0
}
