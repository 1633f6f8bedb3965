package fuseloop

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
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
func fileName(volume string) string { return filePrefix + volumeHash(volume) }

const filePrefix = "disk-"

func tagPrefix(volume string) string { return "snapmerge:" + volumeHash(volume) + ":" }

// fileOf is the name of the file in a device with the tag. The volume's own name may
// have another hash by now: see transport.Unique.
func fileOf(tag string) (name string, ok bool) {
	f := strings.Split(strings.TrimSuffix(tag, baseMark), ":")
	if len(f) != 3 || f[0] != "snapmerge" || f[1] == "" {
		return "", false
	}
	return filePrefix + f[1], true
}

func newTag(volume string) string {
	var nonce [6]byte
	rand.Read(nonce[:]) // never fails
	return tagPrefix(volume) + hex.EncodeToString(nonce[:])
}

// freeLoop finds a loop device that nobody uses, or makes one.
func freeLoop() (index int, err error) {
	control, err := unix.Open("/dev/loop-control", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0, &os.PathError{Op: "open", Path: "/dev/loop-control", Err: err}
	}
	defer unix.Close(control)
	index, err = unix.IoctlRetInt(control, unix.LOOP_CTL_GET_FREE)
	if err != nil {
		return 0, fmt.Errorf("LOOP_CTL_GET_FREE: %w", err)
	}
	return index, nil
}

// attach puts the file of the mount into the device, unless that is not free.
func (l loopDev) attach(mount int, name string, readOnly bool) (busy bool, err error) {
	flags := unix.O_RDWR
	if readOnly {
		flags = unix.O_RDONLY
	}
	file, err := unix.Openat(mount, name, flags|unix.O_CLOEXEC, 0)
	if err != nil {
		return false, fmt.Errorf("open of the FUSE file: %w", err)
	}
	defer unix.Close(file)
	// With the first write the kernel would ask for this, and, answered ENOSYS, never
	// again. Writes that pass through are not to need an answer.
	_, _ = unix.Fgetxattr(file, "security.capability", nil)
	cfg := unix.LoopConfig{Fd: uint32(file), Size: blockSize}
	cfg.Info.Flags = unix.LO_FLAGS_DIRECT_IO
	if readOnly {
		cfg.Info.Flags |= unix.LO_FLAGS_READ_ONLY
	}
	copy(cfg.Info.File_name[:len(cfg.Info.File_name)-1], l.tag)
	err = l.configure(&cfg)
	// Somebody else took the device, or removed it, in the meantime.
	if errors.Is(err, unix.EBUSY) || errors.Is(err, unix.ENXIO) || errors.Is(err, unix.ENOENT) {
		return true, nil
	}
	return false, err
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

// makeNode makes the device's node where no devtmpfs does.
func (l loopDev) makeNode() error {
	if err := unix.Access(l.path(), unix.F_OK); err != unix.ENOENT {
		return nil // opening it will tell what is wrong
	}
	dev, err := sysfsDev(l.index)
	if err != nil {
		return err
	}
	if err := unix.Mknod(l.path(), unix.S_IFBLK|0o600, int(dev)); err != nil && err != unix.EEXIST {
		return &os.PathError{Op: "mknod", Path: l.path(), Err: err}
	}
	return nil
}

func (l loopDev) openNode(flags int) (int, error) {
	if err := l.makeNode(); err != nil {
		return -1, err
	}
	fd, err := unix.Open(l.path(), flags|unix.O_CLOEXEC, 0)
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

// tryDetach takes the file out of the device unless it is in use. A busy device
// is as it was after the last try; before, it may go with its last user.
func (l loopDev) tryDetach(last bool) (busy bool, err error) {
	if busy, err := l.clearOnClose(); busy || err != nil {
		return busy, err
	}
	// If it still is there somebody else has it open.
	fd, info, err := l.open(0)
	if err != nil {
		return false, err
	}
	defer unix.Close(fd)
	if last {
		return true, keepBound(fd, info)
	}
	return true, nil
}

// clearOnClose has the kernel detach the device when its last user closes it, and
// closes it. If that was the last user the kernel first writes what is dirty,
// and only then detaches. LOOP_CLR_FD by a device's only opener would fail those
// writes instead: of a user who has closed the device since we opened it, say.
// So we are two openers.
func (l loopDev) clearOnClose() (busy bool, err error) {
	// O_EXCL fails if it is mounted or claimed otherwise, without a trace.
	first, _, err := l.open(unix.O_EXCL)
	if errors.Is(err, unix.EBUSY) {
		return true, nil
	}
	if err != nil {
		return false, err
	}
	defer unix.Close(first)
	second, _, err := l.open(0)
	if err != nil {
		return false, err
	}
	defer unix.Close(second)
	if err := unix.IoctlSetInt(first, unix.LOOP_CLR_FD, 0); err != nil {
		return false, fmt.Errorf("LOOP_CLR_FD %s: %w", l.path(), err)
	}
	return false, nil
}

// discard detaches the device now, or when its last user closes it; until then its I/O
// fails, if it does not come to a server that is gone.
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
	if err != unix.ENXIO && l.passesThrough() {
		return true, l.fence(fd)
	}
	return err == nil, nil
}

// resize makes the file and the device as large as size. The file's server must
// have that size already.
func (l loopDev) resize(mount int, name string, size int64) error {
	// The loop driver asks for the size only since kernel 6.17. Truncation is what
	// makes the kernel believe a new one whatever writes are under way.
	if err := unix.Truncate(fmt.Sprintf("/proc/self/fd/%d/%s", mount, name), size); err != nil {
		return fmt.Errorf("truncate of the FUSE file: %w", err)
	}
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

// backingFile is the name of a loop device's file; none if it is free.
func backingFile(index int) (string, error) {
	b, err := os.ReadFile(fmt.Sprintf("/sys/block/loop%d/loop/backing_file", index))
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ENODEV) {
		return "", nil
	}
	return strings.TrimPrefix(strings.TrimSpace(string(b)), "/"), err
}

// sysfsSize is the device's size in bytes; 0 if the file of that name is not in
// it. It does not open the device.
func (l loopDev) sysfsSize(name string) (int64, error) {
	have, err := backingFile(l.index)
	if err != nil || have != name {
		return 0, err
	}
	path := fmt.Sprintf("/sys/block/loop%d/size", l.index)
	b, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	var sectors int64
	if _, err := fmt.Sscan(string(b), &sectors); err != nil {
		return 0, fmt.Errorf("%s: %w", path, err)
	}
	return sectors * sectorSize, nil
}

// boundLoops lists the loop devices that are in use.
func boundLoops() ([]int, error) {
	entries, err := os.ReadDir("/sys/block")
	if err != nil {
		return nil, err
	}
	var indices []int
	for _, e := range entries {
		n, ok := strings.CutPrefix(e.Name(), "loop")
		index, err := strconv.Atoi(n)
		if !ok || err != nil {
			continue
		}
		_, err = os.Stat("/sys/block/" + e.Name() + "/loop")
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		indices = append(indices, index)
	}
	return indices, nil
}

// staleLoops finds the loop devices that processes before us have left for the
// volumes.
func staleLoops(volumes ...string) ([]loopDev, error) {
	tags := make(map[string]string) // by name of the file: how tags begin
	for _, v := range volumes {
		tags[fileName(v)] = tagPrefix(v)
	}
	bound, err := boundLoops()
	if err != nil {
		return nil, err
	}
	var found []loopDev
	for _, index := range bound {
		name, err := backingFile(index)
		if err != nil {
			return nil, err
		}
		tag, ours := tags[name]
		if !ours {
			continue
		}
		l := loopDev{index: index}
		if l.tag, err = l.readTag(); err != nil {
			return nil, err
		}
		if strings.HasPrefix(l.tag, tag) {
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
