// Package exitcode turns errors into the exit codes that the command promises.
package exitcode

import (
	"context"
	"errors"
	"syscall"

	"github.com/snapmerge/snapmerge/pkg/attach"
	"github.com/snapmerge/snapmerge/pkg/cow"
	"github.com/snapmerge/snapmerge/pkg/driver"
	"github.com/snapmerge/snapmerge/pkg/merge"
	"github.com/snapmerge/snapmerge/pkg/offline"
	"github.com/snapmerge/snapmerge/pkg/snapshot"
	"github.com/snapmerge/snapmerge/pkg/volume"
	"github.com/snapmerge/snapmerge/pkg/volume/writelog"
)

const (
	Done      = 0
	Failed    = 1 // I/O, environment, second owner
	Usage     = 2
	BadInput  = 3 // corrupt, unsupported, mismatched
	Differs   = 4 // verification found a difference
	Resumable = 5 // interrupted or out of space; run it again
)

// UsageError says that a command was called wrongly.
type UsageError struct{ Err error }

func (e *UsageError) Error() string { return e.Err.Error() }
func (e *UsageError) Unwrap() error { return e.Err }

// Of is the exit code for err.
func Of(err error) int {
	var (
		usage  *UsageError
		format *cow.FormatError
		base   *offline.BaseError
		small  *merge.BaseTooSmallError
		differ *offline.DifferenceError
	)
	switch {
	case err == nil:
		return Done
	case errors.As(err, &usage), errors.Is(err, offline.ErrNeedsBase), errors.Is(err, driver.ErrConfig):
		return Usage
	case errors.Is(err, context.Canceled), errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		return Resumable
	case errors.As(err, &differ):
		return Differs
	case errors.As(err, &format), errors.As(err, &base), errors.As(err, &small):
		return BadInput
	}
	for _, bad := range badInput {
		if errors.Is(err, bad) {
			return BadInput
		}
	}
	return Failed
}

// badInput are the errors of packages that say what is wrong with a file.
var badInput = []error{
	attach.ErrState, merge.ErrDamaged, merge.ErrMismatch, snapshot.ErrIndex, snapshot.ErrMismatch, snapshot.ErrSums,
	volume.ErrRecord, volume.ErrNewer, writelog.ErrDamaged,
}
