package cluster

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const cgroups = "/sys/fs/cgroup"

// hierarchies are the mount points of cgroups: one with version 2, one for each
// controller with version 1.
func hierarchies() ([]string, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(cgroups, &st); err != nil {
		return nil, fmt.Errorf("%s: %w", cgroups, err)
	}
	if st.Type == unix.CGROUP2_SUPER_MAGIC {
		return []string{cgroups}, nil
	}
	all, err := filepath.Glob(cgroups + "/*")
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(all, func(dir string) bool {
		return unix.Statfs(dir, &st) != nil || st.Type != unix.CGROUP_SUPER_MAGIC
	}), nil
}

// makeCgroup makes the cgroup in which the pods are, everywhere, as the kubelet
// wants it.
func makeCgroup(name string) error {
	all, err := hierarchies()
	if err != nil {
		return err
	}
	for _, dir := range all {
		if err := os.Mkdir(filepath.Join(dir, name), 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
	}
	if len(all) != 1 || all[0] != cgroups {
		return nil
	}
	for _, dir := range []string{cgroups, filepath.Join(cgroups, name)} {
		available, err := os.ReadFile(filepath.Join(dir, "cgroup.controllers"))
		if err != nil {
			return err
		}
		for _, controller := range strings.Fields(string(available)) {
			// Some cannot be had below; the kubelet says if it misses one.
			os.WriteFile(filepath.Join(dir, "cgroup.subtree_control"), []byte("+"+controller), 0)
		}
	}
	return nil
}

// removeCgroup removes it with all below. Processes that have just been killed
// keep theirs for a moment.
func removeCgroup(name string) error {
	all, err := hierarchies()
	if err != nil {
		return err
	}
	// The kubelet makes some in a version 2 hierarchy beside those of version 1, too.
	all = append(all, filepath.Join(cgroups, "unified"))
	var last error
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
		last = nil
		for _, dir := range all {
			last = errors.Join(last, removeTree(filepath.Join(dir, name)))
		}
		if last == nil {
			return nil
		}
	}
	return last
}

// removeTree removes directories from the deepest up; the files in them are the
// kernel's.
func removeTree(root string) error {
	var dirs []string
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			dirs = append(dirs, path)
		}
		return nil // gone meanwhile
	})
	slices.Reverse(dirs)
	for _, dir := range dirs {
		if e := os.Remove(dir); e != nil && !errors.Is(e, fs.ErrNotExist) {
			err = errors.Join(err, e)
		}
	}
	return err
}
