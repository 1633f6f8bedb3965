package driver

import (
	"context"
	"errors"
	"fmt"
	"syscall"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/snapmerge/snapmerge/pkg/snapshot"
	"github.com/snapmerge/snapmerge/pkg/transport"
	"github.com/snapmerge/snapmerge/pkg/transport/choose"
	"github.com/snapmerge/snapmerge/pkg/volume"
)

// What the driver itself finds wrong. Each is a gRPC code; the sentinels of the
// packages below are translated here as well.
var (
	errInvalid      = errors.New("invalid request")
	errNotFound     = errors.New("not found")
	errIncompatible = errors.New("exists, but not as asked for")
	errRange        = errors.New("size out of range")
	errState        = errors.New("not possible now")
	errContent      = errors.New("content of the volume is not usable")
	errElsewhere    = errors.New("not on this node")
	errAborted      = errors.New("another operation on it is under way")
	errToken        = errors.New("begin the listing again")
	errStarting     = errors.New("the node plugin is starting")
)

// table gives errors their codes. The first that matches counts, so what the
// driver says of an error goes before what a package below has said.
var table = []struct {
	err  error
	code codes.Code
}{
	{errInvalid, codes.InvalidArgument},
	{errNotFound, codes.NotFound},
	{errIncompatible, codes.AlreadyExists},
	{errRange, codes.OutOfRange},
	{errState, codes.FailedPrecondition},
	{errContent, codes.FailedPrecondition},
	// The scheduler looks for another node.
	{errElsewhere, codes.ResourceExhausted},
	{errAborted, codes.Aborted},
	{errToken, codes.Aborted},
	{errStarting, codes.Unavailable},
	{errHangs, codes.Unavailable},
	{errGrowing, codes.Aborted},

	{volume.ErrNotFound, codes.NotFound},
	{snapshot.ErrNotFound, codes.NotFound},
	{volume.ErrConflict, codes.AlreadyExists},
	{volume.ErrStaged, codes.FailedPrecondition},
	{transport.ErrBusy, codes.FailedPrecondition},
	{choose.ErrUnavailable, codes.FailedPrecondition},
	{transport.ErrNoResize, codes.FailedPrecondition}, // kubelet grows it when the pod is gone
	{volume.ErrSnapshotFailed, codes.FailedPrecondition},
	{volume.ErrCutInFlight, codes.Aborted},
	{volume.ErrNative, codes.Unavailable},
	{volume.ErrOffline, codes.FailedPrecondition},
	{volume.ErrNotReady, codes.Unavailable},
	{volume.ErrInUse, codes.Unavailable},
	{volume.ErrPoolFull, codes.ResourceExhausted},
	{syscall.ENOSPC, codes.ResourceExhausted},
	{syscall.EDQUOT, codes.ResourceExhausted},
	{context.DeadlineExceeded, codes.DeadlineExceeded},
	{context.Canceled, codes.Canceled},
}

// code is the gRPC code of an error.
func code(err error) codes.Code {
	if err == nil {
		return codes.OK
	}
	for _, t := range table {
		if errors.Is(err, t.err) {
			return t.code
		}
	}
	if s, ok := status.FromError(err); ok { // of a call that the generated server answers itself
		return s.Code()
	}
	return codes.Internal
}

// toStatus is err as gRPC sends it.
func toStatus(err error) error {
	if err == nil {
		return nil
	}
	if _, ok := err.(interface{ GRPCStatus() *status.Status }); ok {
		return err
	}
	return status.Error(code(err), err.Error())
}

func invalid(format string, args ...any) error {
	return fmt.Errorf("%w: %w", errInvalid, fmt.Errorf(format, args...))
}

// full tells whether err says that there is no room.
func full(err error) bool {
	return errors.Is(err, volume.ErrPoolFull) || errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT)
}
