package blockio

import (
	"io"

	"golang.org/x/sys/unix"
)

func (f *osFile) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, f.failAt("read", off, unix.EINVAL)
	}
	fd, err := f.hold()
	if err != nil {
		return 0, err
	}
	defer f.release()
	done := 0
	for done < len(p) {
		rest, at := p[done:], off+int64(done)
		var n int
		if aligned(rest, at, f.align) {
			n, err = retry(func() (int, error) { return unix.Pread(fd, rest, at) })
		} else {
			n, err = f.readBounced(fd, rest, at)
		}
		if err != nil {
			return done, f.failAt("read", at, err)
		}
		if n == 0 {
			return done, io.EOF
		}
		done += n
	}
	return done, nil
}

// readBounced reads the beginning of p through an aligned buffer; 0 bytes mean
// the end of the file.
func (f *osFile) readBounced(fd int, p []byte, off int64) (int, error) {
	buf := getBounce()
	defer putBounce(buf)
	mask := int64(f.align - 1)
	low := off &^ mask
	high := min((off+int64(len(p))+mask)&^mask, low+bounceSize)
	n, err := retry(func() (int, error) { return unix.Pread(fd, (*buf)[:high-low], low) })
	if err != nil || int64(n) <= off-low {
		return 0, err
	}
	return copy(p, (*buf)[off-low:n]), nil
}

func (f *osFile) WriteAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, f.failAt("write", off, unix.EINVAL)
	}
	fd, err := f.hold()
	if err != nil {
		return 0, err
	}
	defer f.release()
	return f.write(fd, p, off)
}

// write is WriteAt with the descriptor held.
func (f *osFile) write(fd int, p []byte, off int64) (done int, err error) {
	for done < len(p) {
		rest, at := p[done:], off+int64(done)
		var n int
		if aligned(rest, at, f.align) {
			f.content.RLock()
			n, err = retry(func() (int, error) { return unix.Pwrite(fd, rest, at) })
			f.content.RUnlock()
		} else {
			n, err = f.writeBounced(fd, rest, at)
		}
		if err == nil && n == 0 {
			err = io.ErrShortWrite
		}
		if err != nil {
			return done, f.failAt("write", at, err)
		}
		done += n
	}
	return done, nil
}

// writeBounced writes the beginning of p through an aligned buffer. Where the
// range begins or ends inside an alignment unit, the unit is read, changed and
// written back while no other write is in progress. A file that ends inside a
// unit is cut back to its length afterwards, so a crash in between leaves it
// longer by some zeros.
func (f *osFile) writeBounced(fd int, p []byte, off int64) (int, error) {
	pooled := getBounce()
	defer putBounce(pooled)
	unit := int64(f.align)
	low := off &^ (unit - 1)
	high := min((off+int64(len(p))+unit-1)&^(unit-1), low+bounceSize)
	end := min(off+int64(len(p)), high)
	buf := (*pooled)[:high-low]

	if low == off && high == end { // memory alone was not aligned
		copy(buf, p)
		f.content.RLock()
		defer f.content.RUnlock()
		return retry(func() (int, error) { return unix.Pwrite(fd, buf, off) })
	}

	f.content.Lock()
	defer f.content.Unlock()
	size, err := f.size()
	if err != nil {
		return 0, err
	}
	if low < off {
		if err := readUnit(fd, buf[:unit], low, size); err != nil {
			return 0, err
		}
	}
	if last := high - unit; end < high && (last > low || low == off) {
		if err := readUnit(fd, buf[last-low:], last, size); err != nil {
			return 0, err
		}
	}
	copy(buf[off-low:end-low], p)
	n, err := retry(func() (int, error) { return unix.Pwrite(fd, buf, low) })
	if err != nil {
		return 0, err
	}
	length := max(size, end)
	if !f.block && low+int64(n) > length {
		if err := retryErr(func() error { return unix.Ftruncate(fd, length) }); err != nil {
			return 0, err
		}
		f.meta.Add(1)
	}
	return int(max(min(low+int64(n), end)-off, 0)), nil
}

// readUnit fills p, one alignment unit at off, with zeros beyond the file's
// length.
func readUnit(fd int, p []byte, off, size int64) error {
	n, err := retry(func() (int, error) { return unix.Pread(fd, p, off) })
	if err != nil {
		return err
	}
	if n < len(p) && off+int64(n) < size {
		return io.ErrUnexpectedEOF
	}
	clear(p[n:])
	return nil
}
