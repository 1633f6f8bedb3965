package driver

import (
	"fmt"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
	"k8s.io/mount-utils"
)

// unescape undoes what the kernel does to white space in /proc/mounts.
var unescape = strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`)

// mounts returns all mounts of this process's mount namespace.
func (p *plugin) mounts() ([]mount.MountPoint, error) {
	all, err := p.mounter.List()
	if err != nil {
		return nil, fmt.Errorf("list of mounts: %w", err)
	}
	for i := range all {
		all[i].Path = unescape.Replace(all[i].Path)
	}
	return all, nil
}

// mountsAt returns what is mounted at the path, the lowest first.
func (p *plugin) mountsAt(path string) ([]mount.MountPoint, error) {
	all, err := p.mounts()
	return slices.DeleteFunc(all, func(m mount.MountPoint) bool { return m.Path != path }), err
}

// mountsOf returns where the device is mounted: its file system, or its node.
func (p *plugin) mountsOf(dev string) ([]mount.MountPoint, error) {
	all, err := p.mounts()
	if err != nil {
		return nil, err
	}
	number, _ := blockNumber(dev)
	return slices.DeleteFunc(all, func(m mount.MountPoint) bool { return !isOf(m, dev, number) }), nil
}

// isOf tells whether m is a mount of the device, whose number is given.
func isOf(m mount.MountPoint, dev string, number uint64) bool {
	if m.Device == dev {
		return true
	}
	// A node that was bind mounted shows as the file system that it lies on.
	if m.Type != "devtmpfs" && m.Type != "tmpfs" || number == 0 {
		return false
	}
	n, err := blockNumber(m.Path)
	return err == nil && n == number
}

// blockNumber is the number of a block device's node.
func blockNumber(path string) (uint64, error) {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return 0, &os.PathError{Op: "lstat", Path: path, Err: err}
	}
	if st.Mode&unix.S_IFMT != unix.S_IFBLK {
		return 0, fmt.Errorf("%s is no block device", path)
	}
	return st.Rdev, nil
}

func readOnly(m mount.MountPoint) bool { return slices.Contains(m.Opts, "ro") }

func pathsOf(mounts []mount.MountPoint) []string {
	var paths []string
	for _, m := range mounts {
		paths = append(paths, m.Path)
	}
	return paths
}

// unmountAll takes away what is mounted at the path, however often.
func (p *plugin) unmountAll(path string) error {
	at, err := p.mountsAt(path)
	if err != nil {
		return err
	}
	for range at {
		if err := p.mounter.Unmount(path); err != nil {
			return err
		}
	}
	return nil
}
