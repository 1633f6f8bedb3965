package blockio

import (
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"
)

// blockDeviceSize is the length of a block device in bytes (linux/fs.h,
// BLKGETSIZE64: a size_t argument that takes a u64).
func blockDeviceSize(fd int) (int64, error) {
	var size uint64
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.BLKGETSIZE64, uintptr(unsafe.Pointer(&size)))
	if errno != 0 {
		return 0, errno
	}
	return int64(size), nil
}

// setDirect switches direct I/O on where it works and returns the alignment
// that it needs. Where it doesn't, or needs more than BlockSize, the file stays
// buffered and the alignment is 1. fl is the descriptor's present flags.
func setDirect(fd, fl int) (align int, err error) {
	align, known := statAlign(fd)
	if known && (align == 0 || align > BlockSize) {
		return 1, nil
	}
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_SETFL, fl|unix.O_DIRECT); err != nil {
		if err == unix.EINVAL {
			return 1, nil
		}
		return 0, err
	}
	if known {
		return align, nil
	}
	// Older kernels and some file systems don't tell; BlockSize is a multiple of
	// what nearly all of them need, and a read shows the others.
	buf := getBounce()
	defer putBounce(buf)
	_, err = retry(func() (int, error) { return unix.Pread(fd, (*buf)[:BlockSize], 0) })
	if err == nil {
		return BlockSize, nil
	}
	_, err = unix.FcntlInt(uintptr(fd), unix.F_SETFL, fl)
	return 1, err
}

// statAlign asks for the alignment of direct I/O (linux/stat.h,
// STATX_DIOALIGN, kernel 6.1). known is false where the file system does not
// tell; an alignment of 0 means that direct I/O does not work there.
func statAlign(fd int) (align int, known bool) {
	var stx unix.Statx_t
	err := unix.Statx(fd, "", unix.AT_EMPTY_PATH, unix.STATX_DIOALIGN, &stx)
	if err != nil || stx.Mask&unix.STATX_DIOALIGN == 0 {
		return 0, false
	}
	if stx.Dio_offset_align == 0 || stx.Dio_mem_align == 0 {
		return 0, true
	}
	return int(max(stx.Dio_offset_align, stx.Dio_mem_align)), true // powers of two
}

// bounceSize is the length of a bounce buffer in bytes: long enough for the
// copy to cost little beside the transfer.
const bounceSize = 256 << 10

// bounces holds buffers of bounceSize bytes that begin at a multiple of
// BlockSize. They are heap memory, because each is used within one system call.
var bounces = sync.Pool{New: func() any {
	mem := make([]byte, bounceSize+BlockSize)
	skip := -address(mem) & (BlockSize - 1)
	buf := mem[skip : skip+bounceSize : skip+bounceSize]
	return &buf
}}

func getBounce() *[]byte { return bounces.Get().(*[]byte) }

func putBounce(buf *[]byte) { bounces.Put(buf) }

// address is where p lies in memory.
func address(p []byte) uintptr { return uintptr(unsafe.Pointer(unsafe.SliceData(p))) }

// aligned tells whether a transfer may go straight to a descriptor that needs
// the alignment.
func aligned(p []byte, off int64, align int) bool {
	return (uintptr(off)|uintptr(len(p))|address(p))&uintptr(align-1) == 0
}
