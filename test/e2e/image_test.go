package e2e

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestImage: what hack/rootfs.sh makes is complete. The tools that need a device
// (mount, umount, xfs_growfs) do their work in TestSmoke.
func TestImage(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("chroot takes root")
	}
	dir := t.TempDir()
	program, root := filepath.Join(dir, "snapmerge"), filepath.Join(dir, "root")
	build := exec.Command("go", "build", "-o", program, "./cmd/snapmerge")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	for _, cmd := range []*exec.Cmd{build, exec.Command("hack/rootfs.sh", root, program)} {
		cmd.Dir = repo
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v: %v: %s", cmd, err, out)
		}
	}
	if err := unix.Mknod(filepath.Join(root, "dev", "null"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(root, "proc", "mounts"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	const size = 320 << 20
	for _, fs := range []string{"ext4", "xfs"} {
		if err := os.WriteFile(filepath.Join(root, "tmp", fs), nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(filepath.Join(root, "tmp", fs), size); err != nil {
			t.Fatal(err)
		}
	}
	ran := []string{"mkfs."} // with the file system's type after it
	for _, c := range []struct{ command, want string }{
		{"snapmerge version", "snapmerge"},
		{"mkfs.ext4 -q -F -m 0 /tmp/ext4", ""},
		{"mkfs.xfs -q -f /tmp/xfs", ""},
		{"blkid -p -s TYPE -o export /tmp/ext4", "TYPE=ext4"},
		{"blkid -p -s TYPE -o export /tmp/xfs", "TYPE=xfs"},
		{"e2fsck -f -p /tmp/ext4", "/tmp/ext4:"},
		{"resize2fs /tmp/ext4 300M", "resize2fs"},
		{"xfs_growfs -V", "xfs_growfs version"},
		{"mount -V", "mount from util-linux"},
		{"umount -V", "umount from util-linux"},
	} {
		words := strings.Fields(c.command)
		cmd := exec.Command("chroot", append([]string{root}, words...)...)
		cmd.Env = []string{"PATH=/usr/sbin:/usr/bin"}
		out, err := cmd.CombinedOutput()
		if err != nil || !strings.Contains(string(out), c.want) {
			t.Errorf("%s: %v: %s", c.command, err, out)
		}
		ran = append(ran, words[0])
	}
	for _, tool := range toolsOfDriver(t) {
		if !slices.Contains(ran, tool) {
			t.Errorf("the driver runs %s, which has no case here", tool)
		}
	}
}

var runs = regexp.MustCompile(`p\.(?:run|must)\(ctx, "([^"]+)"`)

// toolsOfDriver are the programs that package driver runs.
func toolsOfDriver(t *testing.T) []string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(repo, "pkg", "driver", "*.go"))
	if err != nil {
		t.Fatal(err)
	}
	var tools []string
	for _, file := range files {
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range runs.FindAllStringSubmatch(string(b), -1) {
			tools = append(tools, m[1])
		}
	}
	if len(tools) < 5 {
		t.Errorf("the driver runs only %v", tools)
	}
	return tools
}
