package driver

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"

	"github.com/snapmerge/snapmerge/pkg/transport/fuseloop"
)

// TestBrokenVolume damages a volume while the node plugin is dead and its pod
// lives. The pod gets errors rather than waiting for ever, nobody is told that
// the device is gone, and once the volume is mended it is used as before.
func TestBrokenVolume(t *testing.T) {
	needDevices(t, "mkfs.ext4")
	n := makeNode(t, nil)
	n.cfg.AdminSocket = filepath.Join(n.dir, "admin.sock")
	_, client := n.withKeeper()
	n.asProcesses()
	var plugin *exec.Cmd
	t.Cleanup(func() { end(t, plugin, syscall.SIGKILL) })
	plugin = n.startProcess()
	c := mountCap(writer, ext4)
	broken, gone := n.create("broken", 64*mib, "", c), n.create("gone", 64*mib, "", c)
	for _, id := range []string{broken, gone} {
		sh(t, "echo kept >"+n.use(id, c)+"/kept; sync -f "+n.targetPath(id, "pod"))
	}
	end(t, plugin, syscall.SIGKILL)
	journal := filepath.Join(n.cfg.StateDir, "volumes", broken, "journal")
	good, err := os.ReadFile(journal)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(journal, bytes.Repeat([]byte{0x5a}, len(good)), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(filepath.Join(n.cfg.StateDir, "volumes", gone)); err != nil {
		t.Fatal(err)
	}
	plugin = n.startProcess()

	for _, id := range []string{broken, gone} {
		write := exec.Command("sh", "-c", "echo lost >$0/lost && sync $0/lost", n.targetPath(id, "pod"))
		if err := write.Start(); err != nil {
			t.Fatal(err)
		}
		ended := make(chan error, 1)
		go func() { ended <- write.Wait() }()
		select {
		case err := <-ended:
			if err == nil {
				t.Errorf("%s: what is written to it is said to be safe", id)
			}
		case <-time.After(patience):
			t.Fatalf("%s: a pod that writes waits for ever", id)
		}
	}
	_, err = n.DeleteVolume(t.Context(), &csi.DeleteVolumeRequest{VolumeId: broken})
	wantCode(t, err, codes.FailedPrecondition, "staged")
	if s := n.status(broken); s.Device == "" || s.Error == "" {
		t.Errorf("status %+v", s)
	}
	wantCode(t, n.stage(broken, c), codes.Internal, "")
	if err := os.WriteFile(journal, good, 0o600); err != nil {
		t.Fatal(err)
	}
	wantCode(t, n.stage(broken, c), codes.FailedPrecondition, "busy")
	n.leave(broken)
	if s := n.status(broken); s.Device != "" {
		t.Errorf("status after unstaging: %+v", s)
	}
	if got := sh(t, "cat "+n.use(broken, c)+"/kept"); got != "kept\n" {
		t.Errorf("the file has %q", got)
	}
	n.leave(broken)
	n.delete(broken)

	n.leave(gone)
	if left, err := fuseloop.New(client).Leftovers(t.Context()); err != nil || len(left) > 0 {
		t.Errorf("the keeper still has devices: %v, %v", left, err)
	}
	end(t, plugin, syscall.SIGTERM)
}
