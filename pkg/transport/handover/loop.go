package handover

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/snapmerge/snapmerge/pkg/transport"
)

const (
	loopControl = "/dev/loop-control"
	loopMajor   = 7
	// loopTries is how often another process may take the loop device that was free.
	loopTries = 20
)

// loop makes a loop device that goes when its last user has closed it. The caller is
// one until release.
func (k kernel) loop(file, tag, like string) (number string, release func(), err error) {
	size, err := sectorSize(like)
	if err != nil {
		return "", nil, err
	}
	f, err := os.OpenFile(file, os.O_RDWR, 0)
	if err != nil {
		return "", nil, err
	}
	defer f.Close()
	if st, err := f.Stat(); err != nil || !st.Mode().IsRegular() {
		return "", nil, errors.Join(err, fmt.Errorf("%s is not a regular file", file))
	}
	cfg := unix.LoopConfig{Fd: uint32(f.Fd()), Size: uint32(size)}
	cfg.Info.Flags = unix.LO_FLAGS_DIRECT_IO | unix.LO_FLAGS_AUTOCLEAR
	copy(cfg.Info.File_name[:len(cfg.Info.File_name)-1], tag)
	for range loopTries {
		var fd int
		if fd, err = configureFree(&cfg); errors.Is(err, unix.EBUSY) || errors.Is(err, unix.ENXIO) || errors.Is(err, unix.ENOENT) {
			continue // somebody else was faster
		}
		if err != nil {
			break
		}
		release := func() { unix.Close(fd) }
		info, err := unix.IoctlLoopGetStatus64(fd)
		switch {
		case err != nil:
		case info.Flags&unix.LO_FLAGS_DIRECT_IO == 0:
			err = fmt.Errorf("no direct I/O in blocks of %d bytes on a loop device of %s", size, file)
		default:
			var st unix.Stat_t
			if err = unix.Fstat(fd, &st); err == nil {
				return numberOf(st.Rdev), release, nil
			}
		}
		release()
		return "", nil, err
	}
	return "", nil, fmt.Errorf("loop device of %s: %w", file, err)
}

// configureFree sets a free loop device up and returns it open.
func configureFree(cfg *unix.LoopConfig) (int, error) {
	control, err := unix.Open(loopControl, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, &os.PathError{Op: "open", Path: loopControl, Err: err}
	}
	defer unix.Close(control)
	index, err := unix.IoctlRetInt(control, unix.LOOP_CTL_GET_FREE)
	if err != nil {
		return -1, fmt.Errorf("LOOP_CTL_GET_FREE: %w", err)
	}
	fd, err := openLoop(fmt.Sprint("loop", index), unix.O_RDWR)
	if err != nil {
		return -1, err
	}
	if err := unix.IoctlLoopConfigure(fd, cfg); err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("LOOP_CONFIGURE: %w", err)
	}
	return fd, nil
}

func openLoop(name string, flags int) (int, error) {
	path := "/dev/" + name
	if err := transport.MakeNode(path, "/sys/block/"+name, unix.S_IFBLK); err != nil {
		return -1, err
	}
	fd, err := unix.Open(path, flags|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, &os.PathError{Op: "open", Path: path, Err: err}
	}
	return fd, nil
}

func (kernel) isLoop(number, tag string) (bool, error) {
	var major, minor int
	if _, err := fmt.Sscanf(number, "%d:%d", &major, &minor); err != nil || major != loopMajor {
		return false, nil
	}
	name, err := os.Readlink("/sys/dev/block/" + number)
	if err != nil {
		return false, unlessAbsent(err)
	}
	fd, err := openLoop(filepath.Base(name), unix.O_RDONLY)
	if err != nil {
		return false, unlessAbsent(err)
	}
	defer unix.Close(fd)
	info, err := unix.IoctlLoopGetStatus64(fd)
	if err != nil {
		return false, unlessAbsent(os.NewSyscallError("LOOP_GET_STATUS64", err))
	}
	return unix.ByteSliceToString(info.File_name[:]) == tag, nil
}

// unlessAbsent is nil if err says that there is no such device, or nothing behind it.
func unlessAbsent(err error) error {
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENXIO) || errors.Is(err, unix.ENODEV) {
		return nil
	}
	return err
}

// sectorSize is the logical block size of a device, in bytes.
func sectorSize(path string) (int, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0, &os.PathError{Op: "open", Path: path, Err: err}
	}
	defer unix.Close(fd)
	n, err := unix.IoctlGetInt(fd, unix.BLKSSZGET)
	if err != nil {
		return 0, fmt.Errorf("BLKSSZGET %s: %w", path, err)
	}
	return n, nil
}
