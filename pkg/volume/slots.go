package volume

import (
	"context"
	"sync/atomic"
	"time"
)

// DefaultMergeConcurrency keeps the memory of a node's merges below 200 MiB, and
// their floors together from being more than pods can bear.
const DefaultMergeConcurrency = 4

// Slots bounds how many merges run at once on a node. Who waits gets its turn: first
// come, first served, and who has merged for a while goes to the end of the queue if
// there is one.
type Slots struct {
	c       chan struct{}
	waiting atomic.Int64
	turn    time.Duration
	look    time.Duration // between two questions whether it is urgent
}

// turnTime is long enough for many commits at the lowest rate, so that what a change
// costs does not count.
const turnTime = time.Minute

// NewSlots makes n slots; n < 1: no bound.
func NewSlots(n int) *Slots {
	if n < 1 {
		return nil
	}
	return &Slots{c: make(chan struct{}, n), turn: turnTime, look: time.Second}
}

// turn is the time for which a merge has a slot. A nil turn has no end.
type turn struct {
	slots *Slots
	end   time.Time
}

// acquire waits for a slot, or until it is urgent, which takes none. release gives
// it back. A channel serves those who send to it in the order in which they came.
func (s *Slots) acquire(ctx context.Context, urgent func() bool) (t *turn, release func(), err error) {
	if s == nil || urgent() {
		return nil, func() {}, ctx.Err()
	}
	s.waiting.Add(1)
	defer s.waiting.Add(-1)
	look := time.NewTicker(s.look)
	defer look.Stop()
	for {
		select {
		case s.c <- struct{}{}:
			return &turn{s, time.Now().Add(s.turn)}, func() { <-s.c }, nil
		case <-ctx.Done():
			return nil, nil, ctx.Err()
		case <-look.C:
			if urgent() {
				return nil, func() {}, nil
			}
		}
	}
}

// over tells whether somebody else should have the slot.
func (t *turn) over() bool {
	return t != nil && t.slots.waiting.Load() > 0 && !time.Now().Before(t.end)
}
