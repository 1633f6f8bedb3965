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

// WriteFileAtomic replaces the content of name: after a crash at any moment the
// file holds all of the old content (or is absent, if it was) or all of data,
// and data once it has returned nil. After an error either may be there. Only
// one writer of a name at a time.
func WriteFileAtomic(fsys FS, name string, data []byte) error {
	tmp := name + tmpSuffix
	if err := fsys.Remove(tmp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("replace %s: %w", name, err)
	}
	f, err := fsys.Open(tmp, Create|Excl)
	if err != nil {
		return fmt.Errorf("replace %s: %w", name, err)
	}
	_, err = f.WriteAt(data, 0)
	if err == nil {
		err = f.Flush()
	}
	if closeErr := f.Close(); err == nil {
		err = closeErr
	}
	if err == nil {
		err = fsys.Rename(tmp, name)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("replace %s: %w", name, err), fsys.Remove(tmp))
	}
	if err := fsys.SyncDir(path.Dir(name)); err != nil {
		return fmt.Errorf("replace %s: %w", name, err)
	}
	return nil
}
