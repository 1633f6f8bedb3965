package blockio

import "golang.org/x/sys/unix"

// Cloner is a Device that can have two ranges share their space.
type Cloner interface {
	// Clone makes the n bytes at to what the n bytes at from are, without moving
	// them. All are multiples of BlockSize and the ranges do not overlap. Like a
	// write it is durable after Flush, and in parts after a crash. Where the file
	// system cannot do it: an error for which errors.Is(err,
	// errors.ErrUnsupported), and nothing has changed.
	Clone(to, from, n int64) error
}

// AsCloner finds a Cloner in d or what it wraps.
func AsCloner(d Device) (Cloner, bool) {
	for {
		if c, ok := d.(Cloner); ok {
			return c, true
		}
		w, ok := d.(Wrapper)
		if !ok {
			return nil, false
		}
		d = w.Unwrap()
	}
}

// Clone is FICLONERANGE (ioctl_ficlonerange(2)).
func (f *osFile) Clone(to, from, n int64) error {
	if n <= 0 || to < 0 || from < 0 || (to|from|n)%BlockSize != 0 || max(to, from) < min(to, from)+n {
		return f.failAt("clone", to, unix.EINVAL)
	}
	fd, err := f.hold()
	if err != nil {
		return err
	}
	defer f.release()
	f.content.RLock()
	defer f.content.RUnlock()
	arg := unix.FileCloneRange{Src_fd: int64(fd), Src_offset: uint64(from), Src_length: uint64(n), Dest_offset: uint64(to)}
	err = retryErr(func() error { return unix.IoctlFileCloneRange(fd, &arg) })
	switch err {
	case nil:
		f.meta.Add(1)
		return nil
	case unix.ENOTTY, unix.EINVAL, unix.EXDEV, unix.EISDIR:
		// No such call here, or the file system's blocks are larger than ours.
		err = unix.EOPNOTSUPP
	}
	return f.failAt("clone", to, err)
}
