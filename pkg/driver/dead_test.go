package driver

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestDeadDeviceIsDetached: without a keeper a device dies with the node plugin.
// Once the pod is gone nothing of it is left, though it is never staged again.
func TestDeadDeviceIsDetached(t *testing.T) {
	needDevices(t, "mkfs.ext4")
	n := makeNode(t, nil)
	n.asProcesses()
	plugin := n.startProcess()
	t.Cleanup(func() { end(t, plugin, syscall.SIGKILL) })
	c := mountCap(writer, ext4)
	id := n.create("v", 64*mib, "", c)
	target := n.use(id, c)
	var st unix.Stat_t
	if err := unix.Stat(target, &st); err != nil {
		t.Fatal(err)
	}
	file, err := os.ReadFile(fmt.Sprintf("/sys/dev/block/%d:%d/loop/backing_file", unix.Major(st.Dev), unix.Minor(st.Dev)))
	if err != nil {
		t.Fatal(err)
	}
	end(t, plugin, syscall.SIGKILL)
	plugin = n.startProcess()
	n.leave(id)
	n.delete(id)
	for start := time.Now(); bound(t, string(file)); time.Sleep(10 * time.Millisecond) {
		if time.Since(start) > patience {
			t.Fatalf("a loop device still has %s", file)
		}
	}
	end(t, plugin, syscall.SIGTERM)
}

// bound tells whether a loop device has the file.
func bound(t *testing.T, file string) bool {
	t.Helper()
	loops, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		t.Fatal(err)
	}
	return slices.ContainsFunc(loops, func(name string) bool {
		b, err := os.ReadFile(name)
		return err == nil && string(b) == file
	})
}
