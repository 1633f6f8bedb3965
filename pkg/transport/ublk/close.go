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
	// orderlyEnd bounds each wait for the kernel while a device is taken down.
	orderlyEnd = 10 * time.Second
	// abortEnd is the same when it is taken down by force.
	abortEnd = 2 * time.Second
)

// Close takes the device away, has the backend flush, and frees its number. An
// error of that flush is returned though the device is gone; a further Close then
// returns nil. If ctx ends once the device is being stopped the rest goes on, and
// Close may be called again to wait for it.
func (d *device) Close(ctx context.Context) error {
	if err := d.life.Close(ctx, d.waitUnused, d.end); err != nil {
		return fmt.Errorf("ublk: close device of volume %q: %w", d.volume, err)
	}
	return nil
}

// waitUnused returns transport.ErrBusy if the device is in use and stays so.
func (d *device) waitUnused(ctx context.Context) error {
	return transport.WaitUnused(ctx, d.Path(), func(bool) (bool, error) { return transport.InUse(d.Path()) })
}

// end takes down a device that nobody uses. The kernel or the backend may hold it up.
func (d *device) end() error {
	// What is dirty in the page cache of the device is written now.
	err := d.stop()
	if err == nil {
		<-d.threadsDone
	}
	if e := d.b.Flush(); e != nil {
		err = errors.Join(err, fmt.Errorf("device is stopped, but its last flush failed: %w", e))
	}
	d.finish(orderlyEnd)
	return err
}

// stop is STOP_DEV, which may hang.
func (d *device) stop() error {
	return unlessGone(d.id, d.tag, func(c *control) error { return c.stop(d.id) })
}

// unlessGone calls fn if there is the device with that tag, and takes it for success if
// there is none. If somebody else has removed it, its number may be another device's by
// now.
func unlessGone(id uint32, tag uint64, fn func(*control) error) error {
	err := withControl(func(c *control) error {
		info, err := c.info(id)
		if err != nil || info.tag != tag {
			return err
		}
		return fn(c)
	})
	if errors.Is(err, unix.ENODEV) {
		return nil
	}
	return err
}

// Abort answers all that is in flight with EIO and takes the device away. It
// takes seconds at most. Calls of the backend that do not return are left behind,
// and logged.
func (d *device) Abort() error {
	if d.life.Abort() {
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
		d.t.remove(d.volume, d.id, d.tag, patience)
		d.life.SetGone()
		d.t.devices.Forget(d.volume)
	})
}

// remove frees the number of a device that is stopped, and its record. The
// kernel does it when the last user has closed the device; that is not waited
// for.
func (t *Transport) remove(volume string, id uint32, tag uint64, patience time.Duration) {
	removed := make(chan error, 1)
	go func() { removed <- unlessGone(id, tag, func(c *control) error { return c.remove(id) }) }()
	select {
	case err := <-removed:
		if err != nil {
			klog.ErrorS(err, "Cannot remove a device", "volume", volume, "device", blockPath(id))
		}
	case <-time.After(patience):
		klog.InfoS("Device is in use and will be removed when closed", "volume", volume, "device", blockPath(id))
	}
	if err := t.records.Drop(volume); err != nil {
		klog.ErrorS(err, "Cannot drop the record of a device", "volume", volume)
	}
}

// giveUp undoes a Create or Adopt.
func (d *device) giveUp() {
	if err := d.Abort(); err != nil {
		klog.ErrorS(err, "Cannot take down a device", "volume", d.volume)
	}
}
