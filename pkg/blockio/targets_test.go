package blockio

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/snapmerge/snapmerge/test/machine"
)

func ok(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func second[T any](_ T, err error) error { return err }

// needRoot skips without root, or without the tools.
func needRoot(t testing.TB, tools ...string) {
	t.Helper()
	machine.NeedDevices(t, machine.Loop)
	for _, tool := range tools {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("needs %s: %v", tool, err)
		}
	}
}

func command(t testing.TB, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(string(out))
}

// loopDevice makes a block device of the size with the logical block size.
func loopDevice(t testing.TB, size int64, sector int) string {
	t.Helper()
	needRoot(t, "losetup")
	img := filepath.Join(t.TempDir(), "disk.img")
	ok(t, os.WriteFile(img, nil, 0o600))
	ok(t, os.Truncate(img, size))
	dev := command(t, "losetup", "--find", "--show", "--sector-size", fmt.Sprint(sector), img)
	t.Cleanup(func() { command(t, "losetup", "--detach", dev) })
	return dev
}

// smallFS mounts a new file system of the size.
func smallFS(t testing.TB, kind string, size int64) string {
	t.Helper()
	dir := t.TempDir()
	if kind == "tmpfs" {
		needRoot(t)
		ok(t, unix.Mount("tmpfs", dir, "tmpfs", 0, fmt.Sprintf("size=%d", size)))
	} else {
		needRoot(t, "losetup")
		machine.NeedFS(t, kind)
		dev := loopDevice(t, size, 512)
		command(t, "mkfs."+kind, "-q", dev)
		ok(t, unix.Mount(dev, dir, kind, 0, ""))
	}
	t.Cleanup(func() { machine.Unmount(t, dir) })
	return dir
}

func open(t testing.TB, name string, flag Flag) *osFile {
	t.Helper()
	f, err := openFile(name, flag)
	ok(t, err)
	t.Cleanup(func() { _ = f.Close() })
	return f
}

// targets are all kinds of things to do I/O on. Each is size bytes of zeros.
func targets(t *testing.T, size int64, test func(t *testing.T, f *osFile)) {
	file := func(t *testing.T, flag Flag) *osFile {
		f := open(t, filepath.Join(t.TempDir(), "f"), Create|flag)
		ok(t, f.Truncate(size))
		return f
	}
	t.Run("buffered file", func(t *testing.T) { test(t, file(t, 0)) })
	t.Run("direct file", func(t *testing.T) {
		f := file(t, Direct)
		if f.align == 1 {
			t.Skip("no direct I/O on the file system of the temporary directory")
		}
		test(t, f)
	})
	// The same with coarser units, which no disk at hand may have.
	t.Run("direct file by 4096", func(t *testing.T) {
		f := file(t, Direct)
		if f.align == 1 {
			t.Skip("no direct I/O on the file system of the temporary directory")
		}
		f.align = 4096
		test(t, f)
	})
	t.Run("buffered device", func(t *testing.T) { test(t, open(t, loopDevice(t, size, 512), 0)) })
	for _, sector := range []int{512, 4096} {
		t.Run(fmt.Sprintf("direct device by %d", sector), func(t *testing.T) {
			f := open(t, loopDevice(t, size, sector), Direct)
			if fd, align := f.Raw(); fd != f.fd || align != sector {
				t.Errorf("descriptor %d, alignment %d", fd, align)
			}
			test(t, f)
		})
	}
}
