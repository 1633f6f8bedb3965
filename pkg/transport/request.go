package transport

import (
	"errors"
	"fmt"
	"io"

	"golang.org/x/sys/unix"
)

// Op is what a request of the kernel wants.
type Op uint8

// Operations.
const (
	OpRead Op = iota
	OpWrite
	OpFlush
	OpZero // write-zeroes and discard
)

func (o Op) String() string {
	return [...]string{"read", "write", "flush", "zero"}[o]
}

// Request is one of the kernel, in bytes.
type Request struct {
	Op     Op
	FUA    bool // what is written is durable when the request is answered
	Off, N int64
}

// ErrRange says that a request goes beyond the end of the volume.
var ErrRange = errors.New("beyond the end of the volume")

// Serve carries a request out. p is N bytes, of a read or write. A volume that is
// smaller than its device, or was to be read only, refuses.
func Serve(b Backend, readOnly bool, r Request, p []byte) error {
	if r.Op == OpFlush {
		return b.Flush()
	}
	if size := b.Size(); r.N < 0 || r.Off < 0 || r.Off > size || r.N > size-r.Off {
		return fmt.Errorf("%w: %s of %d bytes at %d, size %d", ErrRange, r.Op, r.N, r.Off, size)
	}
	if readOnly && r.Op != OpRead {
		return unix.EROFS
	}
	var n int
	var err error
	switch r.Op {
	case OpRead:
		n, err = b.ReadAt(p, r.Off)
		return Whole(n, len(p), err)
	case OpWrite:
		n, err = b.WriteAt(p, r.Off)
		err = Whole(n, len(p), err)
	default:
		err = b.Zero(r.Off, r.N)
	}
	if err == nil && r.FUA {
		err = b.Flush()
	}
	return err
}

// Whole turns a short transfer into an error.
func Whole(n, want int, err error) error {
	switch {
	case n == want && errors.Is(err, io.EOF):
		return nil
	case n != want && err == nil:
		return io.ErrUnexpectedEOF
	}
	return err
}

// Errno is the errno of an error, from 1 to 511, EIO if it has none.
func Errno(err error) unix.Errno {
	var errno unix.Errno
	if !errors.As(err, &errno) || errno < 1 || errno > 511 {
		return unix.EIO
	}
	return errno
}
