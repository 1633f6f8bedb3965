package offline

import (
	"errors"
	"fmt"
	"io/fs"
	"path"

	"github.com/snapmerge/snapmerge/pkg/blockio"
)

// partSuffix marks a file that Extract has not finished. It is a long one because
// such a file is removed without asking.
const partSuffix = ".snapmerge-extract"

// createPart makes an unfinished file and locks it. What a killed run has left is
// replaced, but not the file of a run that goes on.
func createPart(fsys blockio.FS, name string) (blockio.File, error) {
	if err := removeLeftover(fsys, name); err != nil {
		return nil, err
	}
	f, err := fsys.Open(name, blockio.Create|blockio.Excl)
	if err != nil {
		return nil, err
	}
	if err := lockPart(f); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

func removeLeftover(fsys blockio.FS, name string) error {
	f, err := fsys.Open(name, blockio.ReadOnly)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if err = lockPart(f); err == nil {
		err = fsys.Remove(name)
	}
	return errors.Join(err, f.Close())
}

// lockPart locks an unfinished file, and finds out if another run removed it before.
func lockPart(f blockio.File) error {
	err := f.Lock()
	if err == nil {
		var links uint64
		if links, err = f.Links(); err == nil && links == 0 {
			err = blockio.ErrLocked
		}
	}
	if errors.Is(err, blockio.ErrLocked) {
		return fmt.Errorf("%s: the same file is being made: %w", f.Name(), err)
	}
	return err
}

// publish gives the finished file its name, unless that is in use, durably.
func publish(fsys blockio.FS, part, name string) error {
	err := fsys.Link(part, name)
	if errors.Is(err, fs.ErrPermission) || errors.Is(err, errors.ErrUnsupported) { // no hard links here, as on vfat
		if err = checkAbsent(fsys, name); err == nil {
			err = fsys.Rename(part, name)
		}
	}
	if err != nil {
		return err
	}
	return fsys.SyncDir(path.Dir(name))
}

func checkAbsent(fsys blockio.FS, name string) error {
	ok, err := fsys.Exists(name)
	if err == nil && ok {
		err = &fs.PathError{Op: "make", Path: name, Err: fs.ErrExist}
	}
	return err
}
