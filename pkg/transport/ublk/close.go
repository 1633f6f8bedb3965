package ublk

import (
	"context"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"

	"github.com/snapmerge/snapmerge/pkg/transport"
)

const (
	// settle is how long a device may look busy because udev is looking at it.
	settle = 2 * time.Second
	// pollUse is how often to look again; the kernel has no event for it.
	pollUse = 10 * time.Millisecond
	// orderlyEnd bounds each wait for the kernel while a device is taken down.
	orderlyEnd = 10 * time.Second
	// abortEnd is the same when it is taken down by force.
	abortEnd = 2 * time.Second
)

// closing is a Close under way; several callers may wait for it.
type closing struct {
	done chan struct{}
	err  error // valid once done is closed
}

// Close takes the device away, has the backend flush, and frees its number. An
// error of that flush is returned though the device is gone; a further Close then
// returns nil. If ctx ends once the device is being stopped the rest goes on, and
// Close may be called again to wait for it.
func (d *device) Close(ctx context.Context) error {
	d.mu.Lock()
	if d.gone {
		d.mu.Unlock()
		return nil
	}
	c := d.closing
	if c == nil {
		c = &closing{done: make(chan struct{})}
		d.closing = c
		go d.runClose(ctx, c)
	}
	d.mu.Unlock()
	var err error
	select {
	case <-c.done:
		err = c.err
	case <-ctx.Done():
		select {
		case <-c.done: // it has seen the end of ctx too, and knows more
			err = c.err
		case <-time.After(10 * pollUse):
			err = ctx.Err()
		}
	}
	if err != nil {
		return fmt.Errorf("ublk: close device of volume %q: %w", d.volume, err)
	}
	return nil
}

// runClose does the work of Close, which the kernel or the backend may hold up.
func (d *device) runClose(ctx context.Context, c *closing) {
	defer close(c.done)
	if c.err = d.waitUnused(ctx); c.err != nil {
		d.mu.Lock()
		defer d.mu.Unlock()
		d.closing = nil // it goes on serving
		d.noteFailureLocked()
		return
	}
	// What is dirty in the page cache of the device is written now.
	if c.err = d.stop(); c.err == nil {
		<-d.threadsDone
	}
	if err := d.b.Flush(); err != nil {
		c.err = errors.Join(c.err, fmt.Errorf("device is stopped, but its last flush failed: %w", err))
	}
	d.finish(orderlyEnd)
}

// waitUnused returns transport.ErrBusy if the device is in use and stays so.
func (d *device) waitUnused(ctx context.Context) error {
	for end := time.Now().Add(settle); ; {
		last := ctx.Err() != nil || time.Now().After(end)
		busy, err := d.inUse()
		if err != nil || !busy {
			return err
		}
		if last {
			return fmt.Errorf("%s: %w", d.Path(), transport.ErrBusy)
		}
		select {
		case <-ctx.Done():
		case <-time.After(pollUse):
		}
	}
}

// stop is STOP_DEV, which may hang.
func (d *device) stop() error {
	return unlessGone(withControl(func(c *control) error { return c.stop(d.id) }))
}

// unlessGone takes it for success that there is no such device.
func unlessGone(err error) error {
	if errors.Is(err, unix.ENODEV) {
		return nil
	}
	return err
}

// Abort answers all that is in flight with EIO and takes the device away. It
// takes seconds at most. Calls of the backend that do not return are left behind,
// and logged.
func (d *device) Abort() error {
	d.mu.Lock()
	d.aborted = true
	gone := d.gone
	d.mu.Unlock()
	if gone {
		return nil
	}
	for _, q := range d.queues {
		q.abort()
	}
	stopped := make(chan error, 1)
	go func() { stopped <- d.stop() }()
	var err error
	select {
	case err = <-stopped:
	case <-time.After(orderlyEnd):
		err = errors.New("the kernel does not stop the device")
	}
	if err == nil {
		select {
		case <-d.threadsDone:
		case <-time.After(abortEnd):
			err = errors.New("the kernel does not cancel the device's queues")
		}
	}
	d.finish(abortEnd)
	if err != nil {
		return fmt.Errorf("ublk: abort device of volume %q: %w", d.volume, err)
	}
	return nil
}

// finish makes everybody forget the device.
func (d *device) finish(patience time.Duration) {
	d.finishOnce.Do(func() {
		d.t.remove(d.volume, d.id, patience)
		d.mu.Lock()
		d.gone = true
		d.mu.Unlock()
		d.t.forget(d.volume)
	})
}

// remove frees the number of a device that is stopped, and its record. The
// kernel does it when the last user has closed the device; that is not waited
// for.
func (t *Transport) remove(volume string, id uint32, patience time.Duration) {
	removed := make(chan error, 1)
	go func() { removed <- unlessGone(withControl(func(c *control) error { return c.remove(id) })) }()
	select {
	case err := <-removed:
		if err != nil {
			klog.ErrorS(err, "Cannot remove a device", "volume", volume, "device", blockPath(id))
		}
	case <-time.After(patience):
		klog.InfoS("Device is in use and will be removed when closed", "volume", volume, "device", blockPath(id))
	}
	if err := t.records.drop(volume); err != nil {
		klog.ErrorS(err, "Cannot drop the record of a device", "volume", volume)
	}
}

// giveUp undoes a Create or Adopt.
func (d *device) giveUp() {
	if err := d.Abort(); err != nil {
		klog.ErrorS(err, "Cannot take down a device", "volume", d.volume)
	}
}
