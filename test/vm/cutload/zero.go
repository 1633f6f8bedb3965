package main

import (
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// zeroOut is BLKZEROOUT of a block.
func zeroOut(f *os.File, off int64) error {
	r := [2]uint64{uint64(off), blockSize}
	for {
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), 0x127f, uintptr(unsafe.Pointer(&r)))
		switch errno {
		case 0:
			return nil
		case unix.EINTR: // by a signal of Go's scheduler: seen once, on a host that had no time for the guest
		default:
			return os.NewSyscallError("BLKZEROOUT", errno)
		}
	}
}
