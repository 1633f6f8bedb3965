package driver

import (
	"bufio"
	"context"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/snapmerge/snapmerge/pkg/keeper"
	"github.com/snapmerge/snapmerge/pkg/transport/fuseloop"
)

// TestRestart ends the node plugin, with and without warning, while somebody
// writes to a volume that is being merged. The keeper lives, so there is no
// error.
func TestRestart(t *testing.T) {
	needDevices(t, "mkfs.ext4")
	n := makeNode(t, nil)
	n.cfg.KeeperSocket = filepath.Join(n.dir, "keeper.sock")
	k := helper(t, "keeper", n.cfg.KeeperSocket)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	client, err := keeper.Dial(ctx, n.cfg.KeeperSocket)
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	if err := fuseloop.New(client).SurvivesRestart(); err != nil {
		t.Skip(err)
	}
	n.p = newPlugin(n.cfg) // for what the environment wants to know of it
	n.done = make(chan error, 1)
	n.cancel = func() { n.done <- nil }
	n.connect(filepath.Join(n.dir, "csi.sock"))
	plugin := n.startProcess()
	c := mountCap(writer, ext4)
	id := n.create("source", 256*mib, "", c)
	source := n.use(id, c)
	sh(t, "head -c 100M /dev/urandom >"+source+"/big")
	want := sh(t, "sha256sum <"+source+"/big")
	snap := n.snapshot("snap", id) // frozen by the keeper
	copied := n.create("copy", 300*mib, snap.SnapshotId, c, "mergeRate", "20")
	target := n.use(copied, c)

	stop := filepath.Join(n.dir, "stop")
	load := exec.Command("sh", "-ec", `i=0
		while [ ! -e "$1" ]; do
			i=$((i + 1))
			dd if=/dev/urandom of="$0/f$((i % 10))" bs=64k count=4 conv=fsync status=none
			echo $i
		done`, target, stop)
	load.Stderr = os.Stderr
	out, err := load.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := load.Start(); err != nil {
		t.Fatal(err)
	}
	rounds := bufio.NewScanner(out)
	for _, sig := range []syscall.Signal{syscall.SIGKILL, syscall.SIGTERM, syscall.SIGKILL, syscall.SIGTERM} {
		for range 10 {
			if !rounds.Scan() {
				t.Fatalf("the writer has ended: %v", load.Wait())
			}
		}
		end(t, plugin, sig)
		plugin = n.startProcess()
	}
	if got := sh(t, "sha256sum <"+target+"/big"); got != want {
		t.Error("the restored file has changed")
	}
	if err := os.WriteFile(stop, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	last := ""
	for rounds.Scan() {
		last = rounds.Text()
	}
	t.Logf("%s files were written meanwhile", last)
	if err := load.Wait(); err != nil {
		t.Errorf("writer: %v", err)
	}
	n.leave(copied)
	n.leave(id)
	if _, err := n.DeleteSnapshot(t.Context(), &csi.DeleteSnapshotRequest{SnapshotId: snap.SnapshotId}); err != nil {
		t.Error(err)
	}
	n.delete(copied)
	n.delete(id)
	end(t, plugin, syscall.SIGTERM) // in order: nothing is in service
	end(t, k, syscall.SIGKILL)
}

// startProcess starts a node plugin as a process of its own.
func (n *node) startProcess() *exec.Cmd {
	n.t.Helper()
	cfg, err := json.Marshal(n.cfg)
	if err != nil {
		n.t.Fatal(err)
	}
	cmd := helper(n.t, "node", string(cfg))
	n.waitReady()
	return cmd
}
