package nbd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"sync"
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

// device is a volume in service.
type device struct {
	t      *Transport
	volume string
	tag    uint64
	index  uint32
	srv    *server
	life   *transport.Lifecycle

	sockets []*net.UnixConn // of new connections that nobody serves yet

	ctx    context.Context // ends when the device is being taken down
	cancel context.CancelFunc
	// connsDone is closed when all connections have ended for good.
	connsDone  chan struct{}
	finishOnce sync.Once
}

func (t *Transport) newDevice(volume string, tag uint64, b transport.Backend, readOnly bool) *device {
	d := &device{t: t, volume: volume, tag: tag, srv: newServer(b, readOnly), connsDone: make(chan struct{})}
	d.ctx, d.cancel = context.WithCancel(context.Background())
	d.life = transport.NewLifecycle(func() { klog.InfoS("Device has died", "volume", volume, "device", d.Path()) })
	return d
}

// Path is the block device's node.
func (d *device) Path() string { return blockPath(d.index) }

// Transport is that of its transport.
func (d *device) Transport() string { return d.t.Name() }

// Resend is how long after its adoption requests that the last process has not answered
// may go without an answer: until their time is over, and the driver has noticed.
func (d *device) Resend() time.Duration { return requestTimeout + 2*time.Second }

// Failed is closed when the device was disconnected by somebody else.
func (d *device) Failed() <-chan struct{} { return d.life.Failed() }

// connect makes the driver's device.
func (d *device) connect() (err error) {
	var theirs []*os.File
	defer func() {
		for _, f := range theirs {
			f.Close()
		}
		if err != nil {
			d.closeSockets()
		}
	}()
	for range connections {
		c, f, err := pair()
		if err != nil {
			return err
		}
		d.sockets, theirs = append(d.sockets, c), append(theirs, f)
	}
	if d.index, err = connect(d.tag, d.srv.backend.Size(), d.srv.readOnly, theirs); err != nil {
		return err
	}
	if _, err := attribute(d.index, "backend"); err != nil {
		return errors.Join(fmt.Errorf("the driver does not keep identifiers (kernel 5.14 does): %w", err), disconnect(d.index))
	}
	return nil
}

// reconnectAll replaces all connections, which are those of a dead process.
func (d *device) reconnectAll(ctx context.Context) error {
	for range connections {
		c, err := d.reconnect(ctx)
		if err != nil {
			d.closeSockets()
			return err
		}
		d.sockets = append(d.sockets, c)
	}
	return nil
}

func (d *device) closeSockets() {
	for _, c := range d.sockets {
		c.Close()
	}
	d.sockets = nil
}

// inService serves the connections. The device is there for guests already.
func (d *device) inService() error {
	var conns sync.WaitGroup
	for _, c := range d.sockets {
		conns.Go(func() { d.run(c) })
	}
	d.sockets = nil
	go func() {
		conns.Wait()
		d.life.Die()
		close(d.connsDone)
		d.srv.workers.Wait()
		d.srv.buffers.drain()
	}()
	return makeNode(d.index)
}

// run serves a connection, and those that take its place when the driver has
// given one up, until the device is disconnected.
func (d *device) run(c *net.UnixConn) {
	for {
		stop := context.AfterFunc(d.ctx, func() { _ = c.SetReadDeadline(time.Now()) })
		err := d.srv.serve(d.ctx, c)
		stop()
		c.Close()
		if d.ctx.Err() != nil || errors.Is(err, errDisconnect) {
			return
		}
		if !errors.Is(err, io.EOF) {
			klog.ErrorS(err, "A connection of NBD has ended", "volume", d.volume, "device", d.Path())
		}
		ctx, cancel := context.WithTimeout(d.ctx, reconnectTime)
		c, err = d.reconnect(ctx)
		cancel()
		if err != nil {
			if d.ctx.Err() == nil {
				klog.ErrorS(err, "Cannot connect again", "volume", d.volume, "device", d.Path())
			}
			return
		}
		klog.InfoS("Connected again: the backend took longer than the driver waits, or the connection broke", "volume", d.volume, "device", d.Path())
	}
}

// Resize tells the kernel that the backend has grown; I/O goes on.
func (d *device) Resize() error {
	size := d.srv.backend.Size()
	if err := d.resize(size); err != nil {
		return fmt.Errorf("nbd: resize volume %q to %d bytes: %w", d.volume, size, err)
	}
	return nil
}

func (d *device) resize(size int64) error {
	if d.life.Ended() {
		return errors.New("its device is closed")
	}
	if err := transport.CheckSize(size); err != nil {
		return err
	}
	have, err := sizeOf(d.index)
	if err != nil {
		return err
	}
	switch {
	case size == have:
		return nil
	case size < have:
		return fmt.Errorf("the device has %d bytes and cannot shrink", have)
	}
	if err := reconfigure(d.index, d.tag, size); err != nil {
		return err
	}
	if have, err = sizeOf(d.index); err == nil && have != size {
		err = fmt.Errorf("%s has %d bytes afterwards", d.Path(), have)
	}
	return err
}

// Close takes the device away, has the backend flush, and frees its number. An
// error of that flush is returned though the device is gone; a further Close then
// returns nil.
func (d *device) Close(ctx context.Context) error {
	if err := d.life.Close(ctx, d.waitUnused, d.end); err != nil {
		return fmt.Errorf("nbd: close device of volume %q: %w", d.volume, err)
	}
	return nil
}

// waitUnused returns transport.ErrBusy if the device is in use and stays so.
func (d *device) waitUnused(ctx context.Context) error {
	return transport.WaitUnused(ctx, d.Path(), func(bool) (bool, error) { return transport.InUse(d.Path()) })
}

// end takes down a device that nobody uses.
func (d *device) end() error {
	dirty := d.writeDirty()
	err := d.takeDown(orderlyEnd)
	if err == nil { // else there may be connections that go on
		d.srv.workers.Wait()
	}
	if dirty != nil {
		err = errors.Join(err, fmt.Errorf("device is disconnected, but not all that was dirty is written: %w", dirty))
	}
	if e := d.srv.backend.Flush(); e != nil {
		err = errors.Join(err, fmt.Errorf("device is disconnected, but its last flush failed: %w", e))
	}
	d.finish()
	return err
}

// writeDirty has the kernel write what is dirty in the page cache of the device, which
// would be lost: its last user may be closing it just now, and wait for the same, but
// InUse does not find him, for he has no descriptor any more.
func (d *device) writeDirty() error {
	if d.life.Ended() {
		return nil // nothing can be written any more
	}
	written := make(chan error, 1)
	go func() {
		f, err := os.Open(d.Path())
		if err == nil {
			err = f.Sync()
			f.Close()
		}
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENXIO) || errors.Is(err, unix.ENODEV) {
			err = nil // the device is gone already
		}
		written <- err
	}()
	select {
	case err := <-written:
		return err
	case <-time.After(orderlyEnd):
		return errors.New("the kernel takes too long")
	}
}

// takeDown disconnects the device, and waits for the end of the connections.
func (d *device) takeDown(patience time.Duration) error {
	disconnected := make(chan error, 1)
	go func() { disconnected <- d.disconnect() }()
	var err error
	select {
	case err = <-disconnected:
	case <-time.After(orderlyEnd):
		err = errors.New("the kernel does not disconnect the device")
	}
	d.cancel()
	select {
	case <-d.connsDone:
	case <-time.After(patience):
		err = errors.Join(err, errors.New("connections do not end"))
	}
	return err
}

// disconnect ends the driver's device, unless somebody else has done so: its number
// may be another device's by now.
func (d *device) disconnect() error {
	id, err := attribute(d.index, "backend")
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ENODEV):
		return nil
	case err != nil:
		return err
	case id != identifier(d.tag):
		return nil
	}
	return disconnect(d.index)
}

// Abort fails all that is in flight and takes the device away. It takes seconds at
// most. Calls of the backend that do not return are left behind.
func (d *device) Abort() error {
	if d.life.Abort() {
		return nil
	}
	err := d.takeDown(abortEnd)
	d.finish()
	if err != nil {
		return fmt.Errorf("nbd: abort device of volume %q: %w", d.volume, err)
	}
	return nil
}

// finish makes everybody forget the device.
func (d *device) finish() {
	d.finishOnce.Do(func() {
		if err := d.t.records.Drop(d.volume); err != nil {
			klog.ErrorS(err, "Cannot drop the record of a device", "volume", d.volume)
		}
		d.life.SetGone()
		d.t.devices.Forget(d.volume)
	})
}
