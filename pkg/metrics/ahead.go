package metrics

import (
	"github.com/prometheus/client_golang/prometheus"

	"github.com/snapmerge/snapmerge/pkg/readahead"
)

// ahead gives a metric a value once the volumes are opened.
func ahead(value func(s *readahead.Stats) float64) func(*nodeReading, emitter) {
	return whenReady(func(r *nodeReading) float64 { return value(&r.ahead) })
}

var aheadMetrics = []metric[*nodeReading]{
	{
		"snapmerge_read_ahead_hits_total", "Reads, of unmerged data or of the base, that found all of it read ahead, or on its way; a read of both is two.",
		counter, nil, ahead(func(s *readahead.Stats) float64 { return float64(s.Hits) }),
	},
	{
		"snapmerge_read_ahead_shared_total", "Reads of unmerged data, hits or not, that got something which was read ahead for another volume of the same snapshot.",
		counter, nil, ahead(func(s *readahead.Stats) float64 { return float64(s.Shared) }),
	},
	{
		"snapmerge_read_ahead_misses_total", "Reads, of unmerged data or of the base, for which something was not read ahead.",
		counter, nil, ahead(func(s *readahead.Stats) float64 { return float64(s.Misses) }),
	},
	{
		"snapmerge_read_ahead_blocks_total", "Blocks of 4 KiB that were read ahead.",
		counter, nil, ahead(func(s *readahead.Stats) float64 { return float64(s.Blocks) }),
	},
	{
		"snapmerge_read_ahead_bytes_total", "Bytes that were read ahead.",
		counter, nil, ahead(func(s *readahead.Stats) float64 { return float64(s.Bytes) }),
	},
	{
		"snapmerge_read_ahead_wasted_bytes_total", "Bytes that were read ahead and forgotten before anybody read them.",
		counter, nil, ahead(func(s *readahead.Stats) float64 { return float64(s.Wasted) }),
	},
	{
		"snapmerge_read_ahead_failures_total", "Pieces of 64 KiB that were not read ahead because of an error or because all memory was in use. Who wanted them read by himself.",
		counter, nil, ahead(func(s *readahead.Stats) float64 { return float64(s.Failed) }),
	},
	{
		"snapmerge_read_ahead_late_total", "Reads that gave up waiting for what was being read ahead, because it took several times as long as usual, and read by themselves.",
		counter, nil, ahead(func(s *readahead.Stats) float64 { return float64(s.Late) }),
	},
	{
		"snapmerge_read_ahead_memory_bytes", "Memory that read-ahead takes.",
		gauge, nil, ahead(func(s *readahead.Stats) float64 { return float64(s.Memory) }),
	},
	{
		"snapmerge_read_ahead_memory_limit_bytes", "Memory that read-ahead may take.",
		gauge, nil, ahead(func(s *readahead.Stats) float64 { return float64(s.MemoryLimit) }),
	},
}

// aheadTimes are the histograms of the read-ahead.
var aheadTimes = []struct {
	name, help string
	value      func(s *readahead.Stats) readahead.Times
}{
	{
		"snapmerge_read_ahead_duration_seconds", "How long reading ahead took, from being asked for to the end.",
		func(s *readahead.Stats) readahead.Times { return s.Total },
	},
	{
		"snapmerge_read_ahead_queue_seconds", "How long it waited for a free worker. Only with async.",
		func(s *readahead.Stats) readahead.Times { return s.Queued },
	},
	{
		"snapmerge_read_ahead_execution_seconds", "How long it took from then on.",
		func(s *readahead.Stats) readahead.Times { return s.Execution },
	},
	{
		"snapmerge_read_ahead_blocked_seconds", "How long reads waited for what was being read ahead.",
		func(s *readahead.Stats) readahead.Times { return s.Blocked },
	},
}

// aheadReads is the histogram of reads by mode.
const (
	aheadReads     = "snapmerge_unmerged_read_seconds"
	aheadReadsHelp = "How long reads of the pods took in layers that are not merged yet, by mode of read-ahead."
)

var aheadTimesDescs = func() (d []*prometheus.Desc) {
	for _, h := range aheadTimes {
		d = append(d, prometheus.NewDesc(h.name, h.help, nil, nil))
	}
	return append(d, prometheus.NewDesc(aheadReads, aheadReadsHelp, []string{"mode"}, nil))
}()

func describeTimes() (d []Description) {
	for _, h := range aheadTimes {
		d = append(d, Description{h.name, "histogram", nil, h.help})
	}
	return append(d, Description{aheadReads, "histogram", []string{"mode"}, aheadReadsHelp})
}

// sendAhead sends what is told about the read-ahead.
func sendAhead(ch chan<- prometheus.Metric, n *nodeReading) {
	if !n.ready {
		return
	}
	send(ch, aheadMetrics, aheadDescs, n, nil)
	for i, h := range aheadTimes {
		sendTimes(ch, aheadTimesDescs[i], h.value(&n.ahead))
	}
	for mode, t := range n.ahead.Reads {
		sendTimes(ch, aheadTimesDescs[len(aheadTimes)], t, string(mode))
	}
}

func sendTimes(ch chan<- prometheus.Metric, d *prometheus.Desc, t readahead.Times, labels ...string) {
	m, err := prometheus.NewConstHistogram(d, t.Count, t.Seconds, t.Buckets, labels...)
	if err != nil {
		m = prometheus.NewInvalidMetric(d, err)
	}
	ch <- m
}
