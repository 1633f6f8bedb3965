package rig

import (
	"fmt"
	"os"
	"path"
	"path/filepath"
	"strings"

	"github.com/snapmerge/snapmerge/test/e2e/internal/binary"
	"github.com/snapmerge/snapmerge/test/e2e/internal/cluster"
	"github.com/snapmerge/snapmerge/test/e2e/internal/image"
)

// product makes the image as the Dockerfile does.
func (i *images) product(name string) error {
	program, root := filepath.Join(i.dir, "snapmerge"), filepath.Join(i.dir, "product")
	for _, args := range [][]string{
		{"go", "build", "-trimpath", "-ldflags", "-s -w -X main.version=" + tag(name), "-o", program, "./cmd/snapmerge"},
		{"hack/rootfs.sh", root, program},
	} {
		if _, err := binary.Output(i.ctx, i.repo, args[0], args[1:]...); err != nil {
			return err
		}
	}
	return i.give(root, name, image.Config{Entrypoint: []string{"/usr/bin/snapmerge"}, Env: []string{"PATH=/usr/sbin:/usr/bin"}})
}

// tag is the part of an image's name after the last colon.
func tag(name string) string { return name[strings.LastIndexByte(name, ':')+1:] }

// sidecar makes an image that has nothing but the program that it is named after.
func (i *images) sidecar(name string) error {
	program, _, _ := strings.Cut(path.Base(name), ":")
	root := filepath.Join(i.dir, program)
	if err := os.Mkdir(root, 0o755); err != nil {
		return err
	}
	if err := os.Link(filepath.Join(i.sidecars, program), filepath.Join(root, program)); err != nil {
		return fmt.Errorf("image %s: %w", name, err)
	}
	return i.give(root, name, image.Config{Entrypoint: []string{"/" + program}})
}

// busybox makes the image of the pods, and that of the sandboxes from it: a
// program that waits.
func (i *images) busybox() error {
	root := filepath.Join(i.dir, "busybox")
	if err := i.busyboxTree(root); err != nil {
		return err
	}
	if err := i.give(root, registry+"library/"+Busybox, image.Config{Env: busyboxEnv}); err != nil {
		return err
	}
	return i.give(root, cluster.Sandbox, image.Config{Entrypoint: []string{"/bin/sleep", "infinity"}, Env: busyboxEnv})
}

var busyboxEnv = []string{"PATH=/bin"}

// busyboxTree makes a tree with busybox under all its names.
func (i *images) busyboxTree(root string) error {
	bin := filepath.Join(root, "bin")
	for _, dir := range []string{bin, filepath.Join(root, "tmp")} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	if err := os.Chmod(filepath.Join(root, "tmp"), 0o777|os.ModeSticky); err != nil {
		return err
	}
	program := filepath.Join(i.debian, "bin", "busybox")
	if err := os.Link(program, filepath.Join(bin, "busybox")); err != nil {
		return err
	}
	applets, err := binary.Output(i.ctx, i.dir, program, "--list")
	if err != nil {
		return err
	}
	for _, name := range strings.Fields(applets) {
		if err := os.Symlink("busybox", filepath.Join(bin, name)); err != nil && !os.IsExist(err) {
			return err
		}
	}
	return nil
}

func (i *images) give(root, name string, config image.Config) error {
	file := root + ".tar"
	defer os.Remove(file)
	if err := image.Save(file, root, name, config); err != nil {
		return err
	}
	return i.c.Import(i.ctx, file)
}
