package volume

import (
	"context"
	"errors"
	"testing"
	"time"
)

func never() bool { return false }

// TestTurns: a merge that has its slot for long lets those who wait go first, with
// all committed that it has written, and goes on after them.
func TestTurns(t *testing.T) {
	slots := NewSlots(1)
	slots.turn = 0
	first, want := mergingVolume(t, Config{Slots: slots})
	second, _ := mergingVolume(t, Config{Slots: slots})
	done := make(chan error, 1)
	began := false
	first.onPace = func(context.Context) {
		if began {
			return
		}
		began = true
		go func() { done <- finish(second, want) }()
		for slots.waiting.Load() == 0 {
			time.Sleep(time.Millisecond)
		}
	}
	if more, err := first.Step(t.Context()); !more || err != nil {
		t.Fatalf("the end of a turn: more %v, %v", more, err)
	}
	s := first.Status()
	if s.BytesDone == 0 || s.BytesDone == s.BytesTotal || s.State != Merging || s.Error != "" {
		t.Errorf("after its turn: %+v", s)
	}
	if written := first.Counters().MergeWritten; written != uint64(s.BytesDone) {
		t.Errorf("%d bytes are written, %d committed", written, s.BytesDone)
	}
	if err := <-done; err != nil {
		t.Errorf("who waited: %v", err)
	}
	if err := finish(first, want); err != nil {
		t.Error(err)
	}
}

// TestUrgent: who has to get on takes no slot, from the start or while it waits.
func TestUrgent(t *testing.T) {
	slots := NewSlots(1)
	slots.look = time.Millisecond
	_, release, err := slots.acquire(t.Context(), never)
	if err != nil {
		t.Fatal(err)
	}
	defer release()
	for after := range 3 {
		asked := 0
		turn, unneeded, err := slots.acquire(t.Context(), func() bool { asked++; return asked > after })
		if err != nil || turn.over() || asked != after+1 {
			t.Errorf("asked %d times, over %v, %v", asked, turn.over(), err)
		}
		unneeded()
	}
	if len(slots.c) != 1 || slots.waiting.Load() != 0 {
		t.Errorf("%d slots are taken, %d wait", len(slots.c), slots.waiting.Load())
	}
}

// TestGivesUp: who gives up waiting is not waited for, and takes no slot.
func TestGivesUp(t *testing.T) {
	slots := NewSlots(1)
	_, release, err := slots.acquire(t.Context(), never)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, _, err := slots.acquire(ctx, never); !errors.Is(err, context.Canceled) {
		t.Errorf("a second one in a single slot: %v", err)
	}
	if n := slots.waiting.Load(); n != 0 {
		t.Errorf("%d wait", n)
	}
	release()
	if _, release, err = slots.acquire(t.Context(), never); err != nil {
		t.Fatal(err)
	}
	release()
}

// TestWaitingIsNotStalled: who waits for a slot has nothing to get done.
func TestWaitingIsNotStalled(t *testing.T) {
	slots := NewSlots(1)
	_, release, err := slots.acquire(t.Context(), never)
	if err != nil {
		t.Fatal(err)
	}
	v, want := mergingVolume(t, Config{Slots: slots, StalledAfter: time.Minute})
	stepped := make(chan error, 1)
	go func() {
		_, err := v.Step(t.Context())
		stepped <- err
	}()
	for slots.waiting.Load() == 0 {
		time.Sleep(time.Millisecond)
	}
	if s := v.status(time.Now().Add(time.Hour)); s.State != Merging || s.Error != "" || s.RateMiB != 0 {
		t.Errorf("while it waits: %+v", s)
	}
	release()
	if err := <-stepped; err != nil {
		t.Error(err)
	}
	if err := finish(v, want); err != nil {
		t.Error(err)
	}
}
