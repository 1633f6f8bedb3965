package vm

import (
	"bytes"
	"debug/elf"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// DefaultKernel is the release that tests boot unless SNAPMERGE_VM_KERNEL names
// another one. It is the name of a package too, linux-image-RELEASE, of Debian 12
// (bookworm-security). `apt-cache search 'linux-image-.*cloud-amd64'` lists what
// the archive has now; it drops old releases.
const DefaultKernel = "6.12.117+deb12-cloud-amd64"

// Kernel is a kernel with its modules, unpacked.
type Kernel struct {
	Release string
	Image   string            // path of the bootable image
	modules map[string]string // path by name, with underscores
}

// FetchKernel gets the kernel from the package archive, or from the user's cache
// directory if it was fetched before. Nothing is installed.
func FetchKernel() (*Kernel, error) {
	release := os.Getenv("SNAPMERGE_VM_KERNEL")
	if release == "" {
		release = DefaultKernel
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		return nil, err
	}
	dir := filepath.Join(cache, "snapmerge-vm", release)
	if _, err := os.Stat(dir); errors.Is(err, fs.ErrNotExist) {
		if err := unpackKernel(release, dir); err != nil {
			return nil, fmt.Errorf("kernel %s: %w", release, err)
		}
	}
	k := &Kernel{Release: release, Image: filepath.Join(dir, "boot/vmlinuz-"+release), modules: map[string]string{}}
	err = filepath.WalkDir(filepath.Join(dir, "lib/modules", release), func(path string, _ fs.DirEntry, err error) error {
		if base, _, ok := strings.Cut(filepath.Base(path), ".ko"); ok {
			k.modules[moduleName(base)] = path
		}
		return err
	})
	return k, err
}

// Add adds modules that were built for the kernel, by their files, in place of its
// own if it has them. It returns their names.
func (k *Kernel) Add(files []string) (names []string, err error) {
	for _, file := range files {
		if _, err := os.Stat(file); err != nil {
			return nil, err
		}
		base, _, _ := strings.Cut(filepath.Base(file), ".ko")
		names = append(names, moduleName(base))
		k.modules[moduleName(base)] = file
	}
	return names, nil
}

// unpackKernel fetches the package and unpacks it; dir is complete once it is
// there.
func unpackKernel(release, dir string) error {
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return err
	}
	tmp, err := os.MkdirTemp(filepath.Dir(dir), "fetch-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	if err := os.Chmod(tmp, 0o755); err != nil { // apt fetches as a user of its own
		return err
	}
	if err := run(tmp, "apt-get", "download", "linux-image-"+release); err != nil {
		return fmt.Errorf("%w (is the package list up to date? see DefaultKernel for another release)", err)
	}
	debs, err := filepath.Glob(filepath.Join(tmp, "*.deb"))
	if err != nil || len(debs) != 1 {
		return fmt.Errorf("apt-get download left %v, %v", debs, err)
	}
	root := filepath.Join(tmp, "root")
	if err := run(tmp, "dpkg-deb", "-x", debs[0], root); err != nil {
		return err
	}
	return os.Rename(root, dir)
}

func run(dir, name string, args ...string) error {
	c := exec.Command(name, args...)
	c.Dir = dir
	if out, err := c.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w: %s", strings.Join(c.Args, " "), err, bytes.TrimSpace(out))
	}
	return nil
}

func moduleName(s string) string { return strings.ReplaceAll(strings.TrimSpace(s), "-", "_") }

// module is a kernel module, ready to be loaded.
type module struct {
	name string
	data []byte
}

// load returns the modules and all that they depend on, in an order in which
// they can be loaded. A module that is missing may be part of the kernel; only
// those asked for must exist, unless a name starts with "?".
func (k *Kernel) load(names ...string) ([]module, error) {
	var order []module
	seen := map[string]bool{}
	var add func(name string, must bool) error
	add = func(name string, must bool) error {
		name = moduleName(name)
		if seen[name] {
			return nil
		}
		seen[name] = true
		path, ok := k.modules[name]
		if !ok {
			if must {
				return fmt.Errorf("kernel %s has no module %s", k.Release, name)
			}
			return nil
		}
		data, err := readModule(path)
		if err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
		needs, err := dependencies(data)
		if err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
		for _, n := range needs {
			if err := add(n, false); err != nil {
				return err
			}
		}
		order = append(order, module{name, data})
		return nil
	}
	for _, name := range names {
		optional := strings.HasPrefix(name, "?")
		if err := add(strings.TrimPrefix(name, "?"), !optional); err != nil {
			return nil, err
		}
	}
	return order, nil
}

func readModule(path string) ([]byte, error) {
	if strings.HasSuffix(path, ".xz") {
		return exec.Command("xz", "-dc", path).Output()
	}
	return os.ReadFile(path)
}

// dependencies reads the section .modinfo: strings key=value, each with a NUL.
func dependencies(data []byte) ([]string, error) {
	f, err := elf.NewFile(bytes.NewReader(data))
	if err != nil {
		return nil, err
	}
	s := f.Section(".modinfo")
	if s == nil {
		return nil, errors.New("no section .modinfo")
	}
	info, err := s.Data()
	if err != nil {
		return nil, err
	}
	var names []string
	for _, entry := range strings.Split(string(info), "\x00") {
		key, value, _ := strings.Cut(entry, "=")
		switch key {
		case "depends":
			names = append(names, strings.FieldsFunc(value, func(r rune) bool { return r == ',' })...)
		case "softdep":
			if pre, ok := strings.CutPrefix(value, "pre: "); ok {
				names = append(names, strings.Fields(pre)...)
			}
		}
	}
	return names, nil
}
