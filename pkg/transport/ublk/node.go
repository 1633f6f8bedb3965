package ublk

import (
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

func blockPath(id uint32) string { return fmt.Sprintf("/dev/ublkb%d", id) }
func charPath(id uint32) string  { return fmt.Sprintf("/dev/ublkc%d", id) }

// makeNode makes sure that the device node is there and the right one: in a
// container /dev may be a file system of its own, where none appears by itself.
// sysfs is the device's directory there.
func makeNode(path, sysfs string, kind uint32) error {
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

// openChar opens the device's character device.
func openChar(id uint32) (int, error) {
	path := charPath(id)
	if err := makeNode(path, fmt.Sprintf("%s/ublkc%d", charClass, id), unix.S_IFCHR); err != nil {
		return -1, err
	}
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, &os.PathError{Op: "open", Path: path, Err: err}
	}
	return fd, nil
}
