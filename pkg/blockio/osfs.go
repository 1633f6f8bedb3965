package blockio

import (
	"errors"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"
)

// Modes of what OS creates: volumes hold other people's data, so nobody but
// the owner gets in.
const (
	fileMode = 0o600
	dirMode  = 0o700
)

type osFS struct{}

// OS is the file system of the machine. Files may be regular files and block
// devices, nothing else.
func OS() FS { return osFS{} }

func (osFS) Open(name string, flag Flag) (File, error) {
	f, err := openFile(name, flag)
	if err != nil {
		return nil, err // not f: a nil *osFile makes a File that is not nil
	}
	return f, nil
}

func (osFS) ReadFile(name string) ([]byte, error) { return os.ReadFile(name) }

func (osFS) Rename(oldName, newName string) error { return os.Rename(oldName, newName) }

func (osFS) Link(oldName, newName string) error { return os.Link(oldName, newName) }

func (osFS) Remove(name string) error { return os.Remove(name) }

func (osFS) RemoveAll(name string) error { return os.RemoveAll(name) }

func (osFS) Mkdir(name string) error { return os.Mkdir(name, dirMode) }

func (osFS) ReadDir(name string) ([]string, error) {
	entries, err := os.ReadDir(name) // sorted
	if err != nil {
		return nil, err
	}
	names := make([]string, len(entries))
	for i, e := range entries {
		names[i] = e.Name()
	}
	return names, nil
}

func (osFS) Exists(name string) (bool, error) {
	_, err := os.Lstat(name)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil, err
}

func (osFS) SyncDir(name string) error {
	fd, err := retry(func() (int, error) {
		return unix.Open(name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	})
	if err != nil {
		return &fs.PathError{Op: "open directory", Path: name, Err: err}
	}
	defer unix.Close(fd)
	if err := retryErr(func() error { return unix.Fsync(fd) }); err != nil {
		return &fs.PathError{Op: "sync directory", Path: name, Err: err}
	}
	return nil
}

// retry calls f again for as long as a signal interrupts it.
func retry[T any](f func() (T, error)) (T, error) {
	for {
		v, err := f()
		if err != unix.EINTR {
			return v, err
		}
	}
}

// retryErr is retry for calls that return an error alone.
func retryErr(f func() error) error {
	for {
		if err := f(); err != unix.EINTR {
			return err
		}
	}
}
