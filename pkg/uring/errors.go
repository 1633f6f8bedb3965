package uring

import "golang.org/x/sys/unix"

// TryAgain tells which errors of Submit pass: see there.
func TryAgain(err error) bool {
	return err == unix.EINTR || err == unix.EAGAIN || err == unix.EBUSY
}
