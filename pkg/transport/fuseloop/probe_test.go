package fuseloop

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

func TestProbe(t *testing.T) {
	noLeftovers(t)
	tr := New(nil)
	if err := tr.Probe(); err != nil {
		t.Fatal(err)
	}
	if err := tr.SurvivesRestart(); err == nil {
		t.Error("survives a restart without a keeper")
	}
	n, err := tr.MaxVolumes()
	if err != nil || n < 1 {
		t.Errorf("at most %d volumes, %v", n, err)
	}
	t.Logf("at most %d volumes", n)
}

// withDev runs a helper in a mount namespace whose /dev has only the nodes, and
// returns what it prints.
func withDev(t *testing.T, helper string, nodes ...string) string {
	t.Helper()
	cmd := exec.Command(os.Args[0], nodes...)
	cmd.Env = append(os.Environ(), "FUSELOOP_TEST_HELPER="+helper)
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return string(out)
}

// replaceDev puts a file system with copies of the nodes alone over /dev.
func replaceDev(nodes []string) error {
	numbers := make(map[string]uint64)
	for _, path := range nodes {
		var st unix.Stat_t
		if err := unix.Stat(path, &st); err != nil {
			return err
		}
		numbers[path] = st.Rdev
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return err
	}
	if err := unix.Mount("none", "/dev", "tmpfs", 0, ""); err != nil {
		return err
	}
	for path, dev := range numbers {
		if err := unix.Mknod(path, unix.S_IFCHR|0o600, int(dev)); err != nil {
			return err
		}
	}
	return nil
}

// helperProbe prints what Probe says where /dev has the nodes alone.
func helperProbe(nodes []string) error {
	if err := replaceDev(nodes); err != nil {
		return err
	}
	fmt.Println(New(nil).Probe())
	return nil
}

func TestProbeNamesWhatIsMissing(t *testing.T) {
	needRoot(t)
	for _, tt := range []struct {
		nodes, missing []string
	}{
		{nil, []string{"/dev/fuse", "/dev/loop-control"}},
		{[]string{"/dev/fuse"}, []string{"/dev/loop-control"}},
		{[]string{"/dev/loop-control"}, []string{"/dev/fuse"}},
		{[]string{"/dev/loop-control", "/dev/fuse"}, nil}, // the loop device's node is made
	} {
		out := withDev(t, "probe", tt.nodes...)
		for _, path := range tt.missing {
			if !strings.Contains(out, path+": no such file") {
				t.Errorf("with %v: %s", tt.nodes, out)
			}
		}
		if tt.missing == nil && out != "<nil>\n" {
			t.Errorf("with %v: %s", tt.nodes, out)
		}
	}
}

func TestSurvivesRestart(t *testing.T) {
	needResend(t)
	noLeftovers(t)
	if err := New(inProcess(t)).SurvivesRestart(); err != nil {
		t.Error(err)
	}
}
