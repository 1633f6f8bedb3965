package driver

import (
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"

	"github.com/snapmerge/snapmerge/pkg/transport/fuseloop"
	"github.com/snapmerge/snapmerge/pkg/volume"
)

// TestPassthrough: a volume of a class with snapshots: offline goes to its base while
// it is staged, over kill -9 of the plugin under load. It takes snapshots when it is
// not staged.
func TestPassthrough(t *testing.T) {
	needDevices(t, "mkfs.xfs", "fio", "xfs_repair")
	if err := fuseloop.New(nil).Passthrough(); err != nil {
		t.Skip(err)
	}
	n := makeNode(t, nil)
	n.cfg.AdminSocket, n.cfg.Transport = filepath.Join(n.dir, "admin.sock"), "fuse"
	n.withKeeper()
	n.asProcesses()
	var plugin *exec.Cmd
	t.Cleanup(func() { end(t, plugin, syscall.SIGKILL) })
	plugin = n.startProcess()
	c := mountCap(writer, xfs) // ext4 does not grow while mounted without CAP_SYS_RESOURCE
	id := n.create("v", 300*mib, "", c, "snapshots", "offline")
	base := filepath.Join(n.cfg.StateDir, "volumes", id, "base.img")
	target := n.use(id, c)
	state := func(want volume.State) {
		t.Helper()
		if s := n.status(id); s.State != want || s.Transport != "fuse" || s.Error != "" {
			t.Errorf("%+v, want %s", s, want)
		}
	}
	state(volume.Native)
	sh(t, "head -c 20M /dev/urandom >"+target+"/big")
	want := sh(t, "sha256sum <"+target+"/big")

	load := startVerify(t, target)
	for range 5 {
		load.round()
		end(t, plugin, syscall.SIGKILL)
		plugin = n.startProcess()
		state(volume.Native)
	}
	t.Logf("%d rounds of fio, the longest wait of a request was %v", load.finish(), load.longest)
	_, err := n.CreateSnapshot(t.Context(), &csi.CreateSnapshotRequest{Name: "s", SourceVolumeId: id})
	wantCode(t, err, codes.FailedPrecondition, "snapshots: offline")
	if _, err := n.NodeExpandVolume(t.Context(), &csi.NodeExpandVolumeRequest{VolumeId: id, VolumePath: target,
		CapacityRange: &csi.CapacityRange{RequiredBytes: 400 * mib}}); err != nil {
		t.Fatal(err)
	}
	sh(t, "head -c 250M /dev/urandom >"+target+"/more; sync -f "+target+"; rm "+target+"/more")
	state(volume.Native)
	n.leave(id)
	sh(t, "xfs_repair -n -f "+base)

	snap := n.snapshot("s", id)
	target = n.use(id, c) // with or without what is left of the snapshot
	if got := sh(t, "sha256sum <"+target+"/big"); got != want {
		t.Error("the file has changed")
	}
	n.leave(id)
	restored := n.create("w", 400*mib, snap.SnapshotId, c, "snapshots", "offline")
	target = n.use(restored, c)
	if s := n.status(restored); s.State == volume.Native && s.Layers > 0 {
		t.Errorf("%+v", s)
	}
	if got := sh(t, "sha256sum <"+target+"/big"); got != want {
		t.Error("the restored file differs")
	}
	n.leave(restored)
	eventuallyIdle(t, n, restored)
	target = n.use(restored, c)
	if s := n.status(restored); s.State != volume.Native {
		t.Errorf("merged and staged again: %+v", s)
	}
	if got := sh(t, "sha256sum <"+target+"/big"); got != want {
		t.Error("the restored file differs in the base")
	}
	n.leave(restored)
	if _, err := n.DeleteSnapshot(t.Context(), &csi.DeleteSnapshotRequest{SnapshotId: snap.SnapshotId}); err != nil {
		t.Error(err)
	}
	n.delete(restored)
	n.delete(id)
	end(t, plugin, syscall.SIGTERM)
}

// eventuallyIdle waits until nothing is above the volume's base.
func eventuallyIdle(t *testing.T, n *node, id string) {
	t.Helper()
	for stop := time.Now().Add(patience); n.status(id).Layers > 0; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(stop) {
			t.Fatalf("never merged: %+v", n.status(id))
		}
	}
}
