package ublk

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/snapmerge/snapmerge/pkg/uring"
)

const controlPath = "/dev/ublk-control"

// control is the control device with a ring of its own: a command can hang, and
// must not hold up those of other volumes. It is used by one goroutine at a time.
type control struct {
	fd   int
	ring *uring.Ring
	buf  []byte // outside the Go heap
}

func openControl() (*control, error) {
	fd, err := unix.Open(controlPath, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: controlPath, Err: err}
	}
	c := &control{fd: fd}
	if c.ring, err = uring.New(1, uring.SetupSQE128); err == nil {
		c.buf, err = unix.Mmap(-1, 0, os.Getpagesize(), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	}
	if err != nil {
		c.close()
		return nil, err
	}
	return c, nil
}

func (c *control) close() {
	if c.ring != nil {
		_ = c.ring.Close()
	}
	if c.buf != nil {
		_ = unix.Munmap(c.buf)
	}
	unix.Close(c.fd)
}

// withControl calls fn with a control of its own.
func withControl(fn func(*control) error) error {
	c, err := openControl()
	if err != nil {
		return err
	}
	defer c.close()
	return fn(c)
}

// do carries out a command whose buffer is the first n bytes of c.buf. It waits
// as long as the kernel takes.
func (c *control) do(name string, cmd, id uint32, n int, data uint64) error {
	e := c.ring.SQE()
	e.UringCmd(c.fd, cmd)
	arg := c.ring.Command(e)
	native.PutUint32(arg[0:], id)
	native.PutUint16(arg[4:], 0xffff)
	if n > 0 {
		native.PutUint16(arg[6:], uint16(n))
		native.PutUint64(arg[8:], uint64(uintptr(unsafe.Pointer(&c.buf[0]))))
	}
	native.PutUint64(arg[16:], data)
	for {
		if cqe, ok := c.ring.CQE(); ok {
			runtime.KeepAlive(c)
			if cqe.Res < 0 {
				return fmt.Errorf("%s: %w", name, unix.Errno(-cqe.Res))
			}
			return nil
		}
		if _, err := c.ring.Submit(1); err != nil && !errors.Is(err, unix.EINTR) && !errors.Is(err, unix.EAGAIN) {
			return fmt.Errorf("%s: io_uring_enter: %w", name, err)
		}
	}
}

// features asks which flags the driver knows.
func (c *control) features() (uint64, error) {
	clear(c.buf[:8])
	err := c.do("GET_FEATURES", cmdGetFeatures, newID, 8, 0)
	return native.Uint64(c.buf), err
}

// add makes a device, not yet started, and returns it as the kernel has it.
func (c *control) add(i devInfo) (devInfo, error) {
	i.id = newID
	i.encode(c.buf)
	err := c.do("ADD_DEV", cmdAddDev, newID, infoSize, 0)
	if errors.Is(err, unix.EACCES) {
		err = fmt.Errorf("%w: the driver has as many devices as its parameter ublks_max allows", err)
	}
	i.decode(c.buf)
	return i, err
}

func (c *control) info(id uint32) (i devInfo, err error) {
	clear(c.buf[:infoSize])
	err = c.do("GET_DEV_INFO", cmdGetDevInfo, id, infoSize, 0)
	i.decode(c.buf)
	return i, err
}

func (c *control) setParams(id uint32, p params) error {
	p.encode(c.buf)
	return c.do("SET_PARAMS", cmdSetParams, id, paramsSize, 0)
}

func (c *control) params(id uint32) (p params, err error) {
	clear(c.buf[:paramsSize])
	native.PutUint32(c.buf, paramsSize) // how much there is room for
	err = c.do("GET_PARAMS", cmdGetParams, id, paramsSize, 0)
	p.decode(c.buf)
	return p, err
}

// start returns when the queues have fetched, and the device is there.
func (c *control) start(id uint32) error {
	return c.do("START_DEV", cmdStartDev, id, 0, uint64(os.Getpid()))
}

// stop returns when the device is gone for its users, and all fetches have been
// cancelled.
func (c *control) stop(id uint32) error { return c.do("STOP_DEV", cmdStopDev, id, 0, 0) }

// remove returns when nobody has the device's character device open any more.
func (c *control) remove(id uint32) error { return c.do("DEL_DEV", cmdDelDev, id, 0, 0) }

func (c *control) startRecovery(id uint32) error {
	return c.do("START_USER_RECOVERY", cmdStartRecovery, id, 0, 0)
}

func (c *control) endRecovery(id uint32) error {
	return c.do("END_USER_RECOVERY", cmdEndRecovery, id, 0, uint64(os.Getpid()))
}

func (c *control) updateSize(id uint32, size int64) error {
	return c.do("UPDATE_SIZE", cmdUpdateSize, id, 0, uint64(size>>sectorShift))
}
