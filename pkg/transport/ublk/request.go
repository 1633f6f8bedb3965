package ublk

import (
	"errors"

	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"

	"github.com/snapmerge/snapmerge/pkg/transport"
)

// operations by the kernel's numbers.
var operations = map[ioOp]transport.Op{
	opRead: transport.OpRead, opWrite: transport.OpWrite, opFlush: transport.OpFlush,
	opDiscard: transport.OpZero, opWriteZeroes: transport.OpZero,
}

// serve carries a request out and returns its result: bytes done, or minus
// errno. p is the buffer of the request.
func serve(b transport.Backend, readOnly bool, d ioDesc, p []byte) int32 {
	op, known := operations[d.op]
	switch op {
	case transport.OpRead, transport.OpWrite:
		if !known || d.n > int64(len(p)) || d.n < 0 {
			return -int32(unix.EIO)
		}
		p = p[:d.n]
	case transport.OpFlush:
		d.n = 0
	}
	err := transport.Serve(b, readOnly, transport.Request{Op: op, FUA: d.fua, Off: d.off, N: d.n}, p)
	if errors.Is(err, transport.ErrRange) {
		klog.ErrorS(err, "Refused a request")
	}
	return result(d.n, err)
}

// result is what the kernel is told of n bytes done or an error.
func result(n int64, err error) int32 {
	if err == nil {
		return int32(n)
	}
	errno := transport.Errno(err)
	switch errno {
	case unix.EOPNOTSUPP, unix.ENOSYS, unix.ENODEV, unix.EINTR, unix.EAGAIN:
		// To the kernel they mean something else than that this request has failed:
		// no discards any more, device gone, try again.
		errno = unix.EIO
	}
	return -int32(errno)
}
