package pacing

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"
)

const mib = 1 << 20

// world is a node whose time and signals are made up.
type world struct {
	t    *testing.T
	node *Node
	now  time.Time
}

// newWorld has a floor of 4 MiB/s and a disk that nobody else uses.
func newWorld(t *testing.T) *world {
	w := &world{t: t, node: NewNode("", 4), now: time.Unix(1e9, 0)}
	w.node.disk = &disk{}
	w.node.SetClock(func() time.Time { return w.now }, func(ctx context.Context, d time.Duration) error {
		w.now = w.now.Add(d)
		return ctx.Err()
	})
	return w
}

// guest is a volume and what its guest does.
type guest struct {
	*Pacer
	load Load
	// every is the time from one request to the next, took what each takes; 0: none.
	every, took time.Duration
	next        time.Time
	pieces      int // of background work that were let through
}

func (w *world) add(every, took time.Duration) *guest {
	g := &guest{every: every, took: took, next: w.now}
	g.Pacer = w.node.Add(func() Load { return g.load })
	return g
}

// run lets time go by in steps of a millisecond. Each volume has work to do all the
// time, in pieces of a MiB that take no longer than a step. What a step of the guests
// brings is there before the work looks.
func (w *world) run(d time.Duration, all ...*guest) {
	cost := time.Duration(float64(mib) / float64(w.node.floor) * float64(time.Second))
	for end := w.now.Add(d); w.now.Before(end); w.now = w.now.Add(time.Millisecond) {
		for _, g := range all {
			for ; g.every > 0 && !g.next.After(w.now); g.next = g.next.Add(g.every) {
				g.load.Done++
				g.load.Took += g.took
			}
		}
		for _, g := range all {
			if w.node.until(g.Pacer, &g.write, cost) == 0 {
				g.pieces++
			}
		}
	}
}

// between is a check of how many pieces were let through.
func (g *guest) between(t *testing.T, what string, low, high int) {
	t.Helper()
	if g.pieces < low || g.pieces > high {
		t.Errorf("%s: %d pieces, want %d to %d", what, g.pieces, low, high)
	}
	g.pieces = 0
}

// TestOwnGuest: work goes at the floor rate while the guest of the volume is busy,
// and at full speed as soon as it is not.
func TestOwnGuest(t *testing.T) {
	w := newWorld(t)
	g := w.add(0, 0)
	w.run(time.Second, g)
	g.between(t, "idle", 1000, 1000)
	if g.Yielding() || g.Yielded() != 0 {
		t.Errorf("idle, and yielded for %v", g.Yielded())
	}

	g.every, g.took = 20*time.Millisecond, 10*time.Millisecond
	w.run(10*time.Second, g)
	g.between(t, "busy", 40, 42)
	if !g.Yielding() {
		t.Error("busy, and does not yield")
	}

	g.every = 0
	w.run(100*time.Millisecond, g)
	g.between(t, "just now", 0, 1)
	w.run(time.Second+hold, g)
	if g.pieces < 300 {
		t.Errorf("%d pieces after the guest has stopped", g.pieces)
	}
	g.pieces = 0
	w.run(time.Second, g)
	g.between(t, "idle again", 1000, 1000)
	if g.Yielding() {
		t.Error("idle again, and yields")
	}

	g.load.InFlight = 1 // that never ends
	w.run(10*time.Second, g)
	g.between(t, "a request hangs", 40, 42)
}

// TestLightLoad: the less a guest does, the faster the work. What a second brings is
// some times the floor of 4 MiB/s.
func TestLightLoad(t *testing.T) {
	for _, c := range []struct {
		every, took time.Duration
		low, high   int // MiB in 10 s
	}{
		{time.Second, time.Millisecond, 7000, 9000}, // no limit but for a quarter of a second
		{100 * time.Millisecond, 200 * time.Microsecond, 1550, 1750},
		{100 * time.Millisecond, time.Millisecond, 680, 1100},
		{20 * time.Millisecond, 200 * time.Microsecond, 320, 360},
		{10 * time.Millisecond, 200 * time.Microsecond, 160, 175},
		{10 * time.Millisecond, time.Millisecond, 70, 75},
		{10 * time.Millisecond, 3 * time.Millisecond, 40, 42},
		{time.Millisecond, time.Millisecond, 40, 42},
		{time.Millisecond, 20 * time.Microsecond, 40, 42}, // it is busy, though not here
	} {
		w := newWorld(t)
		g := w.add(c.every, c.took)
		w.run(time.Second, g)
		g.pieces = 0
		w.run(10*time.Second, g)
		g.between(t, fmt.Sprintf("a request of %v every %v", c.took, c.every), c.low, c.high)
	}
}

// TestFeedback: work that makes the guest's requests take longer slows down, and never
// below the floor.
func TestFeedback(t *testing.T) {
	for _, c := range []struct {
		slower    time.Duration // a request, for each piece since the one before
		low, high int           // MiB in 10 s
	}{
		{0, 160, 175},
		{time.Millisecond, 90, 150},
		{10 * time.Millisecond, 45, 95},
		{100 * time.Millisecond, 40, 55},
	} {
		const alone = 200 * time.Microsecond
		w := newWorld(t)
		g := w.add(10*time.Millisecond, alone)
		before := 0
		for range 10000 {
			if !g.next.After(w.now) {
				g.took, before = alone+time.Duration(g.pieces-before)*c.slower, g.pieces
			}
			w.run(time.Millisecond, g)
		}
		g.between(t, fmt.Sprintf("slower by %v", c.slower), c.low, c.high)
	}
}

// TestBegins: a guest that begins after a long rest has the work at its floor before
// ten pieces were let through, whatever it does between the looks.
func TestBegins(t *testing.T) {
	w := newWorld(t)
	g := w.add(0, 0)
	w.run(time.Minute, g)
	g.pieces = 0
	g.every, g.took, g.next = time.Millisecond, time.Millisecond, w.now
	w.run(time.Second, g)
	g.between(t, "the first second", 4, 30)
}

// TestWrite: waiting and its account, on the clock.
func TestWrite(t *testing.T) {
	w := newWorld(t)
	g := w.add(0, 0)
	g.load.InFlight = 1
	ctx := t.Context()
	start := w.now
	for range 42 { // the first two need not wait
		if err := g.Write(ctx, mib, 1); err != nil {
			t.Fatal(err)
		}
		w.now = w.now.Add(100 * time.Millisecond) // the I/O itself is part of the floor
	}
	if d := w.now.Sub(start); d < 10*time.Second || d > 10*time.Second+200*time.Millisecond {
		t.Errorf("40 MiB took %v", d)
	}
	if y := g.Yielded(); y < 5700*time.Millisecond || y > 6*time.Second {
		t.Errorf("yielded for %v", y)
	}

	before := w.now
	for range 40 {
		if err := g.Ahead(ctx, 4*mib); err != nil {
			t.Fatal(err)
		}
	}
	if d := w.now.Sub(before); d < 9*time.Second || d > 10*time.Second {
		t.Errorf("160 MiB ahead took %v", d)
	}
	before = w.now
	for range 40 {
		if err := g.Write(ctx, mib, 16); err != nil {
			t.Fatal(err)
		}
	}
	if d := w.now.Sub(before); d < 500*time.Millisecond || d > 700*time.Millisecond {
		t.Errorf("40 MiB took %v at 16 times the floor", d)
	}

	// A disk that is slower than the floor: no more waiting on top.
	y := g.Yielded()
	for range 10 {
		w.now = w.now.Add(time.Second)
		if err := g.Write(ctx, mib, 1); err != nil {
			t.Fatal(err)
		}
	}
	if g.Yielded() != y {
		t.Errorf("below the floor, and yielded for %v more", g.Yielded()-y)
	}

	// The guest stops in the middle of a wait.
	if err := g.Write(ctx, 100*mib, 1); err != nil {
		t.Fatal(err)
	}
	slept := 0
	w.node.sleep = func(ctx context.Context, d time.Duration) error {
		if slept++; slept == 3 {
			g.load.InFlight = 0
		}
		w.now = w.now.Add(d)
		return ctx.Err()
	}
	before = w.now
	if err := g.Write(ctx, mib, 1); err != nil || w.now.Sub(before) > time.Second {
		t.Errorf("went on %v after the guest had stopped, %v", w.now.Sub(before), err)
	}
}

// TestCancelled: a wait ends with its context.
func TestCancelled(t *testing.T) {
	w := newWorld(t)
	g := w.add(0, 0)
	g.load.InFlight = 1
	ctx, cancel := context.WithCancel(t.Context())
	if err := g.Write(ctx, 1000*mib, 1); err != nil {
		t.Fatal(err)
	}
	cancel()
	before := w.now
	for name, err := range map[string]error{"write": g.Write(ctx, mib, 1), "ahead": g.Ahead(ctx, mib)} {
		if !errors.Is(err, context.Canceled) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if w.now.Sub(before) > time.Second {
		t.Errorf("waited for %v", w.now.Sub(before))
	}
	var none *Pacer = (*Node)(nil).Add(nil)
	if err := none.Write(ctx, mib, 1); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	if err := errors.Join(none.Write(t.Context(), mib, 1), none.Ahead(t.Context(), mib)); err != nil || none.Yielding() || none.Yielded() != 0 {
		t.Errorf("no pacing: %v", err)
	}
	none.Close()
}

// TestNeighbours: work holds back for other volumes' guests if these have much to do,
// and no volume's work gets in the way of another's floor.
func TestNeighbours(t *testing.T) {
	w := newWorld(t)
	idle, other := w.add(0, 0), w.add(0, 0)

	other.every, other.took = 100*time.Millisecond, 10*time.Millisecond // a tenth of a request in flight
	w.run(10*time.Second, idle, other)
	idle.between(t, "the neighbour has little to do", 10000, 10000)

	other.every, other.took = 10*time.Millisecond, 10*time.Millisecond // always one
	w.run(2*sampleEvery, idle, other)
	idle.pieces, other.pieces = 0, 0
	w.run(10*time.Second, idle, other)
	idle.between(t, "beside a busy volume", 40, 42)
	other.between(t, "busy", 40, 42)
	if !idle.Yielding() || !other.Yielding() {
		t.Error("a volume does not yield")
	}

	other.every = 0
	w.run(hold+2*sampleEvery, idle, other)
	idle.pieces, other.pieces = 0, 0
	w.run(time.Second, idle, other)
	idle.between(t, "idle both", 1000, 1000)
	other.between(t, "idle both", 1000, 1000)

	// Many that are busy: each has its floor.
	all := []*guest{idle, other}
	for range 20 {
		all = append(all, w.add(5*time.Millisecond, 20*time.Millisecond))
	}
	w.run(2*sampleEvery, all...)
	for _, g := range all {
		g.pieces = 0
	}
	w.run(10*time.Second, all...)
	for _, g := range all {
		g.between(t, "one of many", 39, 42)
	}

	// What has gone is not waited for.
	for _, g := range all[1:] {
		g.Close()
	}
	w.run(hold, idle)
	idle.pieces = 0
	w.run(time.Second, idle)
	idle.between(t, "the busy ones are gone", 1000, 1000)
}

// TestAfterARest: what guests did while nobody merged says nothing about now.
func TestAfterARest(t *testing.T) {
	w := newWorld(t)
	g, other := w.add(0, 0), w.add(0, 0)
	w.run(time.Second, g)
	w.now = w.now.Add(time.Hour)
	other.load.Took += time.Hour
	g.pieces = 0
	w.run(time.Second, g)
	g.between(t, "after an hour", 1000, 1000)
}

// TestForeign: work holds back for others on the disk, but never because of what it
// does itself.
func TestForeign(t *testing.T) {
	for _, c := range []struct {
		name                 string
		device, own, stalled float64 // a second: MiB, MiB, s
		floor                bool
	}{
		{"nothing", 0, 0, 0, false},
		{"ours alone, and all wait for it", 500, 500, 1, false},
		{"a little more than ours: the file system's journal", 503, 500, 1, false},
		{"others, but nobody waits", 500, 100, 0.05, false},
		{"others, and somebody waits", 500, 100, 0.5, true},
		{"others alone", 8, 0, 0.2, true},
		{"ours goes to another disk", 2, 500, 1, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := newWorld(t)
			start := w.now
			w.node.disk.read = func() (usage, error) {
				s := w.now.Sub(start).Seconds()
				return usage{device: int64(s * c.device * mib), own: int64(s * c.own * mib), stalled: time.Duration(s * c.stalled * 1e9)}, nil
			}
			g := w.add(0, 0)
			w.run(3*sampleEvery, g)
			g.pieces = 0
			w.run(10*time.Second, g)
			if c.floor {
				g.between(t, "yields", 40, 42)
			} else {
				g.between(t, "does not", 10000, 10000)
			}
			w.node.disk.read = func() (usage, error) { return usage{}, errors.New("gone") }
			w.run(hold, g)
			g.pieces = 0
			w.run(time.Second, g)
			g.between(t, "nothing to read any more", 1000, 1000)
		})
	}
}

// TestWriteback: what goes through the page cache is ours when the disk gets it later.
func TestWriteback(t *testing.T) {
	var u usage
	d := &disk{read: func() (usage, error) { return u, nil }}
	u.own, u.stalled = 50*mib, time.Second
	if d.crowded(time.Second) {
		t.Error("crowded by what the disk has not seen")
	}
	u.device, u.stalled = 50*mib, 2*time.Second
	if d.crowded(time.Second) {
		t.Error("crowded by what was written back")
	}
	u.device, u.stalled = 100*mib, 3*time.Second
	if !d.crowded(time.Second) {
		t.Error("not crowded by what nobody of us wrote")
	}
	// What never comes is forgotten, but for a part.
	u.own, u.stalled = 10000*mib, 4*time.Second
	d.crowded(time.Second)
	u.device, u.stalled = 200*mib, 5*time.Second
	if !d.crowded(time.Second) {
		t.Error("not crowded, because of what went elsewhere")
	}
}
