package volume

import (
	"context"
	"errors"
	"sync/atomic"
	"time"
)

// Slots bounds how many merges run at once on a node. Who waits gets its turn: first
// come, first served, and who has merged for a while goes to the end of the queue if
// there is one.
type Slots struct {
	c       chan struct{}
	waiting atomic.Int64
	turn    time.Duration
}

// turnTime is long enough for many commits at the lowest rate, so that what a change
// costs does not count.
const turnTime = time.Minute

// errTurnOver is why the context of a turn has ended.
var errTurnOver = errors.New("others wait for their merge")

// NewSlots makes n slots; n < 1: no bound.
func NewSlots(n int) *Slots {
	if n < 1 {
		return nil
	}
	return &Slots{c: make(chan struct{}, n), turn: turnTime}
}

// acquire waits for a slot. The turn ends with ctx, or with the cause errTurnOver;
// release must be called then. A channel serves those who send to it in the order
// in which they came.
func (s *Slots) acquire(ctx context.Context) (turn context.Context, release func(), err error) {
	if s == nil {
		return ctx, func() {}, ctx.Err()
	}
	s.waiting.Add(1)
	defer s.waiting.Add(-1)
	select {
	case s.c <- struct{}{}:
	case <-ctx.Done():
		return nil, nil, ctx.Err()
	}
	turn, end := context.WithCancelCause(ctx)
	go s.limit(turn, end)
	return turn, func() { end(nil); <-s.c }, nil
}

// limit ends a turn when its time is over and somebody waits.
func (s *Slots) limit(turn context.Context, end context.CancelCauseFunc) {
	t := time.NewTicker(s.turn)
	defer t.Stop()
	for {
		select {
		case <-turn.Done():
			return
		case <-t.C:
			if s.waiting.Load() > 0 {
				end(errTurnOver)
			}
		}
	}
}
