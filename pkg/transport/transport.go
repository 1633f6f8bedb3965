// Package transport turns a volume's view into a block device of this node.
// The folders below it hold one transport each.
package transport

import (
	"context"
	"errors"
)

// ErrNotFound says that there is no device of that volume to adopt.
var ErrNotFound = errors.New("no such device")

// ErrBusy says that the device is in use (mounted or open) and was left alone.
var ErrBusy = errors.New("device is busy")

// ErrNoResize says that the kernel cannot change the size of such a device: it has
// its new size when it is made again.
var ErrNoResize = errors.New("the device cannot grow while it is in service: it has its new size when the volume is staged again")

// Backend is what a device serves. Offsets and lengths are in bytes and
// multiples of 512. Methods are called concurrently; an error that wraps a
// syscall.Errno reaches the guest as that errno, any other as EIO. Slices belong
// to the transport again when the call returns; a transport gives page-aligned
// ones where it can, for direct I/O.
type Backend interface {
	ReadAt(p []byte, off int64) (int, error)
	WriteAt(p []byte, off int64) (int, error)
	// Flush makes all writes that were acknowledged before it durable.
	Flush() error
	// Zero makes a range read as zeros: write-zeroes, and discard, which here
	// means write-zeroes with leave to unmap.
	Zero(off, n int64) error
	Size() int64
}

// Lender is a Backend of which a transport that has a ring of io_uring may do reads and
// writes itself.
type Lender interface {
	Backend
	// Lend gives what a read, or a write, of n bytes at off may be done with: the same
	// range of the file fd, in memory that is page-aligned. ok is false for a request that
	// must go through ReadAt or WriteAt. Lend never waits.
	//
	// Until back is called, once and by anybody, the descriptor is open and the range is
	// the backend's. done says that all n bytes were transferred; else the request must go
	// through ReadAt or WriteAt afterwards.
	Lend(off, n int64, write bool) (fd int, back func(done bool), ok bool)
}

// Options of a device.
type Options struct {
	// ReadOnly makes a device that refuses writes.
	ReadOnly bool
	// Transport is the name of the one that shall make the device, where there are
	// several; "" leaves it to them.
	Transport string
	// Base, if not nil, allows the device to have reads and writes go to the backend's
	// base, a file, past the backend; flushes and zeroing must still come to it. A
	// transport that can do so calls Base, once, before the first request: it returns
	// the file, or why that is not possible now. Such a device has a method Native that
	// says true until it is closed or aborted. Others need not look at it.
	Base func() (file string, err error)
}

// Device is a block device in service.
type Device interface {
	// Path is the device node, such as /dev/loop3.
	Path() string
	// Transport is the name of the transport that made it.
	Transport() string
	// Resize tells the kernel that Backend.Size has grown, or fails with ErrNoResize.
	Resize() error
	// Close detaches the device and waits until nothing is in flight, within
	// ctx. In use: ErrBusy, and the device goes on serving.
	Close(ctx context.Context) error
	// Abort takes the device away whether it is in use or not: what is in
	// flight fails with EIO.
	Abort() error
	// Failed is closed when the device is dead though nobody closed it.
	Failed() <-chan struct{}
}

// Transport makes devices of one kind.
type Transport interface {
	// Name is the transport's name in flags and reports, such as "fuse".
	Name() string
	// Probe says why the transport cannot work here, or nil.
	Probe() error
	// Create puts a new device for the volume into service.
	Create(ctx context.Context, volume string, b Backend, o Options) (Device, error)
	// Adopt takes over the device that an earlier process of this node left for
	// the volume, with the requests it had not answered. None: ErrNotFound.
	Adopt(ctx context.Context, volume string, b Backend) (Device, error)
	// Leftovers lists the volumes whose devices an earlier process left.
	Leftovers(ctx context.Context) ([]string, error)
	// Discard takes away what is left of devices of the volumes that died with their
	// process; one that is in use goes with its last user. There may be none. It
	// must not be called for a volume that has a device or a leftover one.
	Discard(volumes []string) error
}
