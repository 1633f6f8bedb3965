package transport

import (
	"context"
	"fmt"
	"sync"
	"time"
)

const (
	// settle is how long a device may look busy because udev is looking at it.
	settle = 2 * time.Second
	// pollUse is how often to look again; the kernel has no event for it.
	pollUse = 10 * time.Millisecond
	// lastWord is how long Close waits, once its context has ended, for what knows
	// better how it ended.
	lastWord = 100 * time.Millisecond
)

// Lifecycle is how a device ends: it is closed, taken away by force, or it dies
// though nobody asked for it. Transports share it; make it with NewLifecycle.
type Lifecycle struct {
	onFailure func()
	failed    chan struct{}

	mu      sync.Mutex
	dead    bool     // the device has ended, whoever brought it about
	closing *closing // the Close under way, or the one that took it away
	aborted bool     // somebody is taking it away by force
	gone    bool     // nothing is left of it
}

// closing is a Close under way; several callers may wait for it.
type closing struct {
	done chan struct{}
	err  error // valid once done is closed
}

// NewLifecycle makes that of a device in service. onFailure is called once if it
// dies though nobody asked for it.
func NewLifecycle(onFailure func()) *Lifecycle {
	return &Lifecycle{onFailure: onFailure, failed: make(chan struct{})}
}

// Failed is closed when the device is dead though nobody closed it.
func (l *Lifecycle) Failed() <-chan struct{} { return l.failed }

// Close is that of a Device. detach takes the device away from its users, or
// fails and leaves it in service; end does all that follows and cannot be undone.
// They run once, however many callers there are, and go on when ctx ends. If end
// fails and leaves something of the device the next Close runs both again.
func (l *Lifecycle) Close(ctx context.Context, detach func(context.Context) error, end func() error) error {
	l.mu.Lock()
	if l.gone {
		l.mu.Unlock()
		return nil
	}
	c := l.closing
	if c == nil {
		c = &closing{done: make(chan struct{})}
		l.closing = c
		go l.run(ctx, c, detach, end)
	}
	l.mu.Unlock()
	select {
	case <-c.done:
		return c.err
	case <-ctx.Done():
		select {
		case <-c.done: // it has seen the end of ctx too, and knows more
			return c.err
		case <-time.After(lastWord):
			return ctx.Err()
		}
	}
}

// run does the work of Close, which the kernel or the backend may hold up.
func (l *Lifecycle) run(ctx context.Context, c *closing, detach func(context.Context) error, end func() error) {
	defer close(c.done)
	if c.err = detach(ctx); c.err == nil {
		c.err = end()
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if c.err == nil || l.gone {
		return
	}
	l.closing = nil // it goes on serving, or what is left of it is to be taken away yet
	l.noteFailureLocked()
}

// Die notes that the device has ended.
func (l *Lifecycle) Die() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.dead = true
	l.noteFailureLocked()
}

// noteFailureLocked closes failed if the device has ended and nobody is ending
// it. mu must be held.
func (l *Lifecycle) noteFailureLocked() {
	if !l.dead || l.closing != nil || l.aborted {
		return
	}
	select {
	case <-l.failed:
	default:
		l.onFailure()
		close(l.failed)
	}
}

// Abort notes that the device is being taken away by force, and tells whether
// nothing is left of it anyway.
func (l *Lifecycle) Abort() (gone bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.aborted = true
	return l.gone
}

// SetGone notes that nothing is left of the device.
func (l *Lifecycle) SetGone() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.gone = true
}

// UnlessGone calls f unless SetGone was called, which waits for it.
func (l *Lifecycle) UnlessGone(f func() error) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.gone {
		return nil
	}
	return f()
}

// Ended tells whether the device has died or is gone.
func (l *Lifecycle) Ended() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.dead || l.gone
}

// WaitUnused tries until a device is not busy any more, for the two seconds in
// which udev may be looking at it or until ctx ends; then it returns ErrBusy. try
// is told when it is called for the last time.
func WaitUnused(ctx context.Context, path string, try func(last bool) (busy bool, err error)) error {
	for end := time.Now().Add(settle); ; {
		last := ctx.Err() != nil || time.Now().After(end)
		busy, err := try(last)
		if err != nil || !busy {
			return err
		}
		if last {
			return fmt.Errorf("%s: %w", path, ErrBusy)
		}
		select {
		case <-ctx.Done():
		case <-time.After(pollUse):
		}
	}
}
