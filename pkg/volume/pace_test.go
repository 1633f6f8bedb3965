package volume

import (
	"context"
	"math"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/snapmerge/snapmerge/pkg/blockio/crashfs"
	"github.com/snapmerge/snapmerge/pkg/merge"
	"github.com/snapmerge/snapmerge/pkg/volume/pacing"
	"github.com/snapmerge/snapmerge/test/cowgen"
)

// mergingVolume is a volume with a COW of all kinds of ops, opened with what cfg sets, and
// the image that comes of them.
func mergingVolume(t *testing.T, cfg Config) (v *Volume, want []byte) {
	t.Helper()
	_, made, im := restoredVolume(t, rand.NewPCG(1, 5), cowgen.Spec{Blocks: 600, Copies: 200, Xors: 20, Replaces: 100, Zeros: 10})
	open := made.cfg
	if err := made.Close(); err != nil {
		t.Fatal(err)
	}
	open.Pacing, open.Slots, open.StalledAfter = cfg.Pacing, cfg.Slots, cfg.StalledAfter
	v, err := Open(open)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := v.Close(); err != nil {
			t.Error(err)
		}
	})
	return v, im.Want
}

// clock is one that goes on only while somebody sleeps.
type clock struct {
	mu    sync.Mutex
	at    time.Time
	sleep func() // what else happens meanwhile
}

func (c *clock) now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.at
}

func (c *clock) pass(ctx context.Context, d time.Duration) error {
	c.mu.Lock()
	c.at = c.at.Add(d)
	c.mu.Unlock()
	c.sleep()
	return ctx.Err()
}

// TestForegroundFirst: merge and fold of a volume go at the floor rate as long as its
// guest reads and writes, and get to their end; without a guest nothing holds them
// back.
func TestForegroundFirst(t *testing.T) {
	for _, busy := range []bool{false, true} {
		c := &clock{at: time.Unix(1e9, 0)}
		node := pacing.NewNode("", 1)
		node.SetClock(c.now, c.pass)
		v, want := mergingVolume(t, Config{Pacing: node})
		if _, err := v.WriteAt(want[:8*bs], 0); err != nil { // for the fold
			t.Fatal(err)
		}
		c.at = c.at.Add(time.Minute) // after which the write does not count any more
		var yielding atomic.Bool
		request := func() { // by whoever waits: the merge, and its reader
			if !busy {
				return
			}
			if s := v.Status(); s.State != Merging && s.State != Folding && s.State != Merged {
				t.Errorf("while the guest is busy: %+v", s)
			} else if s.Yielding {
				yielding.Store(true)
			}
			var p [bs]byte
			if _, err := v.ReadAt(p[:], 0); err != nil {
				t.Error(err)
			}
		}
		c.sleep = request
		v.onPace = func(context.Context) { request() }
		if busy {
			v.inflight.Add(1) // the time that these requests take is not the clock's
		}
		start := c.now()
		for more := true; more; {
			var err error
			if more, err = v.Step(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		took, counters := c.now().Sub(start), v.Counters()
		if busy {
			v.inflight.Add(-1)
		}
		written := counters.MergeWritten + counters.Folded
		atFloor := time.Duration(float64(written) / (1 << 20) * float64(time.Second))
		t.Logf("busy %v: %d bytes in %v, at the floor %v, yielded %.2f s", busy, written, took, atFloor, counters.YieldedSeconds)
		switch {
		case !busy && took > 0:
			t.Error("held back for nobody")
		case busy && (took < atFloor*8/10 || took > 2*atFloor):
			t.Error("not at the floor rate")
		case busy && (!yielding.Load() || counters.YieldedSeconds < 0.8*atFloor.Seconds()), !busy && yielding.Load():
			t.Errorf("status yielding: %v", yielding.Load())
		}
		if s := v.Status(); s.Yielding || s.State != Merged {
			t.Errorf("at the end: %+v", s)
		}
		if err := finish(v, want); err != nil {
			t.Error(err)
		}
	}
}

// TestFullLog: a log above its soft limit is not made to wait for anything.
func TestFullLog(t *testing.T) {
	c, node := slowNode()
	v, want := mergingVolume(t, Config{Pacing: node})
	if err := v.update(func(r *Record) { r.Limits = Limits{Soft: 1, Hard: 1 << 30} }); err != nil {
		t.Fatal(err)
	}
	if _, err := v.WriteAt(want[:bs], 0); err != nil {
		t.Fatal(err)
	}
	v.inflight.Add(1) // all the time
	start := c.now()
	if err := finish(v, want); err != nil {
		t.Fatal(err)
	}
	if took := c.now().Sub(start); took != 0 {
		t.Errorf("waited for %v", took)
	}
	v.inflight.Add(-1)
}

// slowNode has a floor of 1 MiB/s, and a clock of its own.
func slowNode() (*clock, *pacing.Node) {
	c := &clock{at: time.Unix(1e9, 0), sleep: func() {}}
	node := pacing.NewNode("", 1)
	node.SetClock(c.now, c.pass)
	return c, node
}

// TestFoldCatchesUp: the longer a guest keeps a fold from its end, the less the fold
// holds back.
func TestFoldCatchesUp(t *testing.T) {
	c, node := slowNode()
	v, _ := mergingVolume(t, Config{Pacing: node})
	v.inflight.Add(1)
	defer v.inflight.Add(-1)
	last := time.Duration(0)
	for rounds := range int64(patience + 2) {
		v.rounds.Store(rounds)
		start := c.now()
		for range 65 {
			if err := v.paceFold(t.Context(), 1<<20); err != nil {
				t.Fatal(err)
			}
		}
		took := c.now().Sub(start)
		switch {
		case rounds == 0 && (took < 63*time.Second || took > 65*time.Second),
			rounds > 0 && rounds <= patience && (took > last/3 || took < last/5),
			rounds > patience && took != last && (took > last*2 || took < last/2):
			t.Errorf("64 MiB in %v in round %d, before %v", took, rounds, last)
		}
		last = took
	}
}

// TestSnapshotBesideGuest: a snapshot of a volume in use is encoded faster than it would
// be merged, and not at full speed.
func TestSnapshotBesideGuest(t *testing.T) {
	c, node := slowNode()
	v, _ := mergingVolume(t, Config{Pacing: node})
	v.inflight.Add(1)
	defer v.inflight.Add(-1)
	m := &Manager{cfg: ManagerConfig{Capacity: func() (free, total int64, err error) { return 1, 1, nil }}}
	pace, start := m.encodePace(v), c.now()
	for range 65 {
		if err := pace(t.Context(), 1<<20); err != nil {
			t.Fatal(err)
		}
	}
	if took := c.now().Sub(start).Seconds(); took < 3.9 || took > 4.1 {
		t.Errorf("64 MiB in %.2f s, the floor of merges is 1 MiB/s", took)
	}
}

// TestStalled: a merge that gets nothing done for too long is stalled until it does.
func TestStalled(t *testing.T) {
	const limit = 10 * time.Minute // of which nothing goes by in this test
	v, want := mergingVolume(t, Config{StalledAfter: limit})
	if s := v.status(time.Now().Add(2 * limit)); s.State != Merging || s.Error != "" {
		t.Errorf("not begun: %+v", s)
	}
	calls, stalls := 0, 0
	v.onPace = func(context.Context) {
		calls++
		now := time.Now()
		if s := v.status(now.Add(limit / 2)); s.State == Stalled {
			t.Errorf("too soon: %+v", s)
		}
		if s := v.status(now.Add(2 * limit)); s.State == Stalled && s.Error != "" {
			stalls++
			if later := v.status(now.Add(2*limit + time.Hour)); later.Error != s.Error {
				t.Errorf("the reason changes with the time: %q, %q", s.Error, later.Error)
			}
		} else if busy := v.work.busy; busy == merging {
			t.Errorf("call %d: %+v", calls, s)
		}
	}
	if err := finish(v, want); err != nil {
		t.Fatal(err)
	}
	if stalls == 0 {
		t.Error("never stalled")
	}
	if s := v.status(time.Now().Add(2 * limit)); s.State != Merged || s.Error != "" {
		t.Errorf("at the end: %+v", s)
	}
}

// TestNotStalledByPacing: at the lowest rate that can be set a window is written long
// before anybody calls the merge stalled.
func TestNotStalledByPacing(t *testing.T) {
	const lowest = 1 << 20
	if d := time.Duration(merge.DefaultWindowBlocks*bs/lowest) * time.Second; 2*d > DefaultStalledAfter {
		t.Errorf("a window takes %v", d)
	}
}

// TestBackOff: work that fails is tried again later and later, and said to have failed
// when it did three times.
func TestBackOff(t *testing.T) {
	fs := crashfs.New("/s")
	v := newVolume(t, fs, Spec{Size: 4 * bs})
	for i, want := range []time.Duration{time.Second, time.Second, 2 * time.Second, 4 * time.Second, 8 * time.Second} {
		v.work.fails = i
		if got := v.retryIn(); got != want {
			t.Errorf("after %d failures: %v, want %v", i, got, want)
		}
		st := v.stack.Load()
		if s := v.state(v.Record(), st, false, idle, syscall.EIO, i); (s == Failed) != (i >= 3) {
			t.Errorf("after %d failures: %s", i, s)
		}
	}
	v.work.fails = 1000
	if got := v.retryIn(); got != time.Minute {
		t.Errorf("after 1000 failures: %v", got)
	}
}

// TestHardLimit: a log is written as fast as without a hard limit as long as it is below
// it, however far; above it writes wait, the longer the further.
func TestHardLimit(t *testing.T) {
	v, _ := mergingVolume(t, Config{})
	if _, err := v.WriteAt(make([]byte, bs), 0); err != nil {
		t.Fatal(err)
	}
	waits := func(hard int64) int64 {
		t.Helper()
		if err := v.Update(func(r *Record) { r.Limits.Hard = hard }); err != nil {
			t.Fatal(err)
		}
		before := v.counts.throttled.Load()
		v.throttle()
		return v.counts.throttled.Load() - before
	}
	have := v.logBytes()
	for _, hard := range []int64{0, have, 1 << 40, 768 << 50, math.MaxInt64} {
		if d := waits(hard); d != 0 {
			t.Errorf("a write waits for %v with a log of %d bytes and a limit of %d", time.Duration(d), have, hard)
		}
	}
	little, much := waits(have*8/9), waits(have/4)
	if little == 0 || much <= little {
		t.Errorf("writes wait for %v and %v", time.Duration(little), time.Duration(much))
	}
}
