package ublk

import (
	"errors"
	"io"

	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"

	"github.com/snapmerge/snapmerge/pkg/transport"
)

// serve carries a request out and returns its result: bytes done, or minus
// errno. p is the buffer of the request.
func serve(b transport.Backend, readOnly bool, d ioDesc, p []byte) int32 {
	if d.op == opFlush {
		return result(0, b.Flush())
	}
	size := b.Size()
	if d.n < 0 || d.off < 0 || d.off > size || d.n > size-d.off {
		klog.ErrorS(nil, "Refused a request beyond the end of the volume", "op", d.op, "offset", d.off, "length", d.n, "size", size)
		return -int32(unix.EIO)
	}
	if readOnly && d.op != opRead {
		return -int32(unix.EROFS)
	}
	switch d.op {
	case opRead, opWrite:
		if d.n > int64(len(p)) {
			return -int32(unix.EIO)
		}
		p = p[:d.n]
	case opDiscard, opWriteZeroes:
	default:
		return -int32(unix.EIO)
	}
	var err error
	switch d.op {
	case opRead:
		n, e := b.ReadAt(p, d.off)
		err = whole(n, len(p), e)
	case opWrite:
		n, e := b.WriteAt(p, d.off)
		err = whole(n, len(p), e)
	default:
		err = b.Zero(d.off, d.n)
	}
	if err == nil && d.fua {
		err = b.Flush()
	}
	return result(d.n, err)
}

// whole turns a short transfer into an error.
func whole(n, want int, err error) error {
	switch {
	case n == want && errors.Is(err, io.EOF):
		return nil
	case n != want && err == nil:
		return io.ErrUnexpectedEOF
	}
	return err
}

// result is what the kernel is told of n bytes done or an error.
func result(n int64, err error) int32 {
	if err == nil {
		return int32(n)
	}
	var errno unix.Errno
	if !errors.As(err, &errno) || errno < 1 || errno > 511 {
		return -int32(unix.EIO)
	}
	switch errno {
	case unix.EOPNOTSUPP, unix.ENOSYS, unix.ENODEV, unix.EINTR, unix.EAGAIN:
		// To the kernel they mean something else than that this request has failed:
		// no discards any more, device gone, try again.
		return -int32(unix.EIO)
	}
	return -int32(errno)
}
