package metrics

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc/codes"
)

// calls are the metrics of CSI calls. Methods and codes are those that the
// services have, so the series are few.
type calls struct {
	seconds  *prometheus.HistogramVec
	inFlight *prometheus.GaugeVec
}

// callBuckets are upper bounds in seconds: from a question that is answered from
// memory to a check of a large file system.
var callBuckets = []float64{0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300}

var callMetrics = []Description{
	{
		"snapmerge_csi_call_duration_seconds", "histogram", []string{"method", "code"},
		"How long CSI calls took, by method and gRPC code. Aborted: the same is under way already; who called asks again.",
	},
	{
		"snapmerge_csi_calls_in_flight", "gauge", []string{"method"},
		"CSI calls that are being worked on.",
	},
}

func newCalls() *calls {
	h, g := callMetrics[0], callMetrics[1]
	return &calls{
		seconds:  prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: h.Name, Help: h.Help, Buckets: callBuckets}, h.Labels),
		inFlight: prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: g.Name, Help: g.Help}, g.Labels),
	}
}

// Call counts a CSI call that begins now. end is to be called with how it ended.
func (m *Metrics) Call(method string) (end func(c codes.Code)) {
	start := time.Now()
	now := m.calls.inFlight.WithLabelValues(method)
	now.Inc()
	return func(c codes.Code) {
		now.Dec()
		m.calls.seconds.WithLabelValues(method, c.String()).Observe(time.Since(start).Seconds())
	}
}
