package transport

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// MakeNode makes sure that a device node is there and the right one: in a
// container /dev may be a file system of its own, where none appears by itself.
// sysfs is the device's directory there; kind is S_IFBLK or S_IFCHR.
func MakeNode(path, sysfs string, kind uint32) error {
	b, err := os.ReadFile(sysfs + "/dev")
	if err != nil {
		return err
	}
	var major, minor uint32
	if _, err := fmt.Sscanf(strings.TrimSpace(string(b)), "%d:%d", &major, &minor); err != nil {
		return fmt.Errorf("%s/dev: %q: %w", sysfs, b, err)
	}
	want := unix.Mkdev(major, minor)
	var st unix.Stat_t
	err = unix.Stat(path, &st)
	switch {
	case err == nil && st.Mode&unix.S_IFMT == kind && st.Rdev == want:
		return nil
	case err == nil: // of an earlier device
		if err := os.Remove(path); err != nil {
			return err
		}
	case err != unix.ENOENT:
		return &os.PathError{Op: "stat", Path: path, Err: err}
	}
	if err := unix.Mknod(path, kind|0o600, int(want)); err != nil && err != unix.EEXIST {
		return &os.PathError{Op: "mknod", Path: path, Err: err}
	}
	return nil
}

// InUse tells whether somebody has the block device mounted, claimed or open, as
// far as this process can see: it finds plain openers among the processes of its
// own pid namespace. The device is not opened for I/O.
func InUse(path string) (bool, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_EXCL|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	switch err {
	case nil:
	case unix.EBUSY:
		return true, nil
	case unix.ENXIO, unix.ENODEV, unix.ENOENT:
		return false, nil // gone already
	default:
		return false, &os.PathError{Op: "open", Path: path, Err: err}
	}
	var st unix.Stat_t
	err = unix.Fstat(fd, &st)
	unix.Close(fd)
	if err != nil {
		return false, &os.PathError{Op: "stat", Path: path, Err: err}
	}
	return isOpen(unix.Major(st.Rdev), unix.Minor(st.Rdev))
}

// isOpen tells whether a process has the block device of that number open. By the
// number, for a container has a node of its own for the device, of any name. It fails
// rather than overlook one for want of memory or descriptors.
func isOpen(major, minor uint32) (bool, error) {
	processes, err := os.ReadDir("/proc")
	if err != nil {
		return false, err
	}
	for _, p := range processes {
		if _, err := strconv.Atoi(p.Name()); err != nil {
			continue
		}
		dir := "/proc/" + p.Name() + "/fd"
		files, err := os.ReadDir(dir)
		switch {
		case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ESRCH), errors.Is(err, fs.ErrPermission):
			continue // it has ended, or may not be looked at
		case err != nil:
			return false, err
		}
		for _, f := range files {
			var st unix.Statx_t
			// A file may be of a file system that does not answer: it is not to be asked.
			err := unix.Statx(unix.AT_FDCWD, dir+"/"+f.Name(), unix.AT_STATX_DONT_SYNC, unix.STATX_TYPE, &st)
			switch {
			case err == unix.ENOMEM:
				return false, &os.PathError{Op: "stat", Path: dir + "/" + f.Name(), Err: err}
			case err == nil && st.Mode&unix.S_IFMT == unix.S_IFBLK && st.Rdev_major == major && st.Rdev_minor == minor:
				return true, nil
			}
		}
	}
	return false, nil
}
