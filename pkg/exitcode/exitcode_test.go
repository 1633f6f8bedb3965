package exitcode

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"syscall"
	"testing"

	"github.com/snapmerge/snapmerge/pkg/blockio"
	"github.com/snapmerge/snapmerge/pkg/cow"
	"github.com/snapmerge/snapmerge/pkg/driver"
	"github.com/snapmerge/snapmerge/pkg/merge"
	"github.com/snapmerge/snapmerge/pkg/offline"
	"github.com/snapmerge/snapmerge/pkg/volume"
)

func TestOf(t *testing.T) {
	for _, tt := range []struct {
		err  error
		want int
	}{
		{nil, Done},
		{errors.New("anything"), Failed},
		{fs.ErrNotExist, Failed},
		{syscall.EIO, Failed},
		{blockio.ErrLocked, Failed},
		{fmt.Errorf("%w: %w", volume.ErrInUse, blockio.ErrLocked), Failed},
		{&UsageError{errors.New("x")}, Usage},
		{offline.ErrNeedsBase, Usage},
		{driver.ErrConfig, Usage},
		{&cow.FormatError{}, BadInput},
		{&offline.BaseError{}, BadInput},
		{&merge.BaseTooSmallError{}, BadInput},
		{merge.ErrDamaged, BadInput},
		{merge.ErrMismatch, BadInput},
		{volume.ErrRecord, BadInput},
		{&offline.DifferenceError{}, Differs},
		{context.Canceled, Resumable},
		{&fs.PathError{Err: syscall.ENOSPC}, Resumable},
		{syscall.EDQUOT, Resumable},
		// What happened on the way down does not hide why.
		{errors.Join(&cow.FormatError{}, errors.New("close")), BadInput},
		{errors.Join(context.Canceled, syscall.EIO), Resumable},
	} {
		for _, err := range []error{tt.err, wrap(tt.err)} {
			if got := Of(err); got != tt.want {
				t.Errorf("%T %v: %d, want %d", err, err, got, tt.want)
			}
		}
	}
}

func wrap(err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("file: %w", err)
}
