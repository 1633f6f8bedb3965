package transport

import (
	"context"
	"errors"
	"fmt"
	"io"
	"testing"

	"golang.org/x/sys/unix"
)

// TestLifecycle: a device that dies has failed, unless somebody is ending it.
func TestLifecycle(t *testing.T) {
	fine := func() error { return nil }
	broken := func() error { return io.EOF }
	detach := func(err error) func(context.Context) error {
		return func(context.Context) error { return err }
	}
	for _, tt := range []struct {
		name  string
		do    func(l *Lifecycle) error
		fails bool
		want  error
	}{
		{"dies", func(l *Lifecycle) error { l.Die(); l.Die(); return nil }, true, nil},
		{"aborted", func(l *Lifecycle) error { l.Abort(); l.Die(); return nil }, false, nil},
		{"closed", func(l *Lifecycle) error { err := l.Close(t.Context(), detach(nil), fine); l.Die(); return err }, false, nil},
		{"busy", func(l *Lifecycle) error { return l.Close(t.Context(), detach(ErrBusy), fine) }, false, ErrBusy},
		{"dies while busy", func(l *Lifecycle) error {
			return l.Close(t.Context(), func(context.Context) error { l.Die(); return ErrBusy }, fine)
		}, true, ErrBusy},
		{"closed after busy", func(l *Lifecycle) error {
			_ = l.Close(t.Context(), detach(ErrBusy), fine)
			return l.Close(t.Context(), detach(nil), fine)
		}, false, nil},
		{"closed after an end that failed", func(l *Lifecycle) error {
			_ = l.Close(t.Context(), detach(nil), broken)
			return l.Close(t.Context(), detach(nil), fine)
		}, false, nil},
		{"dies in an end that fails", func(l *Lifecycle) error {
			return l.Close(t.Context(), detach(nil), func() error { l.Die(); return io.EOF })
		}, true, io.EOF},
		{"dies after an end that failed", func(l *Lifecycle) error {
			err := l.Close(t.Context(), detach(nil), broken)
			l.Die()
			return err
		}, true, io.EOF},
		{"gone though its end failed", func(l *Lifecycle) error {
			_ = l.Close(t.Context(), detach(nil), func() error { l.SetGone(); return io.EOF })
			l.Die()
			return l.Close(t.Context(), detach(nil), broken)
		}, false, nil},
		{"gone", func(l *Lifecycle) error {
			l.SetGone()
			return errors.Join(l.Close(t.Context(), detach(ErrBusy), fine), l.UnlessGone(func() error { return ErrBusy }))
		}, false, nil},
	} {
		failures := 0
		l := NewLifecycle(func() { failures++ })
		if err := tt.do(l); !errors.Is(err, tt.want) {
			t.Errorf("%s: %v, want %v", tt.name, err, tt.want)
		}
		failed := false
		select {
		case <-l.Failed():
			failed = true
		default:
		}
		if failed != tt.fails || failures != map[bool]int{true: 1}[tt.fails] {
			t.Errorf("%s: failed %v, reported %d times", tt.name, failed, failures)
		}
	}
}

// TestCloseGoesOn: the end of a caller's context is not the end of the work.
func TestCloseGoesOn(t *testing.T) {
	l := NewLifecycle(func() {})
	release := make(chan struct{})
	ends := 0
	end := func() error { <-release; ends++; return nil }
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := l.Close(ctx, func(context.Context) error { return nil }, end); !errors.Is(err, context.Canceled) {
		t.Errorf("first: %v", err)
	}
	close(release)
	if err := l.Close(t.Context(), nil, nil); err != nil || ends != 1 {
		t.Errorf("second: %v, ended %d times", err, ends)
	}
}

func TestWaitUnused(t *testing.T) {
	tries, late := 0, false // late: the machine stood still for so long that there was no third try
	if err := WaitUnused(t.Context(), "x", func(last bool) (bool, error) {
		tries++
		late = late || last
		return tries < 3 && !last, nil
	}); err != nil || tries != 3 && !late {
		t.Errorf("%v after %d tries", err, tries)
	}
	over, cancel := context.WithCancel(t.Context())
	cancel()
	if err := WaitUnused(over, "x", func(last bool) (bool, error) { return !last, nil }); err != nil {
		t.Errorf("not told that it is the last try: %v", err)
	}
	if err := WaitUnused(over, "x", func(bool) (bool, error) { return true, nil }); !errors.Is(err, ErrBusy) {
		t.Errorf("busy: %v", err)
	}
	if err := WaitUnused(over, "x", func(bool) (bool, error) { return true, io.EOF }); err != io.EOF {
		t.Errorf("error: %v", err)
	}
}

func TestRegistry(t *testing.T) {
	var r Registry
	for i, want := range []bool{true, false} {
		if err := r.reserve("a"); (err == nil) != want {
			t.Errorf("reserve %d: %v", i, err)
		}
	}
	if err := r.reserve(""); err == nil {
		t.Error("reserved the empty id")
	}
	if !r.Has("a") || r.Has("b") || r.Len() != 1 {
		t.Errorf("%+v", r.volumes)
	}
	r.Forget("a")
	if r.Has("a") || r.reserve("a") != nil {
		t.Error("not forgotten")
	}
}

// TestServeRanges: nothing beyond the volume reaches the backend.
func TestServeRanges(t *testing.T) {
	p := make([]byte, BlockSize)
	for _, tt := range []struct {
		r        Request
		readOnly bool
		want     error
	}{
		{Request{Op: OpRead, N: BlockSize}, true, nil},
		{Request{Op: OpFlush, Off: 1 << 40}, true, nil},
		{Request{Op: OpRead, Off: BlockSize, N: BlockSize}, false, ErrRange},
		{Request{Op: OpRead, Off: 512, N: BlockSize}, false, ErrRange},
		{Request{Op: OpZero, Off: -512, N: 512}, false, ErrRange},
		{Request{Op: OpZero, N: 1<<63 - 1}, false, ErrRange},
		{Request{Op: OpWrite, N: BlockSize}, true, unix.EROFS},
		{Request{Op: OpZero, N: BlockSize}, true, unix.EROFS},
	} {
		if err := Serve(TryBackend{}, tt.readOnly, tt.r, p); !errors.Is(err, tt.want) {
			t.Errorf("%+v: %v, want %v", tt.r, err, tt.want)
		}
	}
}

func TestErrno(t *testing.T) {
	for err, want := range map[error]unix.Errno{
		unix.ENOSPC:                              unix.ENOSPC,
		fmt.Errorf("write log: %w", unix.EDQUOT): unix.EDQUOT,
		ErrRange:                                 unix.EIO,
		unix.Errno(512):                          unix.EIO,
	} {
		if got := Errno(err); got != want {
			t.Errorf("%v: %v, want %v", err, got, want)
		}
	}
}
