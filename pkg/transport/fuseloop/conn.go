package fuseloop

import (
	"errors"
	"fmt"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// notifyResend is FUSE_NOTIFY_RESEND.
const notifyResend = 7

// conn is a FUSE connection and the detached mount on it.
type conn struct {
	fuse  int    // /dev/fuse, non-blocking
	mount int    // the mount, as an O_PATH descriptor
	id    uint32 // its name below /sys/fs/fuse/connections
}

// openConn makes a FUSE file system without a mount point. It does not wait for
// the kernel's INIT.
func openConn() (c conn, err error) {
	c.fuse, err = unix.Open("/dev/fuse", unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return conn{}, &os.PathError{Op: "open", Path: "/dev/fuse", Err: err}
	}
	c.mount, err = mountDetached("fuse", [][2]string{
		{"source", "snapmerge"},
		{"subtype", "snapmerge"},
		{"fd", strconv.Itoa(c.fuse)},
		{"rootmode", strconv.FormatUint(unix.S_IFDIR, 8)},
		{"user_id", "0"},
		{"group_id", "0"},
		{"max_read", strconv.Itoa(maxIO)},
	})
	if err != nil {
		unix.Close(c.fuse)
		return conn{}, err
	}
	// DONT_SYNC keeps this from being a request to ourselves.
	var st unix.Statx_t
	err = unix.Statx(c.mount, "", unix.AT_EMPTY_PATH|unix.AT_STATX_DONT_SYNC, 0, &st)
	if err != nil {
		unix.Close(c.mount)
		unix.Close(c.fuse)
		return conn{}, os.NewSyscallError("statx", err)
	}
	c.id = st.Dev_minor // an anonymous device: the major is 0
	return c, nil
}

// mountDetached returns a mount of the file system that is in no mount table.
func mountDetached(fstype string, options [][2]string) (int, error) {
	fs, err := unix.Fsopen(fstype, unix.FSOPEN_CLOEXEC)
	if err != nil {
		return -1, fmt.Errorf("fsopen %s: %w", fstype, err)
	}
	defer unix.Close(fs)
	for _, o := range options {
		if err := unix.FsconfigSetString(fs, o[0], o[1]); err != nil {
			return -1, fmt.Errorf("fsconfig %s %s=%s: %w", fstype, o[0], o[1], err)
		}
	}
	if err := unix.FsconfigCreate(fs); err != nil {
		return -1, fmt.Errorf("fsconfig %s create: %w", fstype, err)
	}
	mount, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV|unix.MOUNT_ATTR_NOEXEC)
	if err != nil {
		return -1, fmt.Errorf("fsmount %s: %w", fstype, err)
	}
	return mount, nil
}

// resend has the kernel queue again every request that was read and has not
// been answered.
func (c *conn) resend() error {
	msg := make([]byte, outHeaderSize)
	native.PutUint32(msg, outHeaderSize)
	native.PutUint32(msg[4:], notifyResend)
	if _, err := unix.Write(c.fuse, msg); err != nil {
		return fmt.Errorf("FUSE_NOTIFY_RESEND: %w", err)
	}
	return nil
}

// ended tells whether the connection is over.
func (c *conn) ended() bool {
	p := []unix.PollFd{{Fd: int32(c.fuse)}}
	n, err := unix.Poll(p, 0)
	return err == nil && n == 1 && p[0].Revents&unix.POLLERR != 0
}

// abortConn ends the connection with the number id: what waits fails, and
// readers of /dev/fuse get ENODEV. A connection that is gone is no error.
func abortConn(id uint32) error {
	f, err := openControl(id, "abort")
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	if err != nil {
		return err
	}
	defer unix.Close(f)
	if _, err := unix.Write(f, []byte("1")); err != nil {
		return fmt.Errorf("abort of FUSE connection %d: %w", id, err)
	}
	return nil
}

// openControl opens a file of a connection in fusectl, which need not be
// mounted anywhere.
func openControl(id uint32, name string) (int, error) {
	ctl, err := mountDetached("fusectl", nil)
	if err != nil {
		return -1, err
	}
	defer unix.Close(ctl)
	path := fmt.Sprintf("%d/%s", id, name)
	f, err := unix.Openat(ctl, path, unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, &os.PathError{Op: "open", Path: "fusectl:" + path, Err: err}
	}
	return f, nil
}
