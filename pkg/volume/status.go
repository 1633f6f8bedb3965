package volume

import (
	"math"
	"time"
)

// State says in one word what a volume is at.
type State string

// The states of a volume. A volume that nothing is happening to is Staged or
// Unstaged if it was never restored, Merged if it was.
const (
	Unstaged State = "unstaged"
	Staged   State = "staged"
	Encoding State = "encoding"
	Merging  State = "merging"
	Folding  State = "folding"
	Paused   State = "paused"
	Merged   State = "merged"
	Native   State = "native"
	Stalled  State = "stalled"
	Failed   State = "failed"
)

// States are all states.
var States = []State{Unstaged, Staged, Encoding, Merging, Folding, Paused, Merged, Native, Stalled, Failed}

// Status is what a volume shows of itself. The JSON keys are those of the
// status command.
type Status struct {
	ID         string  `json:"id"`
	State      State   `json:"state"`
	Percent    float64 `json:"percent"`     // of all COW layers, by bytes of the base
	BytesDone  int64   `json:"bytes_done"`  // committed
	BytesTotal int64   `json:"bytes_total"` // that the COW layers write
	RateMiB    float64 `json:"rate_mib_s"`  // over the last seconds
	// ETASeconds is the time to the end of the merge at that rate; -1: unknown.
	ETASeconds float64 `json:"eta_seconds"`
	Layers     int     `json:"layers"`
	LogBytes   int64   `json:"log_bytes"` // of disk
	Transport  string  `json:"transport"`
	Device     string  `json:"device"`
	Error      string  `json:"error"`
	// Yielding says that the merge, or fold, holds back because pods use
	// the disk.
	Yielding bool `json:"yielding,omitempty"`
	// Claim is what the volume was made for, if that is known.
	Claim Claim `json:"claim,omitzero"`

	// Size is the length of the view in bytes; 0 if the volume cannot be opened and
	// nothing else tells.
	Size int64 `json:"size_bytes"`
	// Corrupt says that Error is damage to data, not a failure to write it.
	Corrupt bool `json:"corrupt,omitempty"`
	// DeviceDown says that the device of a staged volume is dead or gone.
	DeviceDown bool `json:"device_down,omitempty"`
}

// failsBeforeFailed is how often work fails in a row before the state says so.
const failsBeforeFailed = 3

// Status returns the state of the volume. Transport and Device are left to who
// staged it.
func (v *Volume) Status() Status { return v.status(time.Now()) }

func (v *Volume) status(now time.Time) Status {
	rec, st := v.Record(), v.stack.Load()
	s := Status{ID: rec.ID, Layers: len(st.layers), LogBytes: v.logBytes(), Size: v.Size(), Claim: rec.Claim, ETASeconds: -1}
	s.BytesDone, s.BytesTotal = v.cowBytes()
	s.Percent = 100
	if s.BytesTotal > 0 {
		s.Percent = math.Round(float64(s.BytesDone)/float64(s.BytesTotal)*1000) / 10
	}
	rate := v.meter.rate(now, s.BytesDone+v.meter.folded.Load())

	w := &v.work
	w.mu.Lock()
	paused, busy, lastErr, fails := w.paused, w.busy, w.lastErr, w.fails
	if s.BytesDone > w.doneAt {
		lastErr, fails = nil, 0 // it goes on where it had failed
	}
	w.mu.Unlock()
	s.State = v.state(rec, st, paused, busy, lastErr, fails)
	if err := v.failed(); err != nil && lastErr == nil {
		lastErr = err
	}
	if lastErr != nil {
		s.Error, s.Corrupt = lastErr.Error(), corrupt(lastErr)
	}
	if busy != idle {
		s.RateMiB = math.Round(rate/(1<<20)*10) / 10
		s.Yielding = v.pacer.Yielding()
		if d := v.stuck(now); d > 0 && (s.State == Merging || s.State == Folding) {
			// Not for how long: who tells of changes would have one each second.
			s.State, s.Error = Stalled, "nothing got done since "+now.Add(-d).UTC().Format(time.RFC3339)
		}
	}
	switch left := float64(s.BytesTotal - s.BytesDone); {
	case left == 0:
		s.ETASeconds = 0
	case busy == merging && rate > 0:
		if eta := math.Round(left / rate); eta < unknownETA {
			s.ETASeconds = eta
		}
	}
	return s
}

// unknownETA is a time to the end, in seconds, that tells nothing: 30 years.
const unknownETA = 1e9

// cowBytes is how many bytes of the base the COWs write, those that are merged and
// gone included: committed ones, and all.
func (v *Volume) cowBytes() (done, total int64) {
	rec, st := v.Record(), v.stack.Load()
	done, total = rec.Merged, rec.Merged
	for _, l := range st.layers {
		switch {
		case l.merger != nil:
			m := l.merger.Stats()
			done += int64(m.Bytes)
			total += int64(m.BytesTotal)
		case l.cow != nil:
			total += int64(l.cow.Ops.TargetBlocks()) * bs
		}
	}
	return done, total
}

func (v *Volume) state(rec *Record, st *stack, paused bool, busy activity, lastErr error, fails int) State {
	switch {
	case v.failed() != nil, lastErr != nil && (corrupt(lastErr) || fails >= failsBeforeFailed && !transient(lastErr)):
		return Failed
	case lastErr != nil && transient(lastErr):
		return Stalled
	case paused && len(st.layers) > 0:
		return Paused
	case len(st.layers) > 0 && st.layers[0].cow != nil:
		return Merging
	case rec.Cut != nil:
		return Encoding
	case len(st.layers) > 0:
		return Folding
	case rec.Native == GoneNative && v.isNative.Load():
		return Native
	case rec.Merged > 0 || rec.Restored:
		return Merged
	case rec.Stage != nil:
		return Staged
	}
	return Unstaged
}

// MergeError is why background work fails at the moment, or nil.
func (v *Volume) MergeError() error {
	v.work.mu.Lock()
	defer v.work.mu.Unlock()
	return v.work.lastErr
}

// Idle tells whether the stack is empty.
func (v *Volume) Idle() bool { return len(v.stack.Load().layers) == 0 }
