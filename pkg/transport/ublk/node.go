package ublk

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/snapmerge/snapmerge/pkg/transport"
)

func blockPath(id uint32) string { return fmt.Sprintf("/dev/ublkb%d", id) }
func charPath(id uint32) string  { return fmt.Sprintf("/dev/ublkc%d", id) }

// openChar opens the device's character device.
func openChar(id uint32) (int, error) {
	path := charPath(id)
	if err := transport.MakeNode(path, fmt.Sprintf("%s/ublkc%d", charClass, id), unix.S_IFCHR); err != nil {
		return -1, err
	}
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, &os.PathError{Op: "open", Path: path, Err: err}
	}
	return fd, nil
}
