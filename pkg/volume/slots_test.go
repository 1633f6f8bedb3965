package volume

import (
	"context"
	"errors"
	"testing"
	"time"
)

// TestTurns: a merge that has its slot for long lets those who wait go first, and
// goes on after them.
func TestTurns(t *testing.T) {
	slots := NewSlots(1)
	slots.turn = time.Millisecond
	first, want := mergingVolume(t, Config{Slots: slots})
	second, _ := mergingVolume(t, Config{Slots: slots})
	done := make(chan error, 1)
	began := false
	first.onPace = func(ctx context.Context) {
		if began {
			return
		}
		began = true
		go func() { done <- finish(second, want) }()
		<-ctx.Done() // which nothing but the end of the turn brings
		if cause := context.Cause(ctx); !errors.Is(cause, errTurnOver) {
			t.Errorf("the turn ended with %v", cause)
		}
	}
	if more, err := first.Step(t.Context()); !more || err != nil {
		t.Fatalf("the end of a turn: more %v, %v", more, err)
	}
	if s := first.Status(); s.BytesDone == s.BytesTotal || s.State != Merging || s.Error != "" {
		t.Errorf("after its turn: %+v", s)
	}
	if err := <-done; err != nil {
		t.Errorf("who waited: %v", err)
	}
	if err := finish(first, want); err != nil {
		t.Error(err)
	}
}

// TestGivesUp: who gives up waiting is not waited for, and takes no slot.
func TestGivesUp(t *testing.T) {
	slots := NewSlots(1)
	_, release, err := slots.acquire(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, _, err := slots.acquire(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("a second one in a single slot: %v", err)
	}
	if n := slots.waiting.Load(); n != 0 {
		t.Errorf("%d wait", n)
	}
	release()
	if _, release, err = slots.acquire(t.Context()); err != nil {
		t.Fatal(err)
	}
	release()
}
