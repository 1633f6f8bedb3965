package cow

import (
	"fmt"
	"io"
)

// FormatError says that a file breaks a rule of the format. Every refusal of
// bad input is a *FormatError or wraps one; errors of the storage are not.
type FormatError struct {
	// Offset is the file offset, in bytes, of what breaks the rule.
	Offset int64
	// Rule says what was found and what the format demands.
	Rule string
}

func (e *FormatError) Error() string {
	return fmt.Sprintf("byte %d: %s", e.Offset, e.Rule)
}

func badFormat(offset int64, format string, args ...any) error {
	return &FormatError{Offset: offset, Rule: fmt.Sprintf(format, args...)}
}

// readAt fills p from inside the file. The caller has checked the range against
// the file's size, so an end of file here is a file that shrank: a storage
// error, not a format error.
func readAt(r io.ReaderAt, p []byte, off int64) error {
	n, err := r.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	if err == io.EOF || err == nil {
		err = io.ErrUnexpectedEOF
	}
	return fmt.Errorf("read %d bytes at %d: %w", len(p), off, err)
}
