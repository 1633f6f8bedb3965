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
	if err := d.life.Close(ctx, d.detach, d.endAfterDetach); err != nil {
		return fmt.Errorf("fuse: close device of volume %q: %w", d.volume, err)
	}
	return nil
}

// endAfterDetach takes down a device without users. The kernel or the backend may
// hold it up.
func (d *device) endAfterDetach() error {
	// The kernel lets go of the file when it is through with it.
	select {
	case <-d.srv.released:
	case <-d.readersDone:
	case <-time.After(orderlyEnd):
		klog.InfoS("The kernel has not released the file", "volume", d.volume, "device", d.Path())
	}
	err := d.srv.backend.Flush()
	if err != nil {
		err = fmt.Errorf("device is detached, but its last flush failed: %w", err)
	}
	return errors.Join(err, d.end(orderlyEnd))
}

// detach takes the file out of the loop device, or returns transport.ErrBusy and
// leaves it as it was.
func (d *device) detach(ctx context.Context) error {
	err := transport.WaitUnused(ctx, d.Path(), func(last bool) (bool, error) { return d.tryDetach(ctx, last) })
	if errors.Is(err, errNotOurs) {
		return nil // it is gone already
	}
	return err
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
	d.life.Abort()
	if err := d.end(abortEnd); err != nil {
		return fmt.Errorf("fuse: abort device of volume %q: %w", d.volume, err)
	}
	return nil
}

// abortConn aborts the connection unless the mount may be closed: then the
// number could be somebody else's.
func (d *device) abortConn() error {
	return d.life.UnlessGone(func() error { return abortConn(d.conn.id) })
}

// end ends the connection first and then all the rest. It may be called twice
// and at the same time by Close and Abort.
func (d *device) end(patience time.Duration) error {
	if err := d.abortConn(); err != nil {
		return err
	}
	discarded := make(chan error, 1)
	go func() {
		busy, err := d.loop.discard()
		if err != nil {
			klog.ErrorS(err, "Cannot detach the loop device", "volume", d.volume)
		} else if busy {
			klog.InfoS("Device is in use and will be detached when closed", "volume", d.volume, "device", d.Path())
		}
		discarded <- err
	}()
	wait, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	select {
	case <-d.readersDone:
	case <-wait.Done():
		klog.InfoS("Left readers behind: the backend does not return", "volume", d.volume, "calls", d.srv.inBackend.Load())
	}
	var err error
	select {
	case err = <-discarded:
	case <-wait.Done():
		klog.InfoS("The kernel does not let the loop device go", "volume", d.volume, "device", d.Path())
		err = errors.New("the kernel does not let the loop device go")
	}
	if err != nil && d.Native() {
		return err // it may be read and written yet
	}
	d.finish(patience)
	return nil
}

// finish makes everybody forget the device.
func (d *device) finish(patience time.Duration) {
	d.finishOnce.Do(func() {
		d.withdraw(patience)
		d.life.SetGone()
		d.resizeMu.Lock()
		unix.Close(d.conn.mount)
		d.conn.mount = -1
		d.resizeMu.Unlock()
		d.t.devices.Forget(d.volume)
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
	d.life.Abort()
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
