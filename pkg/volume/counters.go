package volume

import (
	"sync/atomic"
	"time"

	"github.com/snapmerge/snapmerge/pkg/merge"
	"github.com/snapmerge/snapmerge/pkg/volume/pacing"
)

// counts is what a volume counts from its opening on. All only grow.
type counts struct {
	read, write, zero, flush requests
	// Bytes of reads of the view by where they came from, and of writes by where
	// they went.
	fromBase, fromCOW, fromLog, fromAhead atomic.Uint64
	toBase, toLog                         atomic.Uint64
	throttled                             atomic.Int64 // ns
	stalls, failures                      atomic.Uint64
	merge                                 merge.Counters
}

func (c *counts) wrote(direct bool, n int) {
	if direct {
		c.toBase.Add(uint64(n))
	} else {
		c.toLog.Add(uint64(n))
	}
}

// requests counts requests of one kind.
type requests struct {
	done, errors, bytes atomic.Uint64
	ns                  atomic.Int64
}

// add counts a request of n bytes that ends now.
func (r *requests) add(start time.Time, n int64, err error) {
	r.ns.Add(int64(time.Since(start)))
	r.done.Add(1)
	if err != nil {
		r.errors.Add(1)
		return
	}
	r.bytes.Add(uint64(n))
}

func (r *requests) value() Requests {
	return Requests{
		Done: r.done.Load(), Errors: r.errors.Load(), Bytes: r.bytes.Load(), Seconds: time.Duration(r.ns.Load()).Seconds(),
	}
}

// Requests is a count of requests of one kind.
type Requests struct {
	Done   uint64 // answered, those with an error included
	Errors uint64
	Bytes  uint64 // of those without error
	// Seconds is the sum of the times that the answers took, waits because of a
	// full log included.
	Seconds float64
}

// Counters is what happened in a volume since this process opened it. All of it
// only grows. Sizes are in bytes.
type Counters struct {
	// The requests of the guest. Those that go to the base past the volume are among
	// them, but not the errors.
	Read, Write, Zero, Flush Requests
	// Bytes that reads of the view got from the base, from COWs, from write logs and
	// from what was read ahead. Reads of frozen views, for snapshots that are
	// encoded, are among them. What a COW only moves or changes counts for where it
	// was read, then and when it is read ahead.
	FromBase, FromCOW, FromLog, FromAhead uint64
	// Bytes that were written straight to the base, and to the write log.
	ToBase, ToLog uint64
	// ThrottledSeconds is how long requests waited because the write log was full.
	ThrottledSeconds float64

	// The merge of COWs; see merge.Counters.
	MergeWindows, MergeRead, MergeWritten, MergeScratch, MergeFlushes uint64
	// MergePromoted is what was merged early because pods had read it.
	MergePromoted uint64
	// Folded is how much was moved from write logs to the base.
	Folded uint64
	// Stalls is how often background work had to stop for lack of room, Failures
	// how often a step of it failed for whatever reason.
	Stalls, Failures uint64
	// YieldedSeconds is how long merge and fold waited for the pods.
	YieldedSeconds float64
}

// Counters returns the volume's counters. It never waits.
func (v *Volume) Counters() Counters {
	c, past := &v.counts, v.bypass.value()
	return Counters{
		Read: c.read.value().add(past.read), Write: c.write.value().add(past.write), Zero: c.zero.value().add(past.zero), Flush: c.flush.value().add(past.flush),
		FromBase: c.fromBase.Load(), FromCOW: c.fromCOW.Load(), FromLog: c.fromLog.Load(), FromAhead: c.fromAhead.Load(),
		ToBase: c.toBase.Load(), ToLog: c.toLog.Load(),
		ThrottledSeconds: time.Duration(c.throttled.Load()).Seconds(),
		MergeWindows:     c.merge.Windows.Load(), MergeRead: c.merge.BytesRead.Load(), MergeWritten: c.merge.BytesWritten.Load(),
		MergeScratch: c.merge.ScratchBytes.Load(), MergeFlushes: c.merge.Flushes.Load(),
		MergePromoted: c.merge.Promoted.Load(),
		Folded:        uint64(v.meter.folded.Load()), Stalls: c.stalls.Load(), Failures: c.failures.Load(),
		YieldedSeconds: v.pacer.Yielded().Seconds(),
	}
}

// InFlight is how many requests of the guest are being worked on.
func (v *Volume) InFlight() int64 { return v.inflight.Load() + v.bypass.value().inFlight }

// load is what background work has to go by. Nothing is counted for it alone.
func (v *Volume) load() pacing.Load {
	past := v.bypass.value()
	l := pacing.Load{InFlight: v.inflight.Load() + past.inFlight}
	for _, r := range []*requests{&v.counts.read, &v.counts.write, &v.counts.zero, &v.counts.flush} {
		l.Done += r.done.Load()
		l.Took += time.Duration(r.ns.Load())
	}
	for _, k := range []kernelRequests{past.read, past.write, past.zero, past.flush} {
		l.Done += k.done
		l.Took += k.took
	}
	return l
}

// ReadAt reads the view.
func (v *Volume) ReadAt(p []byte, off int64) (int, error) {
	start := time.Now()
	n, err := v.readAt(p, off)
	v.counts.read.add(start, int64(n), err)
	return n, err
}

// WriteAt writes to the view. When it returns, the data survives the death of
// this process.
func (v *Volume) WriteAt(p []byte, off int64) (int, error) {
	start := time.Now()
	n, err := v.writeAt(p, off)
	v.counts.write.add(start, int64(n), err)
	return n, err
}

// Zero makes a range read as zeros: write-zeroes, and discard.
func (v *Volume) Zero(off, n int64) error {
	start := time.Now()
	err := v.zero(off, n)
	v.counts.zero.add(start, n, err)
	return err
}

// Flush makes every write acknowledged before it durable, in log and base.
func (v *Volume) Flush() error {
	start := time.Now()
	v.inflight.Add(1)
	defer v.inflight.Add(-1)
	err := v.flush()
	v.counts.flush.add(start, 0, err)
	return err
}

// EncodeStatus is a snapshot that is being encoded.
type EncodeStatus struct {
	Snapshot, Volume string
	Claim            Claim // of the volume
	// Done and Total are the bytes of data that are encoded and that there are; both
	// are 0 until that is known.
	Done, Total int64
}

// Encodes returns the snapshots that are being encoded, in no order.
func (m *Manager) Encodes() []EncodeStatus {
	m.mu.Lock()
	defer m.mu.Unlock()
	var all []EncodeStatus
	for _, n := range m.encodes {
		rec := n.v.Record()
		// In this order: done is never above the total.
		done, total := n.progress.Load(), n.total.Load()
		all = append(all, EncodeStatus{Snapshot: n.snapshot, Volume: rec.ID, Claim: rec.Claim, Done: done, Total: total})
	}
	return all
}

// Adoptions counts the devices of an earlier process that were taken over, and
// the attempts that failed.
func (m *Manager) Adoptions() (done, failed uint64) { return m.adopted.Load(), m.adoptFailures.Load() }
