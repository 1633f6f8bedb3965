package blockio

import (
	"fmt"
	"io/fs"

	"golang.org/x/sys/unix"
)

func (f *osFile) Xattr(name string) ([]byte, error) {
	fd, err := f.holdXattr(name)
	if err != nil {
		return nil, err
	}
	defer f.release()
	buf := make([]byte, 256)
	for {
		n, err := retry(func() (int, error) { return unix.Fgetxattr(fd, name, buf) })
		switch err {
		case nil:
			return buf[:n], nil
		case unix.ERANGE:
			buf = make([]byte, 4*len(buf)) // ends at the kernel's XATTR_SIZE_MAX, 64 KiB
		case unix.ENODATA:
			return nil, f.fail("get "+name+" of", fmt.Errorf("%w: %w", fs.ErrNotExist, err))
		default:
			return nil, f.fail("get "+name+" of", err)
		}
	}
}

func (f *osFile) SetXattr(name string, value []byte) error {
	fd, err := f.holdXattr(name)
	if err != nil {
		return err
	}
	defer f.release()
	if err := retryErr(func() error { return unix.Fsetxattr(fd, name, value, 0) }); err != nil {
		return f.fail("set "+name+" of", err)
	}
	f.meta.Add(1)
	return nil
}

func (f *osFile) RemoveXattr(name string) error {
	fd, err := f.holdXattr(name)
	if err != nil {
		return err
	}
	defer f.release()
	err = retryErr(func() error { return unix.Fremovexattr(fd, name) })
	if err != nil && err != unix.ENODATA {
		return f.fail("remove "+name+" of", err)
	}
	f.meta.Add(1)
	return nil
}

// holdXattr is hold for what a device node cannot carry: the kernel answers
// EPERM or "absent" there, which would mislead.
func (f *osFile) holdXattr(name string) (fd int, err error) {
	if f.block {
		return -1, f.fail("attribute "+name+" of", unix.EOPNOTSUPP)
	}
	return f.hold()
}
