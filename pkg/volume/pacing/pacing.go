// Package pacing keeps the background work of a node's volumes (merges and folds)
// out of the way of the pods: it runs at full speed while nobody else needs the
// disk, and at a floor rate while somebody does.
//
// # Who needs the disk
//
// The work itself keeps the disk busy, so what the kernel says of the disk as a
// whole must not be taken for the pods'. Three questions are asked, in this order;
// the first yes decides:
//
//  1. Has the volume's own guest a request in flight, or had it one within the last
//     100 ms? Requests are counted where they are served, so this is exact, and one
//     request is enough: it is this volume whose requests wait behind the work.
//  2. Do the guests of the node's volumes together have a quarter of a request in
//     flight on average? That is the time their answers took, over the time in which
//     they were given (Little's law): 10 requests a second of a millisecond each are
//     nothing, one program that always waits for an answer is 1. The volume's own
//     guest is idle by then, so these are the neighbours.
//  3. Did others move at least 4 MiB/s through the disk below the state directory
//     (/sys/dev/block/MAJ:MIN/stat), while somebody waited for I/O? What the disk
//     moved is known, and what this process did (/proc/self/io): the difference is
//     others'. Who waits is told by PSI (/proc/pressure/io, some) or, without it, by
//     the share of time in which the disk had requests in flight. Both know our own
//     I/O too, which is why they only confirm. Where there is no such file, as for
//     the anonymous devices of btrfs, the question is not asked.
//
// 2 and 3 are looked at ten times a second, by whoever works, and a yes holds for a
// second.
//
// # What happens then
//
// Before each piece of I/O (1 MiB) the work waits until it is due at the floor rate,
// or until nobody needs the disk any more. Pieces are rather large because each
// piece, whatever its size, can be in the way of one request of a guest that waits
// for its answers. What a merge reads and logs ahead has a floor of its own, four
// times as high: it comes to twice of what is written, and must never be what the
// merge waits for.
//
// The floor is each volume's own, so no volume's work waits for another's. Nothing
// here stops work altogether.
//
// The idle class of I/O priorities (ioprio_set) is not used: only the BFQ scheduler
// and, in part, mq-deadline know it, while disks of today mostly have none, and where
// it counts it starves the work altogether.
package pacing

import (
	"context"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// DefaultFloor is in MiB/s.
	DefaultFloor = 4

	// grace is how long after a request of its guest a volume's work holds back.
	grace = 100 * time.Millisecond
	// lookEvery is how often work that waits asks again.
	lookEvery = 25 * time.Millisecond
	// sampleEvery is how often the node is looked at, sampleMost how long a sample
	// may take to mean anything, and hold for how long a crowded node is believed to
	// be so.
	sampleEvery = 100 * time.Millisecond
	sampleMost  = time.Second
	hold        = time.Second
	// crowd is how many requests the node's guests have in flight, on average, when
	// neighbours hold back.
	crowd = 0.25
	// aheadTimes is how much higher the floor of reading and logging ahead is.
	aheadTimes = 4
)

// Load is what the guest of a volume has asked for since the volume was opened.
type Load struct {
	InFlight int64         // requests that are not answered yet
	Done     uint64        // those that are
	Took     time.Duration // the times these took, added up
}

// Node has the volumes of a node, whose work shares a disk.
type Node struct {
	floor int64 // bytes per second
	disk  *disk

	now   func() time.Time
	sleep func(context.Context, time.Duration) error

	mu      sync.Mutex
	pacers  map[*Pacer]struct{}
	took    time.Duration // of all loads, when sampled
	sampled time.Time
	crowded time.Time // the node is, until then
}

// NewNode makes a node whose volumes lie in dir, where background work goes on with
// at least floor MiB/s for each of them; 0: DefaultFloor.
func NewNode(dir string, floor int) *Node {
	if floor == 0 {
		floor = DefaultFloor
	}
	return &Node{floor: int64(floor) << 20, disk: newDisk(dir), now: time.Now, sleep: sleep, pacers: map[*Pacer]struct{}{}}
}

// SetClock replaces the clock, for tests. It comes before anything else.
func (n *Node) SetClock(now func() time.Time, sleep func(context.Context, time.Duration) error) {
	n.now, n.sleep = now, sleep
}

func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-t.C:
		return nil
	}
}

// Pacer paces the work of one volume. A nil Pacer holds nothing back.
type Pacer struct {
	node *Node
	load func() Load

	// node.mu must be held for these.
	done         uint64    // requests, at the last look
	seen         time.Time // when there was a request last
	write, ahead time.Time // when the next piece is due at the floor

	yielding atomic.Bool
	yielded  atomic.Int64 // ns
}

// Add adds a volume. load must be quick: it is called before each piece of work of any
// volume. A nil Node returns a nil Pacer.
func (n *Node) Add(load func() Load) *Pacer {
	if n == nil {
		return nil
	}
	p := &Pacer{node: n, load: load}
	n.mu.Lock()
	defer n.mu.Unlock()
	p.done = load().Done
	n.pacers[p] = struct{}{}
	n.sampled = time.Time{} // the sum of the loads has changed
	return p
}

// Close takes the volume away.
func (p *Pacer) Close() {
	if p == nil {
		return
	}
	p.node.mu.Lock()
	defer p.node.mu.Unlock()
	delete(p.node.pacers, p)
	p.node.sampled = time.Time{}
}

// Write waits until n bytes may be written, for as long as the floor allows; times
// is how often as high as usual the floor is, at least 1. It fails only if ctx ends.
func (p *Pacer) Write(ctx context.Context, n, times int) error {
	if p == nil {
		return ctx.Err()
	}
	start := p.node.now()
	waited, err := p.wait(ctx, &p.write, n, times)
	if waited {
		p.yielded.Add(int64(p.node.now().Sub(start)))
	}
	return err
}

// Ahead waits until n bytes may be read or logged for what is written later.
func (p *Pacer) Ahead(ctx context.Context, n int) error {
	if p == nil {
		return ctx.Err()
	}
	_, err := p.wait(ctx, &p.ahead, n, aheadTimes)
	return err
}

func (p *Pacer) wait(ctx context.Context, due *time.Time, n, times int) (waited bool, err error) {
	cost := time.Duration(float64(n) / float64(p.node.floor*int64(times)) * float64(time.Second))
	for {
		d := p.node.until(p, due, cost)
		if d <= 0 {
			return waited, ctx.Err()
		}
		waited = true
		if err := p.node.sleep(ctx, min(d, lookEvery)); err != nil {
			return waited, err
		}
	}
}

// until returns how long work has to hold back if nothing changes. If it need not,
// a piece of work begins, and the next one is due after cost.
func (n *Node) until(p *Pacer, due *time.Time, cost time.Duration) time.Duration {
	n.mu.Lock()
	defer n.mu.Unlock()
	now := n.now()
	busy := n.busyLocked(p, now)
	p.yielding.Store(busy)
	switch late := now.Add(-cost); {
	case !busy:
		*due = now
	case now.Before(*due):
		return due.Sub(now)
	case due.Before(late):
		*due = late // what was late is made up for, but no more than one piece
	}
	*due = due.Add(cost)
	return 0
}

// busyLocked tells whether somebody needs the disk more than p. n.mu must be held.
func (n *Node) busyLocked(p *Pacer, now time.Time) bool {
	n.sampleLocked(now)
	l := p.load()
	if l.InFlight > 0 || l.Done != p.done {
		p.done, p.seen = l.Done, now
	}
	return now.Sub(p.seen) < grace || now.Before(n.crowded)
}

// sampleLocked looks at the node if it is time to. n.mu must be held.
func (n *Node) sampleLocked(now time.Time) {
	span := now.Sub(n.sampled)
	if span < sampleEvery {
		return
	}
	var took time.Duration
	for p := range n.pacers {
		took += p.load().Took
	}
	before := n.took
	n.took, n.sampled = took, now
	foreign := n.disk.crowded(span)
	if span > sampleMost {
		return // nobody was at work; there is nothing to compare with
	}
	if foreign || float64(took-before) >= crowd*float64(span) {
		n.crowded = now.Add(hold)
	}
}

// Yielding tells whether work was held back at the last look.
func (p *Pacer) Yielding() bool { return p != nil && p.yielding.Load() }

// Yielded is how long work has waited for others in all.
func (p *Pacer) Yielded() time.Duration {
	if p == nil {
		return 0
	}
	return time.Duration(p.yielded.Load())
}
