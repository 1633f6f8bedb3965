package snapshot

import (
	"errors"
	"fmt"
	"io"
)

var (
	// ErrIndex says that an index is damaged, cannot be read, or is not that of
	// the COW. The COW itself may be fine: it can be loaded without the index.
	ErrIndex = errors.New("bad index")
	// ErrSums says that sums are damaged or cannot be read, not that the COW is.
	ErrSums = errors.New("bad sums")
	// ErrMismatch says that a COW does not have the content that was summed.
	ErrMismatch = errors.New("does not match its sums")
)

// FormatError says which rule a file breaks and where. It wraps ErrIndex,
// ErrSums or ErrMismatch.
type FormatError struct {
	File string
	// Offset is the file offset, in bytes, of what breaks the rule.
	Offset int64
	// Rule says what was found and what is demanded.
	Rule string
	kind error
}

func (e *FormatError) Error() string {
	return fmt.Sprintf("%s: %v: byte %d: %s", e.File, e.kind, e.Offset, e.Rule)
}

// Unwrap returns the sentinel.
func (e *FormatError) Unwrap() error { return e.kind }

// readFull fills p from inside the file: its range was checked against the
// size, so the end of the file here means that the file shrank.
func readFull(r io.ReaderAt, p []byte, off int64) error {
	n, err := r.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	if err == nil || err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return fmt.Errorf("read %d bytes at %d: %w", len(p), off, err)
}
