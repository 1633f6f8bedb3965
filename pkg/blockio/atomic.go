package blockio

import (
	"errors"
	"fmt"
	"io/fs"
	"path"
)

// tmpSuffix is what WriteFileAtomic appends to a name for the new content. A
// crash may leave such a file; the next WriteFileAtomic of the name replaces it.
const tmpSuffix = ".tmp"

// ErrUnchanged is part of an error of WriteFileAtomic if the old content is sure
// to be there still.
var ErrUnchanged = errors.New("nothing was changed")

// WriteFileAtomic replaces the content of name: after a crash at any moment the
// file holds all of the old content (or is absent, if it was) or all of data,
// and data once it has returned nil. After an error either may be there, unless
// the error is ErrUnchanged. Only one writer of a name at a time.
func WriteFileAtomic(fsys FS, name string, data []byte) error {
	tmp := name + tmpSuffix
	if err := writeTemp(fsys, tmp, data); err != nil {
		return fmt.Errorf("replace %s: %w; %w", name, err, ErrUnchanged)
	}
	if err := fsys.Rename(tmp, name); err != nil {
		return errors.Join(fmt.Errorf("replace %s: %w", name, err), fsys.Remove(tmp))
	}
	if err := fsys.SyncDir(path.Dir(name)); err != nil {
		return fmt.Errorf("replace %s: %w", name, err)
	}
	return nil
}

// writeTemp makes a file with the content, durably but for its name.
func writeTemp(fsys FS, tmp string, data []byte) error {
	if err := fsys.Remove(tmp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	f, err := fsys.Open(tmp, Create|Excl)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(data, 0)
	if err == nil {
		err = f.Flush()
	}
	if closeErr := f.Close(); err == nil {
		err = closeErr
	}
	if err != nil {
		return errors.Join(err, fsys.Remove(tmp))
	}
	return nil
}
