package driver

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// maxPath is the kernel's limit for a path, in bytes.
const maxPath = 4096

// resolve makes sure that a staging or target path is one that we may mount at
// or unmount: absolute and clean, no symbolic link itself, and below the
// kubelet's directory whatever symbolic links are on the way, if that is known.
// It returns the path as the kernel lists it in /proc/mounts. The path need not
// exist. what names it in errors.
func (p *plugin) resolve(what, path string) (string, error) {
	switch {
	case path == "":
		return "", invalid("%s is missing", what)
	case len(path) >= maxPath || strings.ContainsRune(path, 0):
		return "", invalid("%s cannot be a path", what)
	case !filepath.IsAbs(path) || filepath.Clean(path) != path || path == "/":
		return "", invalid("%s %q is not an absolute, clean path", what, path)
	}
	if st, err := os.Lstat(path); err == nil && st.Mode()&fs.ModeSymlink != 0 {
		return "", invalid("%s %q is a symbolic link", what, path)
	}
	parent, err := filepath.EvalSymlinks(filepath.Dir(path))
	exists := err == nil
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", fmt.Errorf("%s: %w", what, err)
	}
	if err := p.confine(what, path, parent, exists); err != nil {
		return "", err
	}
	if !exists {
		return path, nil // nothing can be done there
	}
	return filepath.Join(parent, filepath.Base(path)), nil
}

// confine keeps a path, whose parent is given without symbolic links if it
// exists, below the kubelet's directory.
func (p *plugin) confine(what, path, parent string, exists bool) error {
	if p.cfg.KubeletDir == "" {
		return nil
	}
	root, err := filepath.EvalSymlinks(p.cfg.KubeletDir)
	if err != nil {
		return fmt.Errorf("kubelet directory: %w", err)
	}
	// The lexical check also covers what does not exist.
	if !below(filepath.Clean(p.cfg.KubeletDir), path) && !below(root, path) {
		return invalid("%s %q is not below %s", what, path, p.cfg.KubeletDir)
	}
	if exists && parent != root && !below(root, parent) {
		return invalid("%s %q leads out of %s", what, path, p.cfg.KubeletDir)
	}
	return nil
}

// below tells whether path is below dir; both are clean.
func below(dir, path string) bool {
	return strings.HasPrefix(path, strings.TrimSuffix(dir, "/")+"/")
}
