package fuseloop

import (
	"errors"
	"fmt"
	"math"
	"os"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"
)

const (
	// ioctlBackingOpen is FUSE_DEV_IOC_BACKING_OPEN.
	ioctlBackingOpen = 0x4010e501
	// openPassthrough is FOPEN_PASSTHROUGH.
	openPassthrough = 1 << 7
	// stackDepth is max_stack_depth: the base lies on a file system that lies on no
	// other one.
	stackDepth = 1

	// backingUnknown stands for the backing file that an earlier process has given the
	// kernel.
	backingUnknown = -1
)

// baseMark ends the tag of a loop device whose reads and writes go to the base. So
// whoever finds the device knows that it works without its server.
const baseMark = ":base"

// passesThrough tells whether the device's reads and writes go to the base.
func (l loopDev) passesThrough() bool { return strings.HasSuffix(l.tag, baseMark) }

// Native tells whether reads and writes of the device go to the base past the backend.
// It is so from Create to the end of the device.
func (d *device) Native() bool { return d.loop.passesThrough() }

// Passthrough says why reads and writes of a device could not go to its base past
// this process, or nil.
func (t *Transport) Passthrough() error {
	features, err := handshake()
	if err != nil {
		return fmt.Errorf("fuse: %w", err)
	}
	if features&featPassthrough == 0 {
		return errNoPassthrough
	}
	return nil
}

var errNoPassthrough = errors.New("fuse: the kernel has no passthrough (CONFIG_FUSE_PASSTHROUGH, kernel 6.9)")

// passThrough has the kernel take the base for what is read and written, if it can;
// if not, that comes to the backend as ever. The file must not have been opened yet.
func (d *device) passThrough() bool {
	if d.base == nil {
		return false
	}
	err := errNoPassthrough
	if d.srv.features.Load()&featPassthrough != 0 {
		var path string
		if path, err = d.base(); err == nil {
			err = d.openBacking(path)
		}
	}
	if err != nil {
		klog.InfoS("Reads and writes do not go to the base past this process", "volume", d.volume, "reason", err.Error())
	}
	return err == nil
}

// openBacking has OPEN answered with the file as what is behind ours. The kernel
// forgets it with the connection.
func (d *device) openBacking(path string) error {
	// Where there is no direct I/O the kernel would refuse each request of the loop device.
	file, err := unix.Open(path, unix.O_RDWR|unix.O_DIRECT|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: path, Err: err}
	}
	defer unix.Close(file)
	m := struct {
		fd      int32
		flags   uint32
		padding uint64
	}{fd: int32(file)}
	id, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(d.conn.fuse), ioctlBackingOpen, uintptr(unsafe.Pointer(&m)))
	if errno != 0 {
		return fmt.Errorf("FUSE_DEV_IOC_BACKING_OPEN of %s: %w", path, errno)
	}
	d.srv.backing.Store(int32(id))
	return nil
}

// nowhere is a position in which no file has a block, and which the sum with any other
// is not either.
const nowhere = math.MaxInt64 &^ (blockSize - 1)

// fence ends all reads and writes of a device whose users have it open yet: what is in
// flight ends, and what comes later fails. The end of the connection does the same to
// a device that does not pass through. The device has no length from then on.
func (l loopDev) fence(fd int) error {
	info, err := unix.IoctlLoopGetStatus64(fd)
	if err != nil {
		return fmt.Errorf("LOOP_GET_STATUS64 %s: %w", l.path(), err)
	}
	// The kernel changes the offset while nothing is in flight.
	info.Offset = nowhere
	if err := unix.IoctlLoopSetStatus64(fd, info); err != nil {
		return fmt.Errorf("LOOP_SET_STATUS64 %s: %w", l.path(), err)
	}
	return nil
}
