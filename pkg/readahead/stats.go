package readahead

import (
	"sync/atomic"
	"time"

	"github.com/snapmerge/snapmerge/pkg/blockio"
)

// buckets are upper bounds of times: from a copy in memory to a disk that hangs.
var buckets = []time.Duration{
	10 * time.Microsecond, 25 * time.Microsecond, 50 * time.Microsecond, 100 * time.Microsecond, 250 * time.Microsecond, 500 * time.Microsecond,
	time.Millisecond, 2500 * time.Microsecond, 5 * time.Millisecond, 10 * time.Millisecond, 25 * time.Millisecond, 50 * time.Millisecond,
	100 * time.Millisecond, 250 * time.Millisecond, time.Second, 5 * time.Second,
}

// times counts durations.
type times struct {
	in  [17]atomic.Uint64 // by bucket; the last one is for what is above all bounds
	sum atomic.Int64      // ns
}

func (t *times) observe(d time.Duration) {
	i := 0
	for i < len(buckets) && d > buckets[i] {
		i++
	}
	t.in[i].Add(1)
	t.sum.Add(int64(d))
}

// Times is how many durations there were and how long they were.
type Times struct {
	Count   uint64
	Seconds float64 // all of them added up
	// Buckets has, by upper bound in seconds, how many were no longer than that.
	Buckets map[float64]uint64
}

func (t *times) value() Times {
	v := Times{Buckets: map[float64]uint64{}, Seconds: time.Duration(t.sum.Load()).Seconds()}
	for i := range t.in {
		v.Count += t.in[i].Load()
		if i < len(buckets) {
			v.Buckets[buckets[i].Seconds()] = v.Count
		}
	}
	return v
}

// counters is what a Manager counts.
type counters struct {
	hits, shared, misses, failed, late, blocks, wasted atomic.Uint64

	total, queued, execution, blocked times
	none, sync, async                 times // reads
}

func (c *counters) reads(m Mode) *times {
	switch m {
	case Sync:
		return &c.sync
	case Async:
		return &c.async
	}
	return &c.none
}

// count counts a read in mode Sync or Async.
func (c *counters) count(missed, ahead, shared bool) {
	if shared {
		c.shared.Add(1)
	}
	switch {
	case missed:
		c.misses.Add(1)
	case ahead:
		c.hits.Add(1)
	}
}

// Stats is what has happened since the Manager was made. All but Memory only
// grows.
type Stats struct {
	// Hits are reads for which all was there, or on its way, that can be read ahead;
	// Misses those for which something was not. Reads of what no op writes are
	// neither, as far as that is known.
	Hits, Misses uint64
	// Shared are reads, hits or not, that got something which another volume's layer
	// had loaded.
	Shared uint64
	// Blocks and Bytes were read ahead, Wasted bytes of it forgotten unread.
	Blocks, Bytes, Wasted uint64
	// Failed chunks were not loaded because of an error or because all memory was in
	// use. Late is how often a read gave up waiting for one.
	Failed, Late uint64
	// Memory is what is in use, in bytes, and MemoryLimit what may be.
	Memory, MemoryLimit int64

	// Of tasks: from being submitted to the end, to the start, and from start to
	// end. In mode Sync, where the reader is the one who loads, the second is left
	// out.
	Total, Queued, Execution Times
	// Blocked is how long reads waited for chunks.
	Blocked Times
	// Reads is how long reads of unmerged layers took.
	Reads map[Mode]Times
}

// Stats returns the counters.
func (m *Manager) Stats() Stats {
	c := &m.stats
	s := Stats{
		Hits: c.hits.Load(), Shared: c.shared.Load(), Misses: c.misses.Load(), Blocks: c.blocks.Load(), Wasted: c.wasted.Load(),
		Failed: c.failed.Load(), Late: c.late.Load(), MemoryLimit: chunksOf(m.cfg.Memory) * ChunkBytes,
		Total: c.total.value(), Queued: c.queued.value(), Execution: c.execution.value(), Blocked: c.blocked.value(),
		Reads: map[Mode]Times{},
	}
	s.Bytes = s.Blocks * blockio.BlockSize
	for _, mode := range Modes {
		s.Reads[mode] = c.reads(mode).value()
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	s.Memory = int64(m.loaded+len(m.spare)) * ChunkBytes
	return s
}
