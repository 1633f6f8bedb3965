// Package machine is where tests ask what differs between the machines that they
// run on: which devices and file systems there are, and how long the path of a
// temporary directory is.
package machine

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// NeedDevices skips without root, without CAP_SYS_ADMIN, or where one of the device
// nodes cannot be opened: in most containers there are none, and root there may
// neither make them nor mount.
func NeedDevices(t testing.TB, nodes ...string) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skipf("needs root and %q", nodes)
	}
	if !mayMount(t) {
		t.Skip("needs CAP_SYS_ADMIN")
	}
	for _, node := range nodes {
		f, err := os.OpenFile(node, os.O_RDWR, 0)
		if err != nil {
			t.Skipf("needs a machine with that device: %v", err)
		}
		f.Close()
	}
}

// mayMount tells whether this process has CAP_SYS_ADMIN, see capabilities(7) and
// proc_pid_status(5).
func mayMount(t testing.TB) bool {
	t.Helper()
	b, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(b), "\nCapEff:")
	line, _, _ := strings.Cut(rest, "\n")
	set, err := strconv.ParseUint(strings.TrimSpace(line), 16, 64)
	if err != nil {
		t.Fatalf("/proc/self/status: %v", err)
	}
	const capSysAdmin = 21
	return set>>capSysAdmin&1 == 1
}

// Nodes for NeedDevices.
const (
	FUSE = "/dev/fuse"
	Loop = "/dev/loop-control"
)

// NeedFS skips where the file system cannot be made or the kernel has none of that
// kind. That it can be mounted, too, takes NeedDevices.
func NeedFS(t testing.TB, kind string) {
	t.Helper()
	if _, err := exec.LookPath("mkfs." + kind); err != nil {
		t.Skipf("needs mkfs.%s: %v", kind, err)
	}
	known := func() bool {
		b, err := os.ReadFile("/proc/filesystems")
		return err == nil && slices.Contains(strings.Fields(string(b)), kind)
	}
	if known() {
		return
	}
	out, err := exec.Command("modprobe", kind).CombinedOutput() // as a mount would
	if !known() {
		t.Skipf("this kernel has no %s: %v: %s", kind, err, out)
	}
}

// Unmount unmounts what is mounted at the directory, and fails the test if somebody
// goes on using it: a ring's worker lets go of a file a little after its last
// transfer has ended.
func Unmount(t testing.TB, dir string) {
	t.Helper()
	err := unix.Unmount(dir, 0)
	for end := time.Now().Add(30 * time.Second); err == unix.EBUSY && time.Now().Before(end); time.Sleep(time.Millisecond) {
		err = unix.Unmount(dir, 0)
	}
	if err != nil {
		t.Errorf("unmount %s: %v", dir, err)
	}
}

// WithoutDescriptors calls f while this process can open nothing.
func WithoutDescriptors(t testing.TB, f func()) {
	t.Helper()
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	free, err := unix.Open(os.DevNull, unix.O_RDONLY|unix.O_CLOEXEC, 0) // the lowest
	if err != nil {
		t.Fatal(err)
	}
	unix.Close(free)
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: uint64(free), Max: limit.Max}); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
			t.Error(err)
		}
	}()
	f()
}

// longest is what a directory for sockets may have, in bytes: the kernel takes
// paths of 107 (unix(7)), and that of kubelet's folder for plugins is the deepest.
const longest = 107 - len("/kubelet/plugins_registry/csi.snapmerge.io-reg.sock")

// SocketDir makes a directory that is removed at the end of the test. Its path is
// short, as that of t.TempDir is not: it has the name of the test, which comes
// after TMPDIR. Where TMPDIR itself is too long the directory lies in /tmp.
func SocketDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "s")
	if err == nil && len(dir) > longest {
		if err = os.Remove(dir); err == nil {
			dir, err = os.MkdirTemp("/tmp", "s")
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// SocketPath is the path of a socket of that name, which may have folders in it,
// in a new directory.
func SocketPath(t testing.TB, name string) string {
	t.Helper()
	return filepath.Join(SocketDir(t), name)
}
