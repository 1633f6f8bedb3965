package transport

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/snapmerge/snapmerge/test/machine"
)

// loopDevice makes a loop device and another node of it, as a container gets one, and
// returns both.
func loopDevice(t *testing.T) (node, other string) {
	t.Helper()
	machine.NeedDevices(t, machine.Loop)
	image, err := os.OpenFile(filepath.Join(t.TempDir(), "image"), os.O_RDWR|os.O_CREATE, 0o600)
	if err == nil {
		err = image.Truncate(1 << 20)
	}
	if err != nil {
		t.Fatal(err)
	}
	defer image.Close()
	control, err := os.OpenFile(machine.Loop, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer control.Close()
	for range 20 { // somebody else may take the one that is free
		n, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			t.Fatal(err)
		}
		name := fmt.Sprint("loop", n)
		node = "/dev/" + name
		if err := MakeNode(node, "/sys/block/"+name, unix.S_IFBLK); err != nil {
			t.Fatal(err)
		}
		loop, err := os.OpenFile(node, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer loop.Close()
		err = unix.IoctlLoopConfigure(int(loop.Fd()), &unix.LoopConfig{Fd: uint32(image.Fd())})
		if errors.Is(err, unix.EBUSY) {
			continue
		}
		var st unix.Stat_t
		if err := errors.Join(err, unix.Fstat(int(loop.Fd()), &st)); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			f, err := os.OpenFile(node, os.O_RDWR, 0)
			if err == nil {
				err = unix.IoctlSetInt(int(f.Fd()), unix.LOOP_CLR_FD, 0)
				f.Close()
			}
			if err != nil {
				t.Error(err)
			}
		})
		dir, err := os.MkdirTemp("/dev", "snapmerge-test-") // elsewhere nodes may not work
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { os.RemoveAll(dir) })
		other = dir + "/xvda"
		if err := unix.Mknod(other, unix.S_IFBLK|0o600, int(st.Rdev)); err != nil {
			t.Fatal(err)
		}
		return node, other
	}
	t.Fatal("others take every loop device")
	return "", ""
}

// TestInUse: a user counts whatever node he has opened.
func TestInUse(t *testing.T) {
	node, other := loopDevice(t)
	unused := func() {
		t.Helper()
		if err := WaitUnused(t.Context(), node, func(bool) (bool, error) { return InUse(node) }); err != nil {
			t.Error(err)
		}
	}
	unused()
	for _, path := range []string{node, other} {
		f, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		if used, err := InUse(node); !used || err != nil {
			t.Errorf("%s is open: %t, %v", path, used, err)
		}
		if path == other {
			if err := os.Remove(path); err != nil {
				t.Error(err)
			}
			if used, err := InUse(node); !used || err != nil {
				t.Errorf("%s is open, and removed: %t, %v", path, used, err)
			}
		}
		f.Close()
		unused()
	}
	if used, err := InUse(other); used || err != nil {
		t.Errorf("a node that is gone: %t, %v", used, err)
	}
}

// TestInUseCannotTell: a device whose openers cannot be looked for is not unused.
func TestInUseCannotTell(t *testing.T) {
	machine.WithoutDescriptors(t, func() {
		if used, err := isOpen(7, 0); !errors.Is(err, unix.EMFILE) {
			t.Errorf("%t, %v", used, err)
		}
	})
}
