package driver

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"k8s.io/mount-utils"

	"github.com/snapmerge/snapmerge/pkg/transport"
)

// TestReadOnlyBlockPublish: of a raw block volume that is written to there may be
// readers, too.
func TestReadOnlyBlockPublish(t *testing.T) {
	needDevices(t)
	n := newNode(t, nil)
	c := blockCap(writer)
	id := n.create("v", 64*mib, "", c)
	path := n.use(id, c)
	for range 2 { // again: nothing changes
		target, err := n.publish(id, "reader", c, true)
		if err != nil {
			t.Fatal(err)
		}
		at, err := n.p.mountsAt(target)
		if err != nil || len(at) != 1 || !readOnly(at[0]) {
			t.Errorf("mounted: %+v, %v", at, err)
		}
	}
	sh(t, "dd if=/dev/urandom of="+path+" bs=4k count=1 conv=fsync,notrunc status=none && cmp "+path+" "+n.targetPath(id, "reader"))
	n.unpublish(id, "reader")
	n.leave(id)
}

// TestDeviceOfOtherAccess: a device that was made for readers, by a process that
// was ended before it noted that, is not what a writer gets.
func TestDeviceOfOtherAccess(t *testing.T) {
	needDevices(t)
	n := newNode(t, nil)
	c := blockCap(writer)
	id := n.create("v", 64*mib, "", c)
	first, err := n.p.volumes.Attach(t.Context(), id, transport.Options{ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	user, err := os.Open(first)
	if err != nil {
		t.Fatal(err)
	}
	defer user.Close()
	wantCode(t, n.stage(id, c), codes.FailedPrecondition, "busy")
	user.Close()
	target := n.use(id, c)
	sh(t, "dd if=/dev/zero of="+target+" bs=4k count=1 conv=fsync,notrunc status=none")
	if err := n.stage(id, c); err != nil {
		t.Errorf("staging again: %v", err)
	}
	n.leave(id)
}

// halfMounter binds and then fails, as if the second step of a read-only bind
// mount did.
type halfMounter struct{ mount.Interface }

func (m halfMounter) Mount(source, target, fsType string, options []string) error {
	return errors.Join(m.Interface.Mount(source, target, fsType, []string{"bind"}), errors.New("no second step"))
}

// TestHalfPublished: read-only publications whose second step was never done.
func TestHalfPublished(t *testing.T) {
	needDevices(t, "mkfs.ext4")
	n := newNode(t, nil)
	c := mountCap(rwop, ext4)
	id := n.create("v", 64*mib, "", c)
	if err := n.stage(id, c); err != nil {
		t.Fatal(err)
	}
	whole := n.p.mounter
	n.p.mounter = halfMounter{whole}
	target, err := n.publish(id, "pod", c, true)
	wantCode(t, err, codes.Internal, "no second step")
	if at, err := n.p.mountsAt(target); err != nil || len(at) > 0 {
		t.Errorf("mounted at the target: %v, %v", at, err)
	}
	n.p.mounter = whole

	sh(t, "mkdir -p "+target+"; mount --bind "+n.stagingPath(id)+" "+target) // the process was ended here
	for range 2 {
		if _, err := n.publish(id, "pod", c, true); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(target, "x"), nil, 0o600); err == nil {
		t.Error("it can be written to")
	}
	if at, err := n.p.mountsAt(target); err != nil || len(at) != 1 {
		t.Errorf("mounted at the target: %v, %v", at, err)
	}
	_, err = n.publish(id, "pod", c, false)
	wantCode(t, err, codes.AlreadyExists, "read-only")
	n.leave(id)
}

// TestReadOnlyOption: the mount option ro makes a volume read-only as an access mode
// does, also where its file system has to grow first.
func TestReadOnlyOption(t *testing.T) {
	for _, fsType := range []string{ext4, xfs} {
		t.Run(fsType, func(t *testing.T) {
			needDevices(t, "mkfs."+fsType)
			n := newNode(t, nil)
			c := mountCap(writer, fsType)
			id := n.create("source", 320*mib, "", c)
			writeFiles(t, n.use(id, c), 1, 20)
			before := sums(t, n.targetPath(id, "pod"))
			snap := n.snapshot("snap", id)
			n.leave(id)
			ro := mountCap(writer, fsType, "ro", "noexec")
			copied := n.create("copy", 400*mib, snap.SnapshotId, ro)
			for range 2 { // again: nothing changes
				target := n.use(copied, ro)
				if sums(t, target) != before {
					t.Error("the files are others")
				}
				for _, dir := range []string{target, n.stagingPath(copied)} {
					if at, err := n.p.mountsAt(dir); err != nil || len(at) != 1 || !containsAll(at[0].Opts, "ro", "noexec") {
						t.Errorf("mounted: %+v, %v", at, err)
					}
				}
			}
			if got := sizeOf(t, n.targetPath(copied, "pod")); got < 320*mib {
				t.Errorf("file system of %d bytes", got)
			}
			n.leave(copied)
		})
	}
}

// TestExceedsCapabilities: what the volume cannot do is FAILED_PRECONDITION (CSI
// specification, errors of NodeStageVolume and NodePublishVolume).
func TestExceedsCapabilities(t *testing.T) {
	needDevices(t, "mkfs.ext4")
	n := newNode(t, nil)
	c := mountCap(writer, ext4)
	id := n.create("v", 64*mib, "", c)
	many := mountCap(csi.VolumeCapability_AccessMode_MULTI_NODE_MULTI_WRITER, ext4)
	wantCode(t, n.stage(id, many), codes.FailedPrecondition, "MULTI_NODE_MULTI_WRITER")
	n.use(id, c)
	_, err := n.publish(id, "other", many, false)
	wantCode(t, err, codes.FailedPrecondition, "MULTI_NODE_MULTI_WRITER")
	_, err = n.NodePublishVolume(t.Context(), &csi.NodePublishVolumeRequest{VolumeId: id, TargetPath: n.targetPath(id, "other"), VolumeCapability: c})
	wantCode(t, err, codes.FailedPrecondition, "staging_target_path")
	n.leave(id)
}

// TestRestoreOfUnused: a volume of a snapshot that never had a file system has room for
// the one that it gets.
func TestRestoreOfUnused(t *testing.T) {
	needDevices(t, "mkfs.xfs")
	n := newNode(t, nil)
	snap := n.snapshot("snap", n.create("source", 64*mib, "", mountCap(writer, ext4)))
	c := mountCap(writer, xfs)
	id := n.create("copy", 64*mib, snap.SnapshotId, c)
	n.use(id, c)
	n.leave(id)
	_, err := n.CreateVolume(t.Context(), &csi.CreateVolumeRequest{Name: "limited", VolumeCapabilities: []*csi.VolumeCapability{c},
		CapacityRange: &csi.CapacityRange{RequiredBytes: 64 * mib, LimitBytes: 128 * mib}, VolumeContentSource: fromSnapshot(snap.SnapshotId)})
	wantCode(t, err, codes.OutOfRange, "")
}
