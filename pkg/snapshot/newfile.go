package snapshot

import (
	"errors"
	"io/fs"
	"path"

	"github.com/snapmerge/snapmerge/pkg/blockio"
)

// newFile is a file in the making: it gets its name when it is complete and
// durable.
type newFile struct {
	blockio.File
	fsys blockio.FS
	name string
}

// tmpSuffix marks a file in the making. One that a crash left is replaced when
// the file is made again.
const tmpSuffix = ".tmp"

func createFile(fsys blockio.FS, name string) (*newFile, error) {
	if err := removeFile(fsys, name+tmpSuffix); err != nil {
		return nil, err
	}
	f, err := fsys.Open(name+tmpSuffix, blockio.Create|blockio.Excl)
	if err != nil {
		return nil, err
	}
	return &newFile{File: f, fsys: fsys, name: name}, nil
}

// removeFile removes a file that may be absent.
func removeFile(fsys blockio.FS, name string) error {
	if err := fsys.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// commit makes the content durable and gives the file its name, in place of a
// file of that name. The name is durable once the directory was synced.
func (f *newFile) commit() error {
	err := f.Flush()
	if closeErr := f.Close(); err == nil {
		err = closeErr
	}
	if err == nil {
		err = f.fsys.Rename(f.name+tmpSuffix, f.name)
	}
	if err != nil {
		return errors.Join(err, removeFile(f.fsys, f.name+tmpSuffix))
	}
	return nil
}

// abort removes the file; it must not have been committed. err is why, and is
// returned with what goes wrong here.
func (f *newFile) abort(err error) error {
	return errors.Join(err, f.Close(), removeFile(f.fsys, f.name+tmpSuffix))
}

// makeFile makes or replaces a file with what fill writes, durably. Nothing is
// changed if that fails.
func makeFile(fsys blockio.FS, name string, fill func(blockio.File) error) error {
	f, err := createFile(fsys, name)
	if err != nil {
		return err
	}
	if err := fill(f); err != nil {
		return f.abort(err)
	}
	if err := f.commit(); err != nil {
		return err
	}
	return fsys.SyncDir(path.Dir(name))
}
