package keeper

import (
	"errors"
	"testing"
	"time"
)

func TestFreezeHere(t *testing.T) {
	dir := mountExt4(t)
	f, err := FreezeHere(t.Context(), "a", int(dir.Fd()), maxFreeze)
	if err != nil {
		t.Fatal(err)
	}
	if !isFrozen(t, dir) {
		t.Error("not frozen")
	}
	if err := f.Thaw(t.Context()); err != nil {
		t.Error(err)
	}
	if isFrozen(t, dir) {
		t.Error("still frozen")
	}
}

func TestFreezeHereIsBroken(t *testing.T) {
	dir := mountExt4(t)
	f, err := FreezeHere(t.Context(), "a", int(dir.Fd()), time.Millisecond)
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "the watchdog thaws", func() bool { return !isFrozen(t, dir) })
	if err := f.Thaw(t.Context()); !errors.Is(err, ErrBroken) {
		t.Errorf("thaw of a broken freeze: %v", err)
	}
}
