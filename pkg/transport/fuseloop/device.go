package fuseloop

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"

	"github.com/snapmerge/snapmerge/pkg/transport"
)

const (
	// pollLoop is how often to look again; the kernel has no event for it.
	pollLoop = 10 * time.Millisecond
	// resizeTimeout bounds Resize, which takes milliseconds.
	resizeTimeout = 30 * time.Second
	// orderlyEnd bounds each wait for the kernel while a device is taken down.
	orderlyEnd = 10 * time.Second
	// abortEnd is the same when it is taken down by force.
	abortEnd = 2 * time.Second
)

// device is a volume in service.
type device struct {
	t      *Transport
	volume string
	srv    *server
	conn   conn
	loop   loopDev
	base   func() (string, error) // see transport.Options; nil: none

	// readersDone is closed when all readers have ended and the connection's
	// descriptor is closed.
	readersDone chan struct{}
	finishOnce  sync.Once
	resizeMu    sync.Mutex // held by Resize and for closing conn.mount
	// life is gone when all is through but for closing conn.mount.
	life *transport.Lifecycle
}

func newDevice(t *Transport, volume string, s *server) *device {
	d := &device{t: t, volume: volume, srv: s, readersDone: make(chan struct{})}
	d.life = transport.NewLifecycle(func() { klog.InfoS("Device has died", "volume", volume, "device", d.Path()) })
	return d
}

// Path is the loop device's node.
func (d *device) Path() string { return d.loop.path() }

// Transport is that of its transport.
func (d *device) Transport() string { return d.t.Name() }

// Failed is closed when the connection was aborted or the loop device detached
// by somebody else.
func (d *device) Failed() <-chan struct{} { return d.life.Failed() }

// startReaders serves the connection until it ends.
func (d *device) startReaders() {
	set := &readerSet{fuse: d.conn.fuse, srv: d.srv, fail: func(err error) {
		// Fewer readers than there should be would be a riddle; none is a clear case.
		klog.ErrorS(err, "FUSE reader failed, aborting the device", "volume", d.volume)
		if err := d.abortConn(); err != nil {
			klog.ErrorS(err, "Cannot abort", "volume", d.volume)
		}
	}}
	set.start()
	go func() {
		set.wg.Wait()
		unix.Close(d.conn.fuse)
		close(d.readersDone)
	}()
}

// watch waits for the end of a device in service, whoever brings it about.
func (d *device) watch() {
	select {
	case <-d.srv.released:
	case <-d.readersDone:
	}
	d.life.Die()
}

// attach makes the loop device on a connection whose readers run.
func (d *device) attach(ctx context.Context) error {
	select {
	case <-d.srv.inited:
	case <-d.readersDone:
		return errConnEnded
	case <-ctx.Done():
		return fmt.Errorf("no INIT from the kernel: %w", ctx.Err())
	}
	if d.srv.initErr != nil {
		return d.srv.initErr
	}
	tag := newTag(d.t.unique(d.volume))
	if d.passThrough() {
		tag += baseMark
	}
	for {
		index, err := freeLoop()
		if err != nil {
			return err
		}
		// The keeper knows of the device before it is one, so that a process that
		// dies in between leaves a trace.
		d.loop = loopDev{index, tag}
		if err := d.deposit(ctx); err != nil {
			return err
		}
		busy, err := d.run(ctx, step{Do: doAttach, Name: d.srv.name, ReadOnly: d.srv.readOnly}, d.conn.mount)
		if err != nil {
			return err
		}
		if !busy {
			d.srv.setAttached()
			return d.loop.makeNode() // the keeper may see another /dev
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("no free loop device: %w", ctx.Err())
		case <-time.After(pollLoop):
		}
	}
}

// run carries out a step on the device.
func (d *device) run(ctx context.Context, s step, mount int) (busy bool, err error) {
	s.Loop, s.Tag = d.loop.index, d.loop.tag
	return d.t.run(ctx, s, mount)
}

// deposit gives the keeper what Adopt needs.
func (d *device) deposit(ctx context.Context) error {
	if d.t.keeper == nil {
		return nil
	}
	m := meta{
		Version:  metaVersion,
		Conn:     d.conn.id,
		Resend:   d.srv.features.Load()&featHasResend != 0,
		ReadOnly: d.srv.readOnly,
		Loop:     d.loop.index,
		Tag:      d.loop.tag,
	}
	return d.t.keeper.Put(ctx, keyPrefix+d.volume, m, d.conn.fuse, d.conn.mount)
}

// takeOver starts service on a connection and a loop device that are there.
func (d *device) takeOver(ctx context.Context, m meta) error {
	if !m.Resend {
		d.abandon()
		return errors.New("the kernel cannot send requests again (FUSE_NOTIFY_RESEND needs 6.9), so those in flight were lost: the device was aborted")
	}
	if d.conn.ended() {
		d.abandon()
		return fmt.Errorf("%w: its connection was aborted", transport.ErrNotFound)
	}
	if err := d.prepare(ctx); err != nil {
		d.closeFDs() // the keeper has them still
		return err
	}
	d.startReaders()
	// Opening the loop device may have to wait for requests that we answer.
	_, err := d.run(ctx, step{Do: doCheck}, -1)
	if errors.Is(err, errNotOurs) {
		d.giveUp()
		return fmt.Errorf("%w: its loop device was never set up or is detached", transport.ErrNotFound)
	}
	if err == nil && d.srv.backend.Size() > d.srv.size.Load() {
		err = d.Resize() // an earlier process did not live to do it
	}
	if err != nil {
		// The guest's requests matter more than this.
		klog.ErrorS(err, "Adopted a device that is not quite as it should be", "volume", d.volume, "device", d.Path())
	}
	return nil
}

// prepare does all of an Adopt that can fail without harm.
func (d *device) prepare(ctx context.Context) error {
	have, err := d.loop.sysfsSize(d.srv.name)
	if err != nil {
		return err
	}
	if size := d.srv.backend.Size(); size < have {
		klog.ErrorS(nil, "Adopted a device that is longer than its volume", "volume", d.volume, "device", d.Path(), "bytes", have, "volumeBytes", size)
	}
	d.srv.size.Store(have)
	d.srv.features.Store(featHasResend) // the kernel does not say INIT twice
	d.srv.finishInit(nil)
	d.srv.opens.Store(1)
	if d.Native() {
		d.srv.backing.Store(backingUnknown)
	}
	d.srv.setAttached()
	if err := d.deposit(ctx); err != nil {
		return err
	}
	// Before the readers: what they read must not be sent again.
	return d.conn.resend()
}

// Resize tells the kernel that the backend has grown; I/O goes on.
func (d *device) Resize() error {
	d.resizeMu.Lock()
	defer d.resizeMu.Unlock()
	if d.conn.mount < 0 {
		return fmt.Errorf("fuse: resize volume %q: its device is closed", d.volume)
	}
	size := d.srv.backend.Size()
	if err := d.resize(size); err != nil {
		return fmt.Errorf("fuse: resize volume %q to %d bytes: %w", d.volume, size, err)
	}
	return nil
}

func (d *device) resize(size int64) error {
	if err := transport.CheckSize(size); err != nil {
		return err
	}
	if have := d.srv.size.Load(); size < have {
		return fmt.Errorf("the device has %d bytes and cannot shrink", have)
	}
	d.srv.size.Store(size)
	ctx, cancel := context.WithTimeout(context.Background(), resizeTimeout)
	defer cancel()
	if _, err := d.run(ctx, step{Do: doResize, Name: d.srv.name, Size: size}, d.conn.mount); err != nil {
		return err
	}
	have, err := d.loop.sysfsSize(d.srv.name)
	if err == nil && have != size {
		err = fmt.Errorf("%s has %d bytes after LOOP_SET_CAPACITY", d.Path(), have)
	}
	return err
}

func (d *device) closeFDs() {
	unix.Close(d.conn.fuse)
	unix.Close(d.conn.mount)
}
