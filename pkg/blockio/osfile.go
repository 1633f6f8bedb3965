package blockio

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// osFile is a regular file or a block device of the machine.
type osFile struct {
	name  string
	block bool // a block device
	// align is what offset, length and address of a transfer must be multiples
	// of to go straight to fd: a power of two up to BlockSize with direct I/O,
	// 1 without.
	align int

	// use is held shared while fd is in use and exclusively by Close: a
	// descriptor that was closed and given out again would let a transfer hit
	// another file. Never take it twice in one call chain: a waiting Close
	// stands between the two.
	use sync.RWMutex
	fd  int // -1 once closed

	// content is held shared by plain changes of content, and exclusively by
	// whoever writes back what it has looked at before: the rest of a block, the
	// length.
	content sync.RWMutex

	// meta counts the changes that fdatasync need not cover (attributes, and on
	// some file systems allocation); metaSynced is the count at the last fsync.
	meta, metaSynced atomic.Int64

	// failed is the first error of a flush. The kernel reports a failed
	// write-back once and then calls the pages clean, so a flush that succeeds
	// later proves nothing.
	failed   atomic.Pointer[error]
	flushing sync.Mutex // held by Flush
}

func openFile(name string, flag Flag) (*osFile, error) {
	// Non-blocking for the open alone, lest a FIFO hang us.
	mode := unix.O_CLOEXEC | unix.O_NONBLOCK
	if flag&ReadOnly != 0 {
		mode |= unix.O_RDONLY
	} else {
		mode |= unix.O_RDWR
	}
	if flag&Create != 0 {
		mode |= unix.O_CREAT
	}
	if flag&Excl != 0 {
		mode |= unix.O_EXCL
	}
	// Without O_CREAT the flag claims a block device, or fails if it is mounted,
	// or part of a device-mapper table, or claimed so by somebody else.
	claim := flag&(ReadOnly|Create) == 0 && isBlockDevice(name)
	if claim {
		mode |= unix.O_EXCL
	}
	fd, err := retry(func() (int, error) { return unix.Open(name, mode, fileMode) })
	if claim && err == unix.EBUSY {
		return nil, &fs.PathError{Op: "open", Path: name, Err: fmt.Errorf("%w: the device is mounted or otherwise in use (%w)", ErrLocked, err)}
	}
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: name, Err: err}
	}
	f := &osFile{name: name, fd: fd, align: 1}
	if err := f.init(flag); err != nil {
		unix.Close(fd)
		return nil, err
	}
	return f, nil
}

func isBlockDevice(name string) bool {
	var st unix.Stat_t
	return unix.Stat(name, &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFBLK
}

func (f *osFile) init(flag Flag) error {
	var st unix.Stat_t
	if err := unix.Fstat(f.fd, &st); err != nil {
		return f.fail("stat", err)
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
	case unix.S_IFBLK:
		f.block = true
	default:
		return f.fail("open", errors.New("neither a regular file nor a block device"))
	}
	fl, err := unix.FcntlInt(uintptr(f.fd), unix.F_GETFL, 0)
	if err != nil {
		return f.fail("get flags", err)
	}
	fl &^= unix.O_NONBLOCK
	if _, err := unix.FcntlInt(uintptr(f.fd), unix.F_SETFL, fl); err != nil {
		return f.fail("set flags", err)
	}
	if _, err := f.size(); err != nil {
		return f.fail("get size", err)
	}
	if flag&Direct == 0 {
		return nil
	}
	// Buffered pages and direct transfers must not mix: what the cache holds
	// goes to the disk first and then out of memory.
	if err := retryErr(func() error { return unix.Fsync(f.fd) }); err != nil {
		return f.fail("sync", err)
	}
	if err := unix.Fadvise(f.fd, 0, 0, unix.FADV_DONTNEED); err != nil {
		return f.fail("drop cached pages", err)
	}
	if f.align, err = setDirect(f.fd, fl); err != nil {
		return f.fail("set direct I/O", err)
	}
	return nil
}

func (f *osFile) fail(op string, err error) error {
	return &fs.PathError{Op: op, Path: f.name, Err: err}
}

// failAt is fail for an operation at an offset.
func (f *osFile) failAt(op string, off int64, err error) error {
	return ioError(op, f.name, off, err)
}

func ioError(op, name string, off int64, err error) error {
	return &fs.PathError{Op: fmt.Sprintf("%s at %d", op, off), Path: name, Err: err}
}

// hold keeps the descriptor open until release.
func (f *osFile) hold() (fd int, err error) {
	f.use.RLock()
	if f.fd < 0 {
		f.use.RUnlock()
		return -1, f.fail("use", fs.ErrClosed)
	}
	return f.fd, nil
}

func (f *osFile) release() { f.use.RUnlock() }

// Raw is the descriptor, and the alignment in bytes that offset, length and
// address of a transfer need to go straight to it (1: any). The descriptor is
// good until Close.
func (f *osFile) Raw() (fd, align int) { return f.fd, f.align }

// Lend implements Lender.
func (f *osFile) Lend(off, n int64, write bool) (fd int, back func(), ok bool) {
	if (off|n)&int64(f.align-1) != 0 || !f.use.TryRLock() {
		return -1, nil, false
	}
	if f.fd < 0 || write && !f.content.TryRLock() {
		f.use.RUnlock()
		return -1, nil, false
	}
	return f.fd, func() {
		if write {
			f.content.RUnlock()
		}
		f.use.RUnlock()
	}, true
}

func (f *osFile) Name() string { return f.name }

func (f *osFile) Close() error {
	f.use.Lock()
	defer f.use.Unlock()
	if f.fd < 0 {
		return f.fail("close", fs.ErrClosed)
	}
	fd := f.fd
	f.fd = -1
	// Linux has released the descriptor even when close fails, EINTR included.
	if err := unix.Close(fd); err != nil && err != unix.EINTR {
		return f.fail("close", err)
	}
	return nil
}

// size is the length in bytes; the caller holds the descriptor.
func (f *osFile) size() (int64, error) {
	if f.block {
		return blockDeviceSize(f.fd)
	}
	var st unix.Stat_t
	if err := unix.Fstat(f.fd, &st); err != nil {
		return 0, err
	}
	return st.Size, nil
}

// Size of a closed file or of a device that has gone is 0.
func (f *osFile) Size() int64 {
	if _, err := f.hold(); err != nil {
		return 0
	}
	defer f.release()
	n, err := f.size()
	if err != nil {
		return 0
	}
	return n
}

func (f *osFile) Flush() error {
	fd, err := f.hold()
	if err != nil {
		return err
	}
	defer f.release()
	// One at a time: the kernel reports a failed write-back to one fsync of an
	// open file only, and no other may succeed meanwhile.
	f.flushing.Lock()
	defer f.flushing.Unlock()
	if err := f.failed.Load(); err != nil {
		return *err
	}
	meta := f.meta.Load()
	if meta > f.metaSynced.Load() {
		err = retryErr(func() error { return unix.Fsync(fd) })
	} else {
		err = retryErr(func() error { return unix.Fdatasync(fd) })
	}
	if err != nil {
		err = f.fail("flush", err)
		f.failed.CompareAndSwap(nil, &err)
		return err
	}
	for {
		was := f.metaSynced.Load()
		if was >= meta || f.metaSynced.CompareAndSwap(was, meta) {
			return nil
		}
	}
}

func (f *osFile) Truncate(size int64) error {
	fd, err := f.hold()
	if err != nil {
		return err
	}
	defer f.release()
	f.content.Lock()
	defer f.content.Unlock()
	if err := retryErr(func() error { return unix.Ftruncate(fd, size) }); err != nil {
		return f.failAt("truncate", size, err)
	}
	f.meta.Add(1)
	return nil
}

// grow makes the file at least size bytes long; the caller holds the
// descriptor, but not content.
func (f *osFile) grow(size int64) error {
	old, err := f.size()
	if err != nil || old >= size {
		return err
	}
	f.content.Lock()
	defer f.content.Unlock()
	if old, err = f.size(); err != nil || old >= size {
		return err
	}
	f.meta.Add(1)
	return retryErr(func() error { return unix.Ftruncate(f.fd, size) })
}

func (f *osFile) Allocate(off, n int64) error {
	if off < 0 || n <= 0 {
		return f.failAt("allocate", off, unix.EINVAL)
	}
	fd, err := f.hold()
	if err != nil {
		return err
	}
	defer f.release()
	if f.block {
		if err := f.within(off, n); err != nil {
			return f.failAt("allocate", off, err)
		}
		return nil
	}
	err = f.fallocate(fd, 0, off, n)
	if unsupported(err) {
		err = f.grow(off + n)
	}
	if err != nil {
		return f.failAt("allocate", off, err)
	}
	f.meta.Add(1)
	return nil
}

// fallocate is fallocate(2); the caller holds the descriptor, but not content.
func (f *osFile) fallocate(fd int, mode uint32, off, n int64) error {
	f.content.RLock()
	defer f.content.RUnlock()
	return retryErr(func() error { return unix.Fallocate(fd, mode, off, n) })
}

// within tells whether a range lies in a block device, which cannot grow;
// beyond its end the kernel's answer to a write is ENOSPC, so it is ours.
func (f *osFile) within(off, n int64) error {
	size, err := f.size()
	if err == nil && off > size-n {
		err = unix.ENOSPC
	}
	return err
}

// unsupported says that a file system or device lacks the operation.
func unsupported(err error) bool { return errors.Is(err, errors.ErrUnsupported) }

func (f *osFile) Lock() error {
	fd, err := f.hold()
	if err != nil {
		return err
	}
	defer f.release()
	err = retryErr(func() error { return unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB) })
	if err == unix.EWOULDBLOCK {
		err = ErrLocked
	}
	if err != nil {
		return f.fail("lock", err)
	}
	return nil
}

func (f *osFile) NextData(off int64) (start, end int64, err error) {
	fd, err := f.hold()
	if err != nil {
		return 0, 0, err
	}
	defer f.release()
	size, err := f.size()
	if err != nil {
		return 0, 0, f.fail("get size", err)
	}
	if off < 0 {
		return 0, 0, f.failAt("seek data", off, unix.EINVAL)
	}
	if off >= size {
		return 0, 0, io.EOF
	}
	if f.block {
		return off, size, nil
	}
	start, err = unix.Seek(fd, off, unix.SEEK_DATA)
	switch {
	case err == unix.ENXIO:
		return 0, 0, io.EOF
	case err == unix.EINVAL: // the file system does not know its holes
		return off, size, nil
	case err != nil:
		return 0, 0, f.failAt("seek data", off, err)
	}
	end, err = unix.Seek(fd, start, unix.SEEK_HOLE)
	if err == unix.ENXIO { // the file became shorter between the two calls
		return 0, 0, io.EOF
	}
	if err != nil {
		return 0, 0, f.failAt("seek hole", start, err)
	}
	return start, end, nil
}

func (f *osFile) ID() (FileID, error) {
	st, err := f.stat()
	return FileID{Device: uint64(st.Dev), Inode: st.Ino}, err
}

func (f *osFile) Links() (uint64, error) {
	st, err := f.stat()
	return uint64(st.Nlink), err
}

func (f *osFile) stat() (st unix.Stat_t, err error) {
	fd, err := f.hold()
	if err != nil {
		return st, err
	}
	defer f.release()
	if err := unix.Fstat(fd, &st); err != nil {
		return unix.Stat_t{}, f.fail("stat", err)
	}
	return st, nil
}
