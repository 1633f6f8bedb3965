package metrics

import "github.com/snapmerge/snapmerge/pkg/volume"

// volumeLabels are those of every metric of a volume. The names of the claim are
// empty if the provisioner did not tell them.
var volumeLabels = []string{"volume_id", "namespace", "pvc"}

// reading is what is read of a volume.
type reading struct {
	volume.Status
	// open: the volume can be used; else there is nothing but Status.
	open     bool
	counters volume.Counters
	inFlight int64
	limits   volume.Limits
	// silent: the volume has not answered in time; nothing but id and claim is
	// known.
	silent bool
}

// trouble tells whether somebody should look at the volume.
func (r *reading) trouble() bool {
	return r.silent || r.DeviceDown || r.Corrupt || r.State == volume.Failed || r.State == volume.Stalled
}

type emitter = func(value float64, labels ...string)

// answered gives a metric a value for volumes that answer.
func answered(value func(r *reading) float64) func(*reading, emitter) {
	return func(r *reading, emit emitter) {
		if !r.silent {
			emit(value(r))
		}
	}
}

// opened gives a metric a value for volumes that are open.
func opened(value func(r *reading) float64) func(*reading, emitter) {
	return func(r *reading, emit emitter) {
		if r.open {
			emit(value(r))
		}
	}
}

// counted is opened for what volume.Counters has.
func counted(value func(c *volume.Counters) uint64) func(*reading, emitter) {
	return opened(func(r *reading) float64 { return float64(value(&r.counters)) })
}

// requests gives a metric a value for each kind of requests.
func requests(value func(r volume.Requests) float64) func(*reading, emitter) {
	return func(r *reading, emit emitter) {
		if c := &r.counters; r.open {
			emit(value(c.Read), "read")
			emit(value(c.Write), "write")
			emit(value(c.Zero), "zero")
			emit(value(c.Flush), "flush")
		}
	}
}

var volumeMetrics = []metric[*reading]{
	{
		"snapmerge_volume_state", "What the volume is at; always 1, of the states only the present one has a series: unstaged, staged, encoding, merging, folding, paused, merged, native, stalled (waits for room, or gets nothing done), failed.",
		gauge, []string{"state"},
		func(r *reading, emit emitter) {
			if !r.silent {
				emit(1, string(r.State))
			}
		},
	},
	{
		"snapmerge_volume_unresponsive", "1 if the volume did not tell its state in time, as when its disk hangs. It has no other series then.",
		gauge, nil, always(func(r *reading) float64 { return truth(r.silent) }),
	},
	{
		"snapmerge_volume_device_down", "1 if the device of a staged volume is dead or gone, so that its pods see I/O errors, or the file system on it does not answer.",
		gauge, nil, answered(func(r *reading) float64 { return truth(r.DeviceDown) }),
	},
	{
		"snapmerge_volume_corrupt", "1 if data of the volume, or of the snapshot it is made from, is damaged.",
		gauge, nil, answered(func(r *reading) float64 { return truth(r.Corrupt) }),
	},
	{
		"snapmerge_volume_size_bytes", "Size of the volume as its pods see it.",
		gauge, nil, answered(func(r *reading) float64 { return float64(r.Size) }),
	},
	{
		"snapmerge_volume_layers", "Layers above the base: COWs and write logs. 0: an ordinary volume.",
		gauge, nil, opened(func(r *reading) float64 { return float64(r.Layers) }),
	},

	{
		"snapmerge_merge_size_bytes", "Bytes of the base that the COWs of the volume write in all, those that are merged and gone included.",
		gauge, nil, opened(func(r *reading) float64 { return float64(r.BytesTotal) }),
	},
	{
		"snapmerge_merge_committed_bytes", "Part of snapmerge_merge_size_bytes that is durably in the base.",
		gauge, nil, opened(func(r *reading) float64 { return float64(r.BytesDone) }),
	},
	{
		"snapmerge_merge_remaining_bytes", "Part of snapmerge_merge_size_bytes that is still to be merged.",
		gauge, nil, opened(func(r *reading) float64 { return float64(r.BytesTotal - r.BytesDone) }),
	},
	{
		"snapmerge_merge_rate_bytes_per_second", "Speed of merging and folding over the last 10 seconds, or since somebody asked last. 0 while nothing is at work.",
		gauge, nil, opened(func(r *reading) float64 { return r.RateMiB * (1 << 20) }),
	},
	{
		"snapmerge_merge_eta_seconds", "Time to the end of the merge at that speed; no series if there is none.",
		gauge, nil,
		func(r *reading, emit emitter) {
			if r.open && r.ETASeconds >= 0 {
				emit(r.ETASeconds)
			}
		},
	},
	{
		"snapmerge_merge_read_bytes_total", "Bytes that merges read from base and COW.",
		counter, nil, counted(func(c *volume.Counters) uint64 { return c.MergeRead }),
	},
	{
		"snapmerge_merge_written_bytes_total", "Bytes that merges wrote to the base, zeros not counted.",
		counter, nil, counted(func(c *volume.Counters) uint64 { return c.MergeWritten }),
	},
	{
		"snapmerge_merge_scratch_bytes_total", "Bytes that merges wrote to their scratch space, for safety from crashes.",
		counter, nil, counted(func(c *volume.Counters) uint64 { return c.MergeScratch }),
	},
	{
		"snapmerge_merge_windows_total", "Windows of ordered ops (copy and xor) that merges began.",
		counter, nil, counted(func(c *volume.Counters) uint64 { return c.MergeWindows }),
	},
	{
		"snapmerge_merge_flushes_total", "Flushes of base and journal by merges.",
		counter, nil, counted(func(c *volume.Counters) uint64 { return c.MergeFlushes }),
	},
	{
		"snapmerge_merge_promoted_bytes_total", "Bytes of the base that were merged before their turn, because pods had read them.",
		counter, nil, counted(func(c *volume.Counters) uint64 { return c.MergePromoted }),
	},
	{
		"snapmerge_merge_stalls_total", "How often background work (merge, fold) had to stop for lack of room.",
		counter, nil, counted(func(c *volume.Counters) uint64 { return c.Stalls }),
	},
	{
		"snapmerge_merge_errors_total", "Steps of background work that failed, for lack of room or otherwise, and are tried again.",
		counter, nil, counted(func(c *volume.Counters) uint64 { return c.Failures }),
	},
	{
		"snapmerge_merge_yielded_seconds_total", "Time that background work waited because pods used the disk, added up.",
		counter, nil, opened(func(r *reading) float64 { return r.counters.YieldedSeconds }),
	},
	{
		"snapmerge_merge_yielding", "1 while background work holds back because pods use the disk.",
		gauge, nil, opened(func(r *reading) float64 { return truth(r.Yielding) }),
	},
	{
		"snapmerge_fold_bytes_total", "Bytes that were moved from write logs to the base.",
		counter, nil, counted(func(c *volume.Counters) uint64 { return c.Folded }),
	},

	{
		"snapmerge_io_requests_total", "Requests of the pods that were answered, by op: read, write, zero (discard included), flush.",
		counter, []string{"op"}, requests(func(r volume.Requests) float64 { return float64(r.Done) }),
	},
	{
		"snapmerge_io_errors_total", "Requests of the pods that were answered with an error, by op.",
		counter, []string{"op"}, requests(func(r volume.Requests) float64 { return float64(r.Errors) }),
	},
	{
		"snapmerge_io_bytes_total", "Bytes of requests that were answered without error, by op.",
		counter, []string{"op"}, requests(func(r volume.Requests) float64 { return float64(r.Bytes) }),
	},
	{
		"snapmerge_io_seconds_total", "Time that answers took, added up, by op. Divided by snapmerge_io_requests_total: the mean latency in the plugin.",
		counter, []string{"op"}, requests(func(r volume.Requests) float64 { return r.Seconds }),
	},
	{
		"snapmerge_io_in_flight", "Requests of the pods that are being worked on. If the disk hangs it stays above 0 while no requests are answered.",
		gauge, nil, opened(func(r *reading) float64 { return float64(r.inFlight) }),
	},
	{
		"snapmerge_read_bytes_total", "Bytes that reads of the view got, by source: base, cow (decoded, or held by the merge), log, read_ahead. " +
			"Reads for snapshots that are encoded are included. What a COW moves or changes counts as base; what is read ahead of it, too, when that is done.",
		counter, []string{"source"},
		func(r *reading, emit emitter) {
			if r.open {
				emit(float64(r.counters.FromBase), "base")
				emit(float64(r.counters.FromCOW), "cow")
				emit(float64(r.counters.FromLog), "log")
				emit(float64(r.counters.FromAhead), "read_ahead")
			}
		},
	},
	{
		"snapmerge_write_bytes_total", "Bytes that pods wrote, by target: base (straight), log.",
		counter, []string{"target"},
		func(r *reading, emit emitter) {
			if r.open {
				emit(float64(r.counters.ToBase), "base")
				emit(float64(r.counters.ToLog), "log")
			}
		},
	},
	{
		"snapmerge_write_throttled_seconds_total", "Time that writes of the pods were held back because the write log was too full, added up.",
		counter, nil, opened(func(r *reading) float64 { return r.counters.ThrottledSeconds }),
	},
	{
		"snapmerge_log_bytes", "Disk space of the volume's write logs.",
		gauge, nil, opened(func(r *reading) float64 { return float64(r.LogBytes) }),
	},
	{
		"snapmerge_log_soft_limit_bytes", "Disk space of write logs above which the merge is not slowed down by anything.",
		gauge, nil, opened(func(r *reading) float64 { return float64(r.limits.Soft) }),
	},
	{
		"snapmerge_log_hard_limit_bytes", "Disk space of write logs above which writes of the pods are slowed down.",
		gauge, nil, opened(func(r *reading) float64 { return float64(r.limits.Hard) }),
	},
}
