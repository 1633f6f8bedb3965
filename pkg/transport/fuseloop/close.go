package fuseloop

import (
	"context"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"

	"github.com/snapmerge/snapmerge/pkg/transport"
)

// Close detaches the loop device, has the backend flush, and ends the
// connection. An error of that flush is returned though the device is gone; a
// further Close then returns nil. If ctx ends once the device is detached the
// rest goes on, and Close may be called again to wait for it.
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
		case <-time.After(10 * pollLoop):
			err = ctx.Err()
		}
	}
	if err != nil {
		return fmt.Errorf("fuse: close device of volume %q: %w", d.volume, err)
	}
	return nil
}

// runClose does the work of Close, which the kernel or the backend may hold up.
func (d *device) runClose(ctx context.Context, c *closing) {
	defer close(c.done)
	if c.err = d.detach(ctx); c.err != nil {
		d.mu.Lock()
		defer d.mu.Unlock()
		d.closing = nil // it goes on serving
		d.noteFailureLocked()
		return
	}
	// The kernel lets go of the file when it is through with it.
	select {
	case <-d.srv.released:
	case <-d.readersDone:
	case <-time.After(orderlyEnd):
		klog.InfoS("The kernel has not released the file", "volume", d.volume, "device", d.Path())
	}
	if err := d.srv.backend.Flush(); err != nil {
		c.err = fmt.Errorf("device is detached, but its last flush failed: %w", err)
	}
	if err := d.end(orderlyEnd); err != nil {
		c.err = errors.Join(c.err, err)
	}
}

// detach takes the file out of the loop device, or returns transport.ErrBusy and
// leaves it as it was.
func (d *device) detach(ctx context.Context) error {
	for end := time.Now().Add(settle); ; {
		last := ctx.Err() != nil || time.Now().After(end)
		busy, err := d.tryDetach(ctx, last)
		if errors.Is(err, errNotOurs) {
			return nil // it is gone already
		}
		if err != nil || !busy {
			return err
		}
		if last {
			return fmt.Errorf("%s: %w", d.Path(), transport.ErrBusy)
		}
		select {
		case <-ctx.Done():
		case <-time.After(pollLoop):
		}
	}
}

// tryDetach is one try, which the end of ctx does not cut short: it would leave
// open how it ended.
func (d *device) tryDetach(ctx context.Context, last bool) (busy bool, err error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), orderlyEnd)
	defer cancel()
	return d.run(ctx, step{Do: doDetach, Last: last}, -1)
}

// Abort ends the connection and detaches the loop device, at once or when its
// last user has closed it. It takes seconds at most; readers that the backend
// does not let go are left behind, and logged.
func (d *device) Abort() error {
	d.mu.Lock()
	d.aborted = true
	d.mu.Unlock()
	if err := d.end(abortEnd); err != nil {
		return fmt.Errorf("fuse: abort device of volume %q: %w", d.volume, err)
	}
	return nil
}

// abortConn aborts the connection unless the mount may be closed: then the
// number could be somebody else's.
func (d *device) abortConn() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.gone {
		return nil
	}
	return abortConn(d.conn.id)
}

// end ends the connection first and then all the rest. It may be called twice
// and at the same time by Close and Abort.
func (d *device) end(patience time.Duration) error {
	if err := d.abortConn(); err != nil {
		return err
	}
	discarded := make(chan struct{})
	go func() {
		defer close(discarded)
		if busy, err := d.loop.discard(); err != nil {
			klog.ErrorS(err, "Cannot detach the loop device", "volume", d.volume)
		} else if busy {
			klog.InfoS("Device is in use and will be detached when closed", "volume", d.volume, "device", d.Path())
		}
	}()
	wait, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	select {
	case <-d.readersDone:
	case <-wait.Done():
		klog.InfoS("Left readers behind: the backend does not return", "volume", d.volume, "calls", d.srv.inBackend.Load())
	}
	select {
	case <-discarded:
	case <-wait.Done():
		klog.InfoS("The kernel does not let the loop device go", "volume", d.volume, "device", d.Path())
	}
	d.finish(patience)
	return nil
}

// finish makes everybody forget the device.
func (d *device) finish(patience time.Duration) {
	d.finishOnce.Do(func() {
		d.withdraw(patience)
		d.mu.Lock()
		d.gone = true
		d.mu.Unlock()
		d.resizeMu.Lock()
		unix.Close(d.conn.mount)
		d.conn.mount = -1
		d.resizeMu.Unlock()
		d.t.forget(d.volume)
	})
}

// withdraw takes the descriptors back from the keeper.
func (d *device) withdraw(patience time.Duration) {
	if d.t.keeper == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if err := d.t.keeper.Drop(ctx, keyPrefix+d.volume); err != nil {
		klog.ErrorS(err, "The keeper may still hold a dead device", "volume", d.volume)
	}
}

// giveUp undoes a Create or Adopt whose readers run.
func (d *device) giveUp() {
	d.mu.Lock()
	d.aborted = true
	d.mu.Unlock()
	if err := d.end(abortEnd); err != nil {
		klog.ErrorS(err, "Cannot take down a device", "volume", d.volume)
	}
}

// abandon undoes an Adopt whose readers do not run.
func (d *device) abandon() {
	unix.Close(d.conn.fuse)
	close(d.readersDone)
	d.giveUp()
}
