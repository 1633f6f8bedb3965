package metrics

import (
	"github.com/snapmerge/snapmerge/pkg/readahead"
	"github.com/snapmerge/snapmerge/pkg/volume"
)

// nodeReading is what is read of the node.
type nodeReading struct {
	version string
	ready   bool // the volumes are opened; else there is nothing else
	states  map[volume.State]int
	silent  int // volumes that have not answered in time
	hidden  int // volumes without series
	devices int
	// free and total are the pool's room in bytes; known is false if that could
	// not be found out in time.
	free, total   int64
	known         bool
	adopted, lost uint64
	encodes       []volume.EncodeStatus
	ahead         readahead.Stats
}

// whenReady gives a metric a value once the volumes are opened.
func whenReady(value func(r *nodeReading) float64) func(*nodeReading, emitter) {
	return func(r *nodeReading, emit emitter) {
		if r.ready {
			emit(value(r))
		}
	}
}

func whenKnown(value func(r *nodeReading) int64) func(*nodeReading, emitter) {
	return func(r *nodeReading, emit emitter) {
		if r.known {
			emit(float64(value(r)))
		}
	}
}

// eachEncode gives a metric a value for each snapshot that is being encoded.
func eachEncode(value func(e *volume.EncodeStatus) int64) func(*nodeReading, emitter) {
	return func(r *nodeReading, emit emitter) {
		for i := range r.encodes {
			e := &r.encodes[i]
			emit(float64(value(e)), e.Snapshot, e.Volume, e.Claim.Namespace, e.Claim.PVC)
		}
	}
}

// encodeLabels: the volume may be deleted while a snapshot of it is encoded.
var encodeLabels = []string{"snapshot_id", "volume_id", "namespace", "pvc"}

var nodeMetrics = []metric[*nodeReading]{
	{
		"snapmerge_build_info", "The version of the node plugin; always 1.",
		gauge, []string{"version"}, func(r *nodeReading, emit emitter) { emit(1, r.version) },
	},
	{
		"snapmerge_ready", "1 when the volumes are opened and calls are served.",
		gauge, nil, always(func(r *nodeReading) float64 { return truth(r.ready) }),
	},
	{
		"snapmerge_volumes", "Volumes of the node by state; those that did not answer in time are missing.",
		gauge, []string{"state"},
		func(r *nodeReading, emit emitter) {
			for _, s := range volume.States {
				if r.ready {
					emit(float64(r.states[s]), string(s))
				}
			}
		},
	},
	{
		"snapmerge_volumes_unresponsive", "Volumes that did not tell their state in time.",
		gauge, nil, whenReady(func(r *nodeReading) float64 { return float64(r.silent) }),
	},
	{
		"snapmerge_volumes_without_series", "Volumes that have no series of their own because there are too many.",
		gauge, nil, whenReady(func(r *nodeReading) float64 { return float64(r.hidden) }),
	},
	{
		"snapmerge_devices", "Block devices in service.",
		gauge, nil, whenReady(func(r *nodeReading) float64 { return float64(r.devices) }),
	},
	{
		"snapmerge_devices_adopted_total", "Devices that were taken over from the node plugin before this one.",
		counter, nil, whenReady(func(r *nodeReading) float64 { return float64(r.adopted) }),
	},
	{
		"snapmerge_device_adoption_errors_total", "Attempts to take over a device that failed.",
		counter, nil, whenReady(func(r *nodeReading) float64 { return float64(r.lost) }),
	},
	{
		"snapmerge_pool_size_bytes", "Room of the pool in all, the reserve for what pods write not counted.",
		gauge, nil, whenKnown(func(r *nodeReading) int64 { return r.total }),
	},
	{
		"snapmerge_pool_free_bytes", "Room of the pool that new volumes and snapshots may take now. At 0 snapshots fail, and what is left is for the pods.",
		gauge, nil, whenKnown(func(r *nodeReading) int64 { return r.free }),
	},
	{
		"snapmerge_encode_size_bytes", "Data of a snapshot that is being encoded; 0 until it is known.",
		gauge, encodeLabels, eachEncode(func(e *volume.EncodeStatus) int64 { return e.Total }),
	},
	{
		"snapmerge_encode_done_bytes", "Part of snapmerge_encode_size_bytes that is encoded.",
		gauge, encodeLabels, eachEncode(func(e *volume.EncodeStatus) int64 { return e.Done }),
	},
}
