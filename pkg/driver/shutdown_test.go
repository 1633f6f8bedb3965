package driver

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/snapmerge/snapmerge/pkg/keeper"
)

// shutdownEnv is how long the helper serves on when the node goes down, as
// time.ParseDuration reads it.
const shutdownEnv = "SNAPMERGE_TEST_SHUTDOWN"

// shutdownTime is what the end of a node may take.
const shutdownTime = 60 * time.Second

// TestShutdown ends a node with volumes in use: SIGTERM to keeper and node plugin, sync,
// umount. That ends soon and loses nothing that was synced; nor what was not, if file
// systems are unmounted before the plugin's patience is at its end.
func TestShutdown(t *testing.T) {
	t.Run("all at once", func(t *testing.T) { shutdown(t, "", false) })
	t.Run("processes first", func(t *testing.T) { shutdown(t, "2s", true) })
}

func shutdown(t *testing.T, limit string, processesFirst bool) {
	needDevices(t, "mkfs.ext4", "e2fsck")
	t.Setenv(shutdownEnv, limit)
	n := makeNode(t, nil)
	n.cfg.AdminSocket = filepath.Join(n.dir, "admin.sock")
	keep, _ := n.withKeeper()
	n.asProcesses()
	plugin := n.startProcess()
	t.Cleanup(func() { end(t, plugin, syscall.SIGKILL) })
	c := mountCap(writer, ext4)
	id := n.create("source", 100*mib, "", c)
	source := n.use(id, c)
	sh(t, "head -c 20971520 /dev/urandom >"+source+"/big")
	snap := n.snapshot("snap", id)
	copied := n.create("copy", 100*mib, snap.SnapshotId, c, "mergeRate", "1")
	target := n.use(copied, c)
	for _, dir := range []string{source, target} {
		sh(t, "head -c 8388608 /dev/urandom >"+dir+"/synced; sync -f "+dir)
	}
	want := sh(t, "cd "+source+"; sha256sum big synced; cd "+target+"; sha256sum big synced")
	for _, dir := range []string{source, target} {
		sh(t, "head -c 4194304 /dev/urandom >"+dir+"/dirty")
	}
	wantDirty := sh(t, "cat "+source+"/dirty "+target+"/dirty | sha256sum")

	begin := time.Now()
	for _, p := range []*exec.Cmd{plugin, keep} {
		if err := p.Process.Signal(syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
	}
	ended := func() {
		for _, p := range []*exec.Cmd{plugin, keep} {
			end(t, p, 0)
		}
	}
	if processesFirst {
		ended()
	}
	sync := "sync"
	if os.Getenv("SNAPMERGE_VM_GUEST") == "" { // elsewhere others have file systems, too
		sync = fmt.Sprintf("sync -f %s; sync -f %s", source, target)
	}
	// What fails because a device was taken away has ended, too.
	out, err := exec.Command("timeout", "-s", "KILL", fmt.Sprint(int(2*shutdownTime.Seconds())), "sh", "-c", sync).CombinedOutput()
	synced := time.Since(begin)
	if err != nil && !processesFirst {
		t.Errorf("sync: %v: %s", err, out)
	}
	n.unmountEverything()
	unmounted := time.Since(begin)
	ended()
	took := time.Since(begin)
	t.Logf("synced after %v, unmounted after %v, all ended after %v", synced, unmounted, took)
	if took > shutdownTime {
		t.Errorf("the shutdown took %v", took)
	}

	keep = helper(t, "keeper", n.cfg.KeeperSocket)
	plugin = n.startProcess()
	if s := n.status(copied); !s.DeviceDown {
		t.Errorf("the volume has a device: %+v", s)
	}
	source, target = n.use(id, c), n.use(copied, c)
	if got := sh(t, "cd "+source+"; sha256sum big synced; cd "+target+"; sha256sum big synced"); got != want {
		t.Errorf("what was synced is lost: %s, want %s", got, want)
	}
	if !processesFirst {
		if got := sh(t, "cat "+source+"/dirty "+target+"/dirty | sha256sum"); got != wantDirty {
			t.Error("what was written before the end is lost")
		}
	}
	n.leave(copied)
	n.leave(id)
	for _, id := range []string{copied, id} {
		n.delete(id)
	}
	end(t, plugin, syscall.SIGTERM)
}

// unmountEverything is umount -a, of all that is below the test's directory.
func (n *node) unmountEverything() {
	n.t.Helper()
	all, err := n.p.mounts()
	if err != nil {
		n.t.Fatal(err)
	}
	for i := len(all) - 1; i >= 0; i-- {
		if !below(n.dir, all[i].Path) {
			continue
		}
		out, err := exec.Command("timeout", "-s", "KILL", "120", "umount", all[i].Path).CombinedOutput()
		if err != nil {
			n.t.Errorf("umount %s: %v: %s", all[i].Path, err, strings.TrimSpace(string(out)))
		}
	}
}

// TestKeeperGoneBefore: a keeper that was gone long before the node plugin is told to end
// says nothing of the node; one that went just before does.
func TestKeeperGoneBefore(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "keeper.sock")
	keep := helper(t, "keeper", socket)
	k, err := keeper.Dial(t.Context(), socket)
	if err != nil {
		t.Fatal(err)
	}
	defer k.Close()
	if !keeperStays(k, time.Now()) {
		t.Error("the keeper is there")
	}
	end(t, keep, syscall.SIGKILL)
	for _, c := range []struct {
		after time.Duration
		stays bool
	}{{0, false}, {2 * keeperBefore, true}} {
		if stays := keeperStays(k, time.Now().Add(c.after)); stays != c.stays {
			t.Errorf("told to end %v after: %v, want %v", c.after, stays, c.stays)
		}
	}
}
