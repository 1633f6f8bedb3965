package driver

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
	"k8s.io/mount-utils"

	"github.com/snapmerge/snapmerge/pkg/transport/handover"
)

// ErrOwnDevice says that the state directory lies on a device that we serve:
// each of its writes would wait for itself.
var ErrOwnDevice = errors.New("state directory lies on a snapmerge device")

// maxStack bounds how many devices can lie on each other.
const maxStack = 16

// checkStateDir refuses a state directory on a device of ours, however many loop
// devices, partitions and mapped devices are between.
func checkStateDir(dir string) error {
	own, err := servedBy(dir, maxStack)
	if err != nil {
		return fmt.Errorf("state directory: %w", err)
	}
	if own != "" {
		return fmt.Errorf("%s: %w (%s)", dir, ErrOwnDevice, own)
	}
	return nil
}

// servedBy returns the device of ours that the file lies on, or "".
func servedBy(file string, depth int) (string, error) {
	var st unix.Stat_t
	if err := unix.Stat(file, &st); err != nil {
		return "", &os.PathError{Op: "stat", Path: file, Err: err}
	}
	number, err := deviceUnder(st.Dev)
	if err != nil || number == 0 {
		return "", err
	}
	return servedDevice(number, depth)
}

// deviceUnder is the block device of the file system with that number; 0 if it
// has none.
func deviceUnder(fs uint64) (uint64, error) {
	if unix.Major(fs) != 0 {
		return fs, nil
	}
	// An anonymous number (btrfs); the mount knows the device.
	all, err := mount.ParseMountInfo("/proc/self/mountinfo")
	if err != nil {
		return 0, err
	}
	for _, m := range all {
		if unix.Mkdev(uint32(m.Major), uint32(m.Minor)) == fs {
			if n, err := blockNumber(m.Source); err == nil {
				return n, nil
			}
		}
	}
	return 0, nil
}

// servedDevice returns the device of ours that the block device is or lies on.
func servedDevice(number uint64, depth int) (string, error) {
	if depth == 0 {
		return "", errors.New("too many devices on each other")
	}
	dir, err := filepath.EvalSymlinks(fmt.Sprintf("/sys/dev/block/%d:%d", unix.Major(number), unix.Minor(number)))
	if errors.Is(err, os.ErrNotExist) {
		return "", nil // a network file system's, say
	}
	if err != nil {
		return "", err
	}
	if _, err := os.Stat(filepath.Join(dir, "partition")); err == nil {
		dir = filepath.Dir(dir)
	}
	if b, err := os.ReadFile(filepath.Join(dir, "loop", "backing_file")); err == nil {
		backing := strings.TrimSuffix(string(b), "\n")
		if isServed(backing) {
			return filepath.Base(dir), nil
		}
		own, err := servedBy(backing, depth-1)
		if errors.Is(err, os.ErrNotExist) {
			return "", nil // deleted, or of another mount namespace
		}
		return own, err
	}
	// Handed over to its base it lies on no device that could be told as ours.
	if b, err := os.ReadFile(filepath.Join(dir, "dm", "name")); err == nil && strings.HasPrefix(string(b), handover.NamePrefix) {
		return filepath.Base(dir), nil
	}
	below, err := filepath.Glob(filepath.Join(dir, "slaves", "*", "dev"))
	if err != nil {
		return "", err
	}
	for _, file := range below {
		var major, minor uint32
		b, err := os.ReadFile(file)
		if err != nil {
			return "", err
		}
		if _, err := fmt.Sscanf(string(b), "%d:%d", &major, &minor); err != nil {
			return "", fmt.Errorf("%s: %w", file, err)
		}
		if own, err := servedDevice(unix.Mkdev(major, minor), depth-1); own != "" || err != nil {
			return own, err
		}
	}
	return "", nil
}

// isServed tells whether a loop device's backing file is one of package
// fuseloop's: in the root of a file system that is mounted nowhere.
func isServed(backing string) bool {
	hash, ok := strings.CutPrefix(backing, "/disk-")
	return ok && len(hash) == 16 && strings.Trim(hash, "0123456789abcdef") == ""
}
