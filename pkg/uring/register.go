package uring

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// RegisterBuffers gives the kernel buffers for ReadFixed and WriteFixed, which
// name them by index. Their memory must stay until UnregisterBuffers or Close
// and lie outside the Go heap. It counts as locked memory (RLIMIT_MEMLOCK).
func (r *Ring) RegisterBuffers(buffers [][]byte) error {
	if len(buffers) == 0 {
		return os.NewSyscallError("io_uring_register buffers", unix.EINVAL)
	}
	v := make([]unix.Iovec, len(buffers))
	for i, b := range buffers {
		v[i] = unix.Iovec{Base: unsafe.SliceData(b), Len: uint64(len(b))}
	}
	return r.register("buffers", registerBuffers, unsafe.Pointer(&v[0]), len(v))
}

// UnregisterBuffers waits for transfers in flight on them.
func (r *Ring) UnregisterBuffers() error {
	return r.register("no buffers", unregisterBuffers, nil, 0)
}

// RegisterFiles gives the ring file descriptors that entries with the flag
// FixedFile name by index. The ring holds the files open until UnregisterFiles
// or Close.
func (r *Ring) RegisterFiles(fds []int32) error {
	if len(fds) == 0 {
		return os.NewSyscallError("io_uring_register files", unix.EINVAL)
	}
	return r.register("files", registerFiles, unsafe.Pointer(&fds[0]), len(fds))
}

// UnregisterFiles waits for transfers in flight on them.
func (r *Ring) UnregisterFiles() error {
	return r.register("no files", unregisterFiles, nil, 0)
}

// register is io_uring_register(2).
func (r *Ring) register(what string, op uint32, arg unsafe.Pointer, n int) error {
	if r.closed() {
		return errClosed
	}
	for {
		_, _, errno := unix.Syscall6(unix.SYS_IO_URING_REGISTER, uintptr(r.Fd()), uintptr(op), uintptr(arg), uintptr(n), 0, 0)
		if errno == 0 {
			return nil
		}
		if errno != unix.EINTR {
			return os.NewSyscallError("io_uring_register "+what, errno)
		}
	}
}

var errClosed = fmt.Errorf("io_uring: %w", os.ErrClosed)

// Probe tells what a kernel can do (struct io_uring_probe).
type Probe struct {
	lastOp, opsLen uint8
	_              uint16
	_              [3]uint32
	ops            [256]struct {
		op, _ uint8
		flags uint16
		_     uint32
	}
}

// Probe asks the kernel; it must be 5.6 or newer.
func (r *Ring) Probe() (*Probe, error) {
	p := new(Probe)
	err := r.register("probe", registerProbe, unsafe.Pointer(p), len(p.ops))
	runtime.KeepAlive(p)
	if err != nil {
		return nil, err
	}
	return p, nil
}

// Supports tells whether the kernel knows the opcode.
func (p *Probe) Supports(op uint8) bool {
	return op < p.opsLen && p.ops[op].flags&1 != 0
}

// setupError explains why there is no ring.
func setupError(err error) error {
	hint := ""
	switch {
	case errors.Is(err, unix.ENOSYS):
		hint = ": the kernel has no io_uring, or a seccomp profile hides it"
	case errors.Is(err, unix.EPERM):
		hint = ": forbidden by kernel.io_uring_disabled or a seccomp profile"
	case errors.Is(err, unix.ENOMEM):
		hint = ": out of memory, or over RLIMIT_MEMLOCK on an old kernel"
	}
	return fmt.Errorf("io_uring_setup: %w%s", err, hint)
}
