package uring

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// The methods below fill an entry fresh from Ring.SQE; the caller adds UserData
// and Flags. Lengths are in bytes, at most 0x7ffff000 move at once.

// Nop completes with 0.
func (e *SQE) Nop() { e.Opcode = OpNop }

// Read is pread(2).
func (e *SQE) Read(fd int, p []byte, off int64) { e.transfer(OpRead, fd, p, off) }

// Write is pwrite(2).
func (e *SQE) Write(fd int, p []byte, off int64) { e.transfer(OpWrite, fd, p, off) }

// ReadFixed is Read into memory that lies in the registered buffer.
func (e *SQE) ReadFixed(fd int, p []byte, off int64, buffer int) {
	e.transfer(OpReadFixed, fd, p, off)
	e.BufIndex = uint16(buffer)
}

// WriteFixed is Write from memory that lies in the registered buffer.
func (e *SQE) WriteFixed(fd int, p []byte, off int64, buffer int) {
	e.transfer(OpWriteFixed, fd, p, off)
	e.BufIndex = uint16(buffer)
}

func (e *SQE) transfer(op uint8, fd int, p []byte, off int64) {
	e.Opcode = op
	e.Fd = int32(fd)
	e.Off = uint64(off)
	e.Addr = uint64(uintptr(unsafe.Pointer(unsafe.SliceData(p))))
	e.Len = uint32(len(p))
}

// Readv is preadv(2). The kernel has read the vectors when Submit has taken the
// entry.
func (e *SQE) Readv(fd int, v []unix.Iovec, off int64) { e.vector(OpReadv, fd, v, off) }

// Writev is pwritev(2), as Readv.
func (e *SQE) Writev(fd int, v []unix.Iovec, off int64) { e.vector(OpWritev, fd, v, off) }

func (e *SQE) vector(op uint8, fd int, v []unix.Iovec, off int64) {
	e.Opcode = op
	e.Fd = int32(fd)
	e.Off = uint64(off)
	e.Addr = uint64(uintptr(unsafe.Pointer(unsafe.SliceData(v))))
	e.Len = uint32(len(v))
}

// Fsync is fsync(2), or fdatasync(2) with FsyncDatasync. It covers what has
// completed; to cover what was submitted before it, add the flag IODrain.
func (e *SQE) Fsync(fd int, flags uint32) {
	e.Opcode = OpFsync
	e.Fd = int32(fd)
	e.OpFlags = flags
}

// Fallocate is fallocate(2).
func (e *SQE) Fallocate(fd int, mode uint32, off, n int64) {
	e.Opcode = OpFallocate
	e.Fd = int32(fd)
	e.Off = uint64(off)
	e.Addr = uint64(n)
	e.Len = mode
}

// UringCmd is a command of the file's driver; its argument goes into
// Ring.Command.
func (e *SQE) UringCmd(fd int, op uint32) {
	e.Opcode = OpUringCmd
	e.Fd = int32(fd)
	e.Off = uint64(op)
}
