package dmuser

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"sync"
	"time"

	"k8s.io/klog/v2"

	"github.com/snapmerge/snapmerge/pkg/transport"
)

const (
	// orderlyEnd bounds each wait for the kernel while a device is taken down.
	orderlyEnd = 10 * time.Second
	// abortEnd is the same when it is taken down by force.
	abortEnd = 2 * time.Second
)

// device is a volume in service.
type device struct {
	t      *Transport
	volume string
	meta   meta
	b      transport.Backend
	path   string
	size   int64 // bytes
	life   *transport.Lifecycle

	arena *arena
	// mu guards what the keeper has: a renewal replaces a channel's control node, and
	// channels end.
	mu    sync.Mutex
	spare control
	chans []*channel

	// threadsDone is closed when all channels have ended.
	threadsDone chan struct{}
	finishOnce  sync.Once
}

func (t *Transport) newDevice(volume string, m meta, b transport.Backend) *device {
	d := &device{t: t, volume: volume, meta: m, b: b, threadsDone: make(chan struct{})}
	d.life = transport.NewLifecycle(func() { klog.InfoS("Device has died", "volume", volume, "device", d.path) })
	return d
}

// Path is the block device's node.
func (d *device) Path() string { return d.path }

// Transport is that of its transport.
func (d *device) Transport() string { return d.t.Name() }

// Failed is closed when the device was removed, or its table swapped, by somebody
// else.
func (d *device) Failed() <-chan struct{} { return d.life.Failed() }

// open opens the control nodes of a new device.
func (d *device) open() (err error) {
	if d.arena, err = newArena(channels); err != nil {
		return err
	}
	if d.spare, err = d.t.mapping.open(d.meta.Name); err != nil {
		return err
	}
	for i := range channels {
		ctl, err := d.t.mapping.open(d.meta.Name)
		if err != nil {
			return err
		}
		d.addChannel(i, ctl)
	}
	return nil
}

func (d *device) addChannel(i int, ctl control) {
	d.chans = append(d.chans, &channel{backend: d.b, readOnly: d.meta.ReadOnly, slot: d.arena.slot(i), staged: maxStaged, ctl: ctl})
}

// take makes the channels of what the keeper had; the descriptors are the device's
// if it succeeds.
func (d *device) take(ctx context.Context, fds []int) (err error) {
	for {
		if d.arena, err = openArena(fds[1], channels); !errors.Is(err, errServed) {
			break
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(pollLock):
		}
	}
	if err != nil {
		fds[1] = -1
		return err
	}
	d.spare = node(fds[0])
	for i, fd := range fds[2:] {
		d.addChannel(i, node(fd))
	}
	return nil
}

// deposit gives the keeper what Adopt needs. mu must be held, or nobody else have
// the device yet.
func (d *device) deposit(ctx context.Context) error {
	if d.t.keeper == nil {
		return nil
	}
	fds := []int{d.spare.Fd(), d.arena.fd}
	for _, c := range d.chans {
		fds = append(fds, c.ctl.Fd())
	}
	return d.t.keeper.Put(ctx, keyPrefix+d.volume, d.meta, fds...)
}

// closeControls closes what open or take opened; no channel runs.
func (d *device) closeControls() {
	for _, c := range d.chans {
		c.close()
	}
	if d.spare != nil {
		_ = d.spare.Close()
	}
	if d.arena != nil {
		d.arena.close()
	}
}

// serve starts the channels.
func (d *device) serve() {
	var threads sync.WaitGroup
	for _, c := range d.chans {
		threads.Go(func() {
			err := c.run(d.renew)
			d.mu.Lock()
			c.close()
			d.mu.Unlock()
			if err == nil || errors.Is(err, errAborted) || errors.Is(err, errDestroyed) {
				return
			}
			// Fewer channels than there should be would be a riddle; none is a clear case.
			klog.ErrorS(err, "A channel of dm-user has failed, destroying the device", "volume", d.volume, "device", d.meta.Name)
			d.withdraw(abortEnd)
			if err := d.t.mapping.destroy(d.meta.Name); err != nil {
				klog.ErrorS(err, "Cannot destroy", "volume", d.volume)
			}
		})
	}
	go func() {
		threads.Wait()
		d.life.Die()
		_ = d.spare.Close()
		d.arena.close()
		close(d.threadsDone)
	}()
}

// renew gives a channel a new control node, and closes the old one wherever it is
// open: what it had taken and not answered fails.
func (d *device) renew(c *channel) error {
	ctl, err := d.t.mapping.open(d.meta.Name)
	if errors.Is(err, fs.ErrNotExist) {
		return errDestroyed
	}
	if err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if slices.ContainsFunc(d.chans, (*channel).ended) { // its number may be another file's
		_ = ctl.Close()
		return errDestroyed
	}
	old, err := c.replace(ctl)
	if err != nil {
		_ = ctl.Close()
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), orderlyEnd)
	defer cancel()
	return errors.Join(d.deposit(ctx), old.Close())
}

// Resize returns transport.ErrNoResize if the backend has grown: a new table would
// need a new control node, and a swap from one to the other breaks direct I/O by
// io_uring (seen with kernel 6.12).
func (d *device) Resize() error {
	if size := d.b.Size(); size != d.size {
		return fmt.Errorf("dm-user: resize volume %q from %d to %d bytes: %w", d.volume, d.size, size, transport.ErrNoResize)
	}
	return nil
}

// Close takes the device away and has the backend flush. An error of that flush is
// returned though the device is gone; a further Close then returns nil.
func (d *device) Close(ctx context.Context) error {
	if err := d.life.Close(ctx, d.detach, d.end); err != nil {
		return fmt.Errorf("dm-user: close device of volume %q: %w", d.volume, err)
	}
	return nil
}

// detach removes the device, which the kernel refuses while it is in use.
func (d *device) detach(ctx context.Context) error {
	return transport.WaitUnused(ctx, d.path, func(bool) (bool, error) { return d.t.mapping.remove(d.meta.Name) })
}

// end follows when the device is removed.
func (d *device) end() error {
	<-d.threadsDone
	err := d.b.Flush()
	if err != nil {
		err = fmt.Errorf("device is removed, but its last flush failed: %w", err)
	}
	d.finish(orderlyEnd)
	return err
}

// Abort fails all that is in flight and takes the device away, at once or when its
// last user has closed it. It takes seconds at most. Calls of the backend that do
// not return are left behind, and logged.
func (d *device) Abort() error {
	if d.life.Abort() {
		return nil
	}
	d.mu.Lock()
	for _, c := range d.chans {
		c.abort()
	}
	d.mu.Unlock()
	d.withdraw(abortEnd) // else the keeper would keep the channels open
	destroyed := make(chan error, 1)
	go func() { destroyed <- d.t.mapping.destroy(d.meta.Name) }()
	var err error
	select {
	case err = <-destroyed:
	case <-time.After(orderlyEnd):
		err = errors.New("the kernel does not let the device go")
	}
	select {
	case <-d.threadsDone:
	case <-time.After(abortEnd):
		klog.InfoS("Left channels behind: the backend does not return", "volume", d.volume)
	}
	d.finish(abortEnd)
	if err != nil {
		return fmt.Errorf("dm-user: abort device of volume %q: %w", d.volume, err)
	}
	return nil
}

// finish makes everybody forget the device.
func (d *device) finish(patience time.Duration) {
	d.finishOnce.Do(func() {
		d.withdraw(patience)
		d.life.SetGone()
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
