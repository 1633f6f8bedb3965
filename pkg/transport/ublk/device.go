package ublk

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"

	"github.com/snapmerge/snapmerge/pkg/transport"
)

// device is a volume in service.
type device struct {
	t      *Transport
	volume string
	id     uint32
	tag    uint64
	p      params
	b      transport.Backend
	size   atomic.Int64

	char   int
	queues []*queue
	// threadsDone is closed when all threads have ended and the character device
	// is closed.
	threadsDone chan struct{}
	finishOnce  sync.Once
	life        *transport.Lifecycle
}

// Path is the block device's node.
func (d *device) Path() string { return blockPath(d.id) }

// Transport is that of its transport.
func (d *device) Transport() string { return d.t.Name() }

// Failed is closed when the device was stopped by somebody else.
func (d *device) Failed() <-chan struct{} { return d.life.Failed() }

// prepare opens a device that was added or is being recovered, and maps its
// queues. If it fails nothing has happened to the device.
func (d *device) prepare(info devInfo) (err error) {
	if d.char, err = openChar(d.id); err != nil {
		return err
	}
	for i := range int(info.queues) {
		q, err := newQueue(i, int(info.depth), d.char, d.b, d.p.readOnly)
		if err != nil {
			for _, q := range d.queues {
				q.free()
			}
			unix.Close(d.char)
			return err
		}
		d.queues = append(d.queues, q)
	}
	return nil
}

// serve starts the threads of a prepared device. It returns when all of them
// have fetched.
func (d *device) serve() error {
	ready := make(chan error, len(d.queues))
	var threads sync.WaitGroup
	for _, q := range d.queues {
		threads.Add(1)
		go func() {
			if err := q.run(func(err error) { ready <- err }, threads.Done); err != nil {
				klog.ErrorS(err, "A ublk queue has failed", "volume", d.volume, "device", d.Path())
			}
		}()
	}
	go func() {
		threads.Wait()
		d.unmapDescriptors()
		unix.Close(d.char)
		close(d.threadsDone)
		// Buffers are in use as long as the backend is at their requests.
		for _, q := range d.queues {
			q.workers.Wait()
			q.free()
		}
	}()
	var errs []error
	for range d.queues {
		errs = append(errs, <-ready)
	}
	return errors.Join(errs...)
}

// unmapDescriptors lets go of the character device, for which DEL_DEV waits. The
// threads have ended.
func (d *device) unmapDescriptors() {
	for _, q := range d.queues {
		_ = unix.Munmap(q.desc)
		q.desc = nil
	}
}

// inService says that the device is there for guests from now on.
func (d *device) inService() error {
	go func() {
		<-d.threadsDone
		d.life.Die()
	}()
	return transport.MakeNode(d.Path(), d.sysfs(), unix.S_IFBLK)
}

// tune keeps a takeover from waiting. The driver of 6.12 learns of a dead server by the
// commands that are cancelled with it, those of tags that wait for a request. When all
// tags of a queue are with the server there is none, and it learns of it when a request
// times out, after 30 s (ublk_timeout of ublk_drv.c). So one tag stays free, which works
// unless the queue has a scheduler; else the time is short. A living server is given as
// much more as it needs.
func (d *device) tune() error {
	const timeout = 1000 // ms
	return errors.Join(
		os.WriteFile(d.sysfs()+"/queue/nr_requests", fmt.Append(nil, depth-1), 0),
		os.WriteFile(d.sysfs()+"/queue/io_timeout", fmt.Append(nil, timeout), 0))
}

func (d *device) sysfs() string { return "/sys/block/" + filepath.Base(d.Path()) }

// Resize tells the kernel that the backend has grown; I/O goes on. Where the
// kernel cannot (before 6.16) it returns transport.ErrNoResize.
func (d *device) Resize() error {
	size := d.b.Size()
	if err := d.resize(size); err != nil {
		return fmt.Errorf("ublk: resize volume %q to %d bytes: %w", d.volume, size, err)
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
	have := d.size.Load()
	switch {
	case size == have:
		return nil
	case size < have:
		return fmt.Errorf("the device has %d bytes and cannot shrink", have)
	case !d.t.knows(flagUpdateSize):
		return transport.ErrNoResize
	}
	if err := withControl(func(c *control) error { return c.updateSize(d.id, size) }); err != nil {
		return err
	}
	d.size.Store(size)
	return nil
}
