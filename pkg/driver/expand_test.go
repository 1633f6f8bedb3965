package driver

import (
	"fmt"
	"strings"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"

	"github.com/snapmerge/snapmerge/pkg/transport"
	"github.com/snapmerge/snapmerge/pkg/volume"
)

// TestExpandUnderLoad grows a volume in mid-merge while fio writes and verifies files of
// it. Where device or file system cannot grow in use, the answer says so, and they grow
// when the volume is staged again.
func TestExpandUnderLoad(t *testing.T) {
	for _, fsType := range []string{ext4, xfs} {
		t.Run(fsType, func(t *testing.T) {
			needDevices(t, "mkfs."+fsType, "fio")
			n := newNode(t, nil)
			c := mountCap(writer, fsType)
			id := n.create("source", 320*mib, "", c)
			writeFiles(t, n.use(id, c), 1, 100)
			want := sums(t, n.targetPath(id, "pod"))
			snap := n.snapshot("snap", id)
			n.leave(id)
			copied := n.create("copy", 320*mib, snap.SnapshotId, c, "mergeRate", "1")
			target := n.use(copied, c)
			load := startVerify(t, target)
			st, err := n.p.volumes.Status(copied)
			if err != nil || st.State != volume.Merging {
				t.Logf("on this slow machine the merge has ended before: %+v, %v", st, err)
			}

			const size = 448 * mib
			_, err = n.NodeExpandVolume(t.Context(), &csi.NodeExpandVolumeRequest{
				VolumeId: copied, VolumePath: target, CapacityRange: &csi.CapacityRange{RequiredBytes: size}})
			device := strings.TrimSpace(sh(t, "blockdev --getsize64 "+n.p.volumes.Device(copied)))
			switch grown := device == fmt.Sprint(size); {
			case err == nil && grown:
			case !grown && err != nil && strings.Contains(err.Error(), transport.ErrNoResize.Error()),
				grown && fsType == ext4 && !n.p.growsMounted:
				wantCode(t, err, codes.FailedPrecondition, "staged")
				t.Logf("grows when it is staged again: %v", err)
			default:
				t.Errorf("the device has %s bytes, %v", device, err)
			}
			t.Logf("merged to %.0f %%; %d rounds of fio, the longest wait of a request was %v", st.Percent, load.finish(), load.longest)
			n.leave(copied)
			target = n.use(copied, c)
			if got := sizeOf(t, target); got < 360*mib {
				t.Errorf("file system of %d bytes after growing to %d", got, size)
			}
			sh(t, "rm "+target+"/verify*")
			v, err := n.p.volumes.Get(copied)
			if err != nil {
				t.Fatal(err)
			}
			if err := v.SetRate(10000); err != nil {
				t.Fatal(err)
			}
			n.checkMerged(copied)
			if sums(t, target) != want {
				t.Error("files have changed")
			}
			n.leave(copied)
			n.checkClean(copied, fsType)
		})
	}
}
