// Package pacing keeps the background work of a node's volumes (merges and folds)
// out of the way of the pods: it runs at full speed while nobody else needs the
// disk, at a floor rate while somebody does, and in between while the volume's own
// guest needs it now and then.
//
// # Who needs the disk
//
// The work itself keeps the disk busy, so what the kernel says of the disk as a
// whole must not be taken for the pods'. Three questions are asked, in this order;
// the first yes decides:
//
//  1. Has the volume's own guest a request in flight? Requests are counted where they
//     are served, so this is exact, and one request is enough: it is this volume whose
//     requests wait behind the work.
//  2. Do the guests of the node's volumes together have a quarter of a request in
//     flight on average? That is the time their answers took, over the time in which
//     they were given (Little's law): 10 requests a second of a millisecond each are
//     nothing, one program that always waits for an answer is nearly 1. What a request
//     takes between the guest and here is not seen; 0.4 ms are counted for it.
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
// If nobody does, it still matters how much the volume's own guest does between its
// pauses: the number of its requests in flight on average, too. It is that of the last
// tenth of a second, or what was found before if that is more, which fades by two
// thirds every fifth of a second.
//
// # What happens then
//
// Before each piece of I/O (1 MiB) the work waits until it is due at its rate, or until
// nobody needs the disk any more. After a yes the rate is the floor. Else it is the
// floor times the quarter of a request divided by the guest's own: with 100 requests a
// second that take 0.2 ms each, so 0.06 in flight, it is 4 times the floor, with 10 of
// them 40 times. If the work makes these requests take
// longer the guest has more of them in flight, and the work slows down, until both have
// their share: so it need not be known how long they would take without it. Pieces are rather large because each
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
	"math"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// DefaultFloor is in MiB/s.
	DefaultFloor = 4

	// lookEvery is how often work that waits asks again.
	lookEvery = 25 * time.Millisecond
	// sampleEvery is how often the node is looked at, sampleMost how long a sample
	// may take to mean anything, and hold for how long a crowded node is believed to
	// be so.
	sampleEvery = 100 * time.Millisecond
	sampleMost  = time.Second
	hold        = time.Second
	// crowd is how many requests the node's guests have in flight, on average, when
	// neighbours hold back. A guest that has so many keeps its own volume's work at
	// the floor, and one that has no more than quiet does not hold it back at all.
	crowd = 0.25
	quiet = crowd / 64
	// perRequest is what a request takes on its way to us and back, on machines with
	// something to do.
	perRequest = 400 * time.Microsecond
	// fade is how long it takes until a guest is believed to have a third of the
	// requests in flight that it had.
	fade = 200 * time.Millisecond
	// aheadTimes is how much higher the floor of reading and logging ahead is.
	aheadTimes = 4
)

// Load is what the guest of a volume has asked for since the volume was opened.
type Load struct {
	InFlight int64         // requests that are not answered yet
	Done     uint64        // those that are
	Took     time.Duration // the times these took, added up
}

// busy is the time of its guest that requests have taken.
func (l Load) busy() time.Duration { return l.Took + time.Duration(l.Done)*perRequest }

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
	took         time.Duration // of the guest's requests, when sampled
	sampled      time.Time
	share        float64 // requests of the guest in flight, lately
	write, ahead piece   // the last ones

	yielding atomic.Bool
	yielded  atomic.Int64 // ns
}

// piece is a piece of work.
type piece struct {
	due  time.Time     // when it was
	cost time.Duration // after which the next one is, at the floor
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
	p.took, p.sampled = load().busy(), n.now()
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

func (p *Pacer) wait(ctx context.Context, last *piece, n, times int) (waited bool, err error) {
	cost := time.Duration(float64(n) / float64(p.node.floor*int64(times)) * float64(time.Second))
	for {
		d := p.node.until(p, last, cost)
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
// a piece of work begins, and the next one is due after cost at the floor.
func (n *Node) until(p *Pacer, last *piece, cost time.Duration) time.Duration {
	n.mu.Lock()
	defer n.mu.Unlock()
	now := n.now()
	times := n.timesLocked(p, now)
	p.yielding.Store(times > 0)
	if times == 0 {
		*last = piece{now, cost}
		return 0
	}
	due := last.due.Add(time.Duration(float64(last.cost) / times))
	if now.Before(due) {
		return due.Sub(now)
	}
	// What was late is made up for, but no more than one piece.
	if late := now.Add(-time.Duration(float64(cost) / times)); due.Before(late) {
		due = late
	}
	*last = piece{due, cost}
	return 0
}

// timesLocked is how often as high as the floor the rate of p's work is; 0: it has no
// limit. n.mu must be held.
func (n *Node) timesLocked(p *Pacer, now time.Time) float64 {
	n.sampleLocked(now)
	l := p.load()
	share := p.shareLocked(l, now)
	switch {
	case l.InFlight > 0 || now.Before(n.crowded):
		return 1
	case share <= quiet:
		return 0
	}
	return max(1, crowd/share)
}

// shareLocked is how many requests the guest has in flight on average, lately; 1 at the
// most. node.mu must be held.
func (p *Pacer) shareLocked(l Load, now time.Time) float64 {
	took, span := l.busy()-p.took, now.Sub(p.sampled)
	// As much as a whole sample at least: a guest that begins is noticed before that.
	found := min(1, float64(took)/float64(max(span, sampleEvery)))
	if span < sampleEvery {
		return max(p.share, found)
	}
	p.took, p.sampled = l.busy(), now
	p.share = max(found, p.share*math.Exp(-float64(span)/float64(fade)))
	return p.share
}

// sampleLocked looks at the node if it is time to. n.mu must be held.
func (n *Node) sampleLocked(now time.Time) {
	span := now.Sub(n.sampled)
	if span < sampleEvery {
		return
	}
	var took time.Duration
	for p := range n.pacers {
		took += p.load().busy()
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
