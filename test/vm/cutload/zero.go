package main

import (
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// zeroOut is BLKZEROOUT of a block.
func zeroOut(f *os.File, off int64) error {
	r := [2]uint64{uint64(off), blockSize}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), 0x127f, uintptr(unsafe.Pointer(&r))); errno != 0 {
		return errno
	}
	return nil
}
