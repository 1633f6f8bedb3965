package fuseloop

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/snapmerge/snapmerge/pkg/transport"
)

const (
	// settle is how long a device may look busy because udev is looking at it.
	settle = 2 * time.Second
	// pollLoop is how often to look again; the kernel has no event for it.
	pollLoop = 10 * time.Millisecond
)

// errNotOurs says that a loop device is free or has somebody else's file.
var errNotOurs = errors.New("loop device is not ours any more")

// loopDev is a loop device that was set up with the tag.
type loopDev struct {
	index int
	tag   string
}

func (l loopDev) path() string { return fmt.Sprintf("/dev/loop%d", l.index) }

func volumeHash(volume string) string {
	sum := sha256.Sum256([]byte(volume))
	return hex.EncodeToString(sum[:8])
}

// fileName is the name of the volume's file, and what sysfs shows of it.
func fileName(volume string) string { return "disk-" + volumeHash(volume) }

func tagPrefix(volume string) string { return "snapmerge:" + volumeHash(volume) + ":" }

func newTag(volume string) string {
	var nonce [6]byte
	rand.Read(nonce[:]) // never fails
	return tagPrefix(volume) + hex.EncodeToString(nonce[:])
}

// attachLoop puts the open file into a free loop device. Before each try it
// calls intend with the device it is going to use, so that a process that dies
// in between leaves a trace.
func attachLoop(ctx context.Context, file int, tag string, readOnly bool, intend func(loopDev) error) (loopDev, error) {
	control, err := unix.Open("/dev/loop-control", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return loopDev{}, &os.PathError{Op: "open", Path: "/dev/loop-control", Err: err}
	}
	defer unix.Close(control)
	cfg := unix.LoopConfig{Fd: uint32(file), Size: blockSize}
	cfg.Info.Flags = unix.LO_FLAGS_DIRECT_IO
	if readOnly {
		cfg.Info.Flags |= unix.LO_FLAGS_READ_ONLY
	}
	copy(cfg.Info.File_name[:len(cfg.Info.File_name)-1], tag)
	for {
		index, err := unix.IoctlRetInt(control, unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return loopDev{}, fmt.Errorf("LOOP_CTL_GET_FREE: %w", err)
		}
		l := loopDev{index, tag}
		if err := intend(l); err != nil {
			return loopDev{}, err
		}
		err = l.configure(&cfg)
		if err == nil {
			return l, nil
		}
		// Somebody else took the device, or removed it, in the meantime.
		if !errors.Is(err, unix.EBUSY) && !errors.Is(err, unix.ENXIO) && !errors.Is(err, unix.ENOENT) {
			return loopDev{}, err
		}
		select {
		case <-ctx.Done():
			return loopDev{}, fmt.Errorf("%w: %w", err, ctx.Err())
		case <-time.After(pollLoop):
		}
	}
}

// configure sets the device up. A device that could only do buffered I/O is
// cleared again.
func (l loopDev) configure(cfg *unix.LoopConfig) error {
	fd, err := l.openNode(unix.O_RDWR)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := unix.IoctlLoopConfigure(fd, cfg); err != nil {
		return fmt.Errorf("LOOP_CONFIGURE %s: %w", l.path(), err)
	}
	info, err := unix.IoctlLoopGetStatus64(fd)
	if err == nil && info.Flags&unix.LO_FLAGS_DIRECT_IO == 0 {
		err = errors.New("no direct I/O on a FUSE file")
	}
	if err != nil {
		unix.IoctlSetInt(fd, unix.LOOP_CLR_FD, 0)
		return fmt.Errorf("%s: %w", l.path(), err)
	}
	return nil
}

// openNode opens the device, making its node where no devtmpfs does. The
// descriptor must be closed soon: see the package comment.
func (l loopDev) openNode(flags int) (int, error) {
	fd, err := unix.Open(l.path(), flags|unix.O_CLOEXEC, 0)
	if err == unix.ENOENT {
		dev, derr := sysfsDev(l.index)
		if derr != nil {
			return -1, derr
		}
		if merr := unix.Mknod(l.path(), unix.S_IFBLK|0o600, int(dev)); merr != nil && merr != unix.EEXIST {
			return -1, &os.PathError{Op: "mknod", Path: l.path(), Err: merr}
		}
		fd, err = unix.Open(l.path(), flags|unix.O_CLOEXEC, 0)
	}
	if err != nil {
		return -1, &os.PathError{Op: "open", Path: l.path(), Err: err}
	}
	return fd, nil
}

// sysfsDev is the device number of a loop device.
func sysfsDev(index int) (uint64, error) {
	path := fmt.Sprintf("/sys/block/loop%d/dev", index)
	b, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	var major, minor uint32
	if _, err := fmt.Sscanf(string(b), "%d:%d", &major, &minor); err != nil {
		return 0, fmt.Errorf("%s: %w", path, err)
	}
	return unix.Mkdev(major, minor), nil
}

// open opens the device for reading and makes sure that it still is ours:
// errNotOurs if not. udev does not look at devices that were open for reading.
func (l loopDev) open(flags int) (int, *unix.LoopInfo64, error) {
	if l.tag == "" { // never set up; other people's devices have no tag either
		return -1, nil, errNotOurs
	}
	fd, err := l.openNode(unix.O_RDONLY | flags)
	if errors.Is(err, unix.ENXIO) || errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENODEV) {
		return -1, nil, errNotOurs
	}
	if err != nil {
		return -1, nil, err
	}
	info, err := unix.IoctlLoopGetStatus64(fd)
	if err == unix.ENXIO || err == nil && unix.ByteSliceToString(info.File_name[:]) != l.tag {
		err = errNotOurs
	}
	if err != nil {
		unix.Close(fd)
		return -1, nil, err
	}
	return fd, info, nil
}

// check makes sure that the device is ours and stays when its last user closes
// it: an earlier process may have died inside detach.
func (l loopDev) check() error {
	fd, info, err := l.open(0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return keepBound(fd, info)
}

// keepBound takes back what LOOP_CLR_FD of a device in use has done.
func keepBound(fd int, info *unix.LoopInfo64) error {
	if info.Flags&unix.LO_FLAGS_AUTOCLEAR == 0 {
		return nil
	}
	info.Flags &^= unix.LO_FLAGS_AUTOCLEAR
	if err := unix.IoctlLoopSetStatus64(fd, info); err != nil {
		return fmt.Errorf("LOOP_SET_STATUS64: %w", err)
	}
	return nil
}

// detach takes the file out of the device, or returns transport.ErrBusy and
// leaves it as it was. Nobody can have the device open afterwards, and no dirty
// page is left: the kernel writes them when the last opener closes.
func (l loopDev) detach(ctx context.Context) error {
	for end := time.Now().Add(settle); ; {
		last := ctx.Err() != nil || time.Now().After(end)
		busy, err := l.tryDetach(last)
		if errors.Is(err, errNotOurs) {
			return nil
		}
		if err != nil || !busy {
			return err
		}
		if last {
			return fmt.Errorf("%s: %w", l.path(), transport.ErrBusy)
		}
		select {
		case <-ctx.Done():
		case <-time.After(pollLoop):
		}
	}
}

// tryDetach is one try. If the device is busy and this was the last try, the
// device is told to stay.
func (l loopDev) tryDetach(last bool) (busy bool, err error) {
	// O_EXCL fails if it is mounted or claimed otherwise, without a trace.
	fd, _, err := l.open(unix.O_EXCL)
	if errors.Is(err, unix.EBUSY) {
		return true, nil
	}
	if err != nil {
		return false, err
	}
	defer unix.Close(fd)
	if err := unix.IoctlSetInt(fd, unix.LOOP_CLR_FD, 0); err != nil {
		return false, fmt.Errorf("LOOP_CLR_FD %s: %w", l.path(), err)
	}
	// If we are the only opener it is gone now, or will be when we close it.
	info, err := unix.IoctlLoopGetStatus64(fd)
	if err == unix.ENXIO {
		return false, nil
	}
	if err == nil && last {
		err = keepBound(fd, info)
	}
	return true, err
}

// discard detaches the device now, or when its last user closes it.
func (l loopDev) discard() (busy bool, err error) {
	fd, _, err := l.open(0)
	if errors.Is(err, errNotOurs) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer unix.Close(fd)
	if err := unix.IoctlSetInt(fd, unix.LOOP_CLR_FD, 0); err != nil {
		return false, fmt.Errorf("LOOP_CLR_FD %s: %w", l.path(), err)
	}
	_, err = unix.IoctlLoopGetStatus64(fd)
	return err == nil, nil
}

// setCapacity makes the device as large as its file.
func (l loopDev) setCapacity() error {
	fd, _, err := l.open(0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := unix.IoctlSetInt(fd, unix.LOOP_SET_CAPACITY, 0); err != nil {
		return fmt.Errorf("LOOP_SET_CAPACITY %s: %w", l.path(), err)
	}
	return nil
}

// sysfsSize is the device's size in bytes; 0 if it is free. It does not open the
// device.
func (l loopDev) sysfsSize() (int64, error) {
	path := fmt.Sprintf("/sys/block/loop%d/size", l.index)
	b, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	var sectors int64
	if _, err := fmt.Sscan(string(b), &sectors); err != nil {
		return 0, fmt.Errorf("%s: %w", path, err)
	}
	return sectors * sectorSize, nil
}

// staleLoops finds the loop devices that processes before us have left for the
// volume.
func staleLoops(volume string) ([]loopDev, error) {
	files, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		return nil, err
	}
	var found []loopDev
	for _, file := range files {
		b, err := os.ReadFile(file)
		if err != nil || strings.TrimSpace(string(b)) != "/"+fileName(volume) {
			continue // unbound in the meantime, or somebody else's
		}
		var l loopDev
		if _, err := fmt.Sscanf(file, "/sys/block/loop%d/", &l.index); err != nil {
			return nil, fmt.Errorf("%s: %w", file, err)
		}
		if l.tag, err = l.readTag(); err != nil {
			return nil, err
		}
		if strings.HasPrefix(l.tag, tagPrefix(volume)) {
			found = append(found, l)
		}
	}
	return found, nil
}

// readTag is the device's lo_file_name; none if it is free.
func (l loopDev) readTag() (string, error) {
	fd, err := l.openNode(unix.O_RDONLY)
	if err != nil {
		return "", err
	}
	defer unix.Close(fd)
	info, err := unix.IoctlLoopGetStatus64(fd)
	if err == unix.ENXIO {
		return "", nil
	}
	if err != nil {
		return "", fmt.Errorf("LOOP_GET_STATUS64 %s: %w", l.path(), err)
	}
	return unix.ByteSliceToString(info.File_name[:]), nil
}
