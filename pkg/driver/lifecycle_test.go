package driver

import (
	"context"
	"crypto/sha256"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"

	"github.com/snapmerge/snapmerge/pkg/transport"
	"github.com/snapmerge/snapmerge/pkg/volume"
)

// writeFiles writes files of random sizes and contents.
func writeFiles(t *testing.T, dir string, seed uint64, count int) {
	t.Helper()
	r := rand.New(rand.NewPCG(seed, 1))
	for i := range count {
		name := filepath.Join(dir, fmt.Sprintf("dir%d", r.IntN(7)), fmt.Sprintf("file%d", i))
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			t.Fatal(err)
		}
		b := make([]byte, r.IntN(200*kib))
		for j := range b {
			b[j] = byte(r.Uint32())
		}
		if err := os.WriteFile(name, b, 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// sums is a digest of every file below dir, by its path there.
func sums(t *testing.T, dir string) string {
	t.Helper()
	var b strings.Builder
	err := fs.WalkDir(os.DirFS(dir), ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		content, err := os.ReadFile(filepath.Join(dir, name))
		fmt.Fprintf(&b, "%s %x\n", name, sha256.Sum256(content))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return b.String()
}

func syncFS(t *testing.T, dir string) {
	t.Helper()
	fd, err := unix.Open(dir, unix.O_RDONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := unix.Syncfs(fd); err != nil {
		t.Fatal(err)
	}
}

// checkClean has the volume's file system checked, without repairing anything.
func (n *node) checkClean(id, fsType string) {
	n.t.Helper()
	dev, err := n.p.volumes.Attach(n.t.Context(), id, transport.Options{})
	if err != nil {
		n.t.Fatal(err)
	}
	args := []string{"e2fsck", "-f", "-n", dev}
	if fsType == xfs {
		args = []string{"xfs_repair", "-n", dev}
	}
	if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
		n.t.Errorf("%v: %v\n%s", args, err, out)
	}
	if err := n.p.volumes.Detach(n.t.Context(), id); err != nil {
		n.t.Error(err)
	}
}

func containsAll(list []string, all ...string) bool {
	return !slices.ContainsFunc(all, func(s string) bool { return !slices.Contains(list, s) })
}

func sizeOf(t *testing.T, dir string) int64 {
	t.Helper()
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		t.Fatal(err)
	}
	return int64(st.Blocks) * st.Bsize
}

func TestLifeCycle(t *testing.T) {
	for _, fsType := range []string{ext4, xfs} {
		t.Run(fsType, func(t *testing.T) { lifeCycle(t, fsType) })
	}
}

func lifeCycle(t *testing.T, fsType string) {
	needDevices(t, "mkfs."+fsType, "e2fsck", "resize2fs")
	n := newNode(t, nil)
	var freezes atomic.Int32
	freeze := n.p.freeze
	n.p.freeze = func(ctx context.Context, volume string, dir int) (func() error, error) {
		freezes.Add(1)
		return freeze(ctx, volume, dir)
	}
	c := mountCap(writer, fsType)
	id := n.create("source", 400*mib, "", c)
	target := n.use(id, c)
	writeFiles(t, target, 1, 200)
	before := sums(t, target)
	snap := n.snapshot("snap", id)
	if freezes.Load() != 1 {
		t.Errorf("%d freezes for a snapshot of a mounted volume", freezes.Load())
	}
	writeFiles(t, target, 2, 100)
	if sums(t, target) == before {
		t.Fatal("nothing was changed after the snapshot")
	}

	larger := n.create("larger", 600*mib, snap.SnapshotId, c)
	restored := n.use(larger, c)
	if sums(t, restored) != before {
		t.Error("the restored files are not those of the snapshot")
	}
	if got := sizeOf(t, restored); got < 520*mib {
		t.Errorf("the restored file system has %d bytes, it has not grown", got)
	}
	writeFiles(t, restored, 3, 50) // while it merges, or right after
	after := sums(t, restored)
	n.leave(larger)
	n.checkClean(larger, fsType)
	n.checkMerged(larger)
	restored = n.use(larger, c)
	if sums(t, restored) != after {
		t.Error("files have changed with the merge")
	}
	n.leave(larger)
	n.leave(id)
	n.checkClean(id, fsType)
	n.delete(id)
	n.delete(larger)
	if _, err := n.DeleteSnapshot(t.Context(), &csi.DeleteSnapshotRequest{SnapshotId: snap.SnapshotId}); err != nil {
		t.Error(err)
	}
}

// checkMerged waits until the volume is an ordinary one.
func (n *node) checkMerged(id string) {
	n.t.Helper()
	for end := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) {
		st, err := n.p.volumes.Status(id)
		if err != nil {
			n.t.Fatal(err)
		}
		if st.Layers == 0 {
			return
		}
		if time.Now().After(end) {
			n.t.Fatalf("volume %s does not get merged: %+v", id, st)
		}
	}
}

// TestReadOnlyMany restores what a power failure would leave and mounts it for
// readers.
func TestReadOnlyMany(t *testing.T) {
	for _, fsType := range []string{ext4, xfs} {
		t.Run(fsType, func(t *testing.T) {
			needDevices(t, "mkfs."+fsType)
			n := newNode(t, nil)
			// No freeze: the journal is dirty.
			n.p.freeze = func(context.Context, string, int) (func() error, error) { return func() error { return nil }, nil }
			c := mountCap(writer, fsType)
			id := n.create("source", 400*mib, "", c)
			target := n.use(id, c)
			writeFiles(t, target, 1, 20)
			syncFS(t, target)
			before := sums(t, target)
			snap := n.snapshot("snap", id)
			for _, size := range []int64{400 * mib, 600 * mib} {
				ro := mountCap(rox, fsType, "nosuid", "nodev", "noexec")
				copied := n.create(fmt.Sprintf("copy-%d", size), size, snap.SnapshotId, ro)
				first := n.use(copied, ro)
				second, err := n.publish(copied, "other", ro, false)
				if err != nil {
					t.Fatal(err)
				}
				for _, dir := range []string{first, second, n.stagingPath(copied)} {
					if sums(t, dir) != before {
						t.Errorf("%s does not have the files of the snapshot", dir)
					}
					if err := os.WriteFile(filepath.Join(dir, "x"), nil, 0o600); err == nil {
						t.Errorf("%s can be written to", dir)
					}
					if at, err := n.p.mountsAt(dir); err != nil || len(at) != 1 || !containsAll(at[0].Opts, "nosuid", "nodev", "noexec") {
						t.Errorf("%s has lost options: %v, %v", dir, at, err)
					}
				}
				if got := sizeOf(t, first); got < size*8/10 {
					t.Errorf("file system of %d bytes on a volume of %d", got, size)
				}
				n.unpublish(copied, "other")
				n.leave(copied)
				n.delete(copied)
			}
			n.leave(id)
		})
	}
}

func TestBlockVolume(t *testing.T) {
	needDevices(t)
	n := newNode(t, nil)
	c := blockCap(writer)
	id := n.create("source", 64*mib, "", c)
	target := n.use(id, c)
	if _, err := blockNumber(target); err != nil {
		t.Fatal(err)
	}
	sh(t, "dd if=/dev/urandom of="+target+" bs=1M count=8 conv=fsync,notrunc status=none")
	want := sh(t, "sha256sum <"+target)
	snap := n.snapshot("snap", id)
	sh(t, "dd if=/dev/urandom of="+target+" bs=1M count=8 conv=fsync,notrunc status=none")
	copied := n.create("copy", 64*mib, snap.SnapshotId, c)
	if got := sh(t, "sha256sum <"+n.use(copied, c)); got != want {
		t.Errorf("restored image has %s, want %s", got, want)
	}
	// Larger while it is published.
	r, err := n.NodeExpandVolume(t.Context(), &csi.NodeExpandVolumeRequest{
		VolumeId: copied, VolumePath: n.targetPath(copied, "pod"), CapacityRange: &csi.CapacityRange{RequiredBytes: 80*mib + 1}})
	if err != nil || r.CapacityBytes != 80*mib+bs {
		t.Errorf("expanded to %v, %v", r, err)
	}
	if got := strings.TrimSpace(sh(t, "blockdev --getsize64 "+n.targetPath(copied, "pod"))); got != fmt.Sprint(80*mib+bs) {
		t.Errorf("device has %s bytes", got)
	}
	n.leave(copied)

	ro := blockCap(rox)
	reader := n.create("reader", 64*mib, snap.SnapshotId, ro)
	target = n.use(reader, ro)
	if got := sh(t, "sha256sum <"+target); got != want {
		t.Errorf("read-only image has %s, want %s", got, want)
	}
	if f, err := os.OpenFile(target, os.O_WRONLY, 0); err == nil {
		if _, err := f.Write(make([]byte, bs)); err == nil && f.Sync() == nil {
			t.Error("a read-only block volume can be written to")
		}
		f.Close()
	}
	n.leave(reader)
	n.leave(id)
	// A guest may have written anything: it is never formatted.
	wantCode(t, n.stage(id, mountCap(writer, "")), codes.FailedPrecondition, "not formatted")
	n.delete(id) // no device is left by the attempt
}

// TestWrongContent: what is not recognised, or something else than asked for, is
// left alone.
func TestWrongContent(t *testing.T) {
	needDevices(t, "mkfs.ext4", "mkfs.xfs")
	n := newNode(t, nil)
	c := mountCap(writer, ext4)
	id := n.create("v", 400*mib, "", c)
	writeFiles(t, n.use(id, c), 1, 10)
	before := sums(t, n.targetPath(id, "pod"))
	n.leave(id)
	wantCode(t, n.stage(id, mountCap(writer, xfs)), codes.FailedPrecondition, "it has ext4, wanted is xfs")
	snap := n.snapshot("snap", id)
	_, err := n.CreateVolume(t.Context(), &csi.CreateVolumeRequest{Name: "w", VolumeCapabilities: []*csi.VolumeCapability{mountCap(writer, xfs)},
		CapacityRange: &csi.CapacityRange{RequiredBytes: 400 * mib}, VolumeContentSource: fromSnapshot(snap.SnapshotId)})
	wantCode(t, err, codes.InvalidArgument, "xfs is asked for")
	// Whoever asks for nothing gets what there is.
	if got := sums(t, n.use(id, mountCap(writer, ""))); got != before {
		t.Error("files have changed")
	}
	n.leave(id)

	// A second signature, and garbage.
	dev, err := n.p.volumes.Attach(t.Context(), id, transport.Options{})
	if err != nil {
		t.Fatal(err)
	}
	img := filepath.Join(n.dir, "xfs.img")
	sh(t, "truncate -s 400M "+img+"; mkfs.xfs -q "+img+"; dd if="+img+" of="+dev+" bs=512 count=1 conv=notrunc,fsync status=none")
	wantCode(t, n.stage(id, c), codes.FailedPrecondition, "several")
	if dev, err = n.p.volumes.Attach(t.Context(), id, transport.Options{}); err != nil {
		t.Fatal(err)
	}
	sh(t, "dd if=/dev/urandom of="+dev+" bs=1M count=2 conv=notrunc,fsync status=none")
	garbage := sh(t, "sha256sum <"+dev)
	wantCode(t, n.stage(id, mountCap(writer, "")), codes.FailedPrecondition, "not formatted")
	if dev, err = n.p.volumes.Attach(t.Context(), id, transport.Options{}); err != nil {
		t.Fatal(err)
	}
	if got := sh(t, "sha256sum <"+dev); got != garbage {
		t.Error("content was changed by a refused stage")
	}
	if err := n.p.volumes.Detach(t.Context(), id); err != nil {
		t.Error(err)
	}
}

// TestBadFileSystem: what fsck cannot mend by itself is not mounted.
func TestBadFileSystem(t *testing.T) {
	needDevices(t, "mkfs.ext4", "debugfs")
	n := newNode(t, nil)
	c := mountCap(writer, ext4)
	id := n.create("v", 64*mib, "", c)
	writeFiles(t, n.use(id, c), 1, 50)
	n.leave(id)
	dev, err := n.p.volumes.Attach(t.Context(), id, transport.Options{})
	if err != nil {
		t.Fatal(err)
	}
	// Two files with the same blocks: a question that -p does not answer.
	sh(t, "debugfs -w -R 'clri <2>' "+dev+"; debugfs -w -R 'ssv state 0' "+dev)
	wantCode(t, n.stage(id, c), codes.FailedPrecondition, "e2fsck")
	if n.p.volumes.Device(id) != "" {
		t.Error("the device is left")
	}
}

// TestReboot: after the loss of all devices and mounts staging brings everything
// back, and the merge goes on.
func TestReboot(t *testing.T) {
	for _, fsType := range []string{ext4, xfs} {
		t.Run(fsType, func(t *testing.T) {
			needDevices(t, "mkfs."+fsType)
			n := newNode(t, nil)
			c := mountCap(writer, fsType)
			id := n.create("source", 400*mib, "", c)
			writeFiles(t, n.use(id, c), 1, 200)
			snap := n.snapshot("snap", id)
			copied := n.create("copy", 400*mib, snap.SnapshotId, c, "mergeRate", "1")
			target := n.use(copied, c)
			writeFiles(t, target, 2, 50)
			syncFS(t, target)
			want := map[string]string{id: sums(t, n.targetPath(id, "pod")), copied: sums(t, target)}
			syncFS(t, n.targetPath(id, "pod"))
			st, err := n.p.volumes.Status(copied)
			switch {
			case err == nil && st.State == volume.Merged:
				t.Log("on this slow machine the merge has ended before the reboot")
			case err != nil || st.State != volume.Merging:
				t.Fatalf("the merge is to be under way: %+v, %v", st, err)
			}
			n.crash()
			n.start(nil)
			for id, want := range want {
				if n.p.volumes.Device(id) != "" {
					t.Errorf("%s has a device after a reboot", id)
				}
				if st, _ := n.p.volumes.Status(id); !st.DeviceDown {
					t.Errorf("nobody hears that %s has no device: %+v", id, st)
				}
				if got := sums(t, n.use(id, c)); got != want {
					t.Errorf("%s does not have its files any more", id)
				}
				if st, _ := n.p.volumes.Status(id); st.DeviceDown {
					t.Errorf("%s is still said to have no device: %+v", id, st)
				}
			}
			v, err := n.p.volumes.Get(copied)
			if err != nil {
				t.Fatal(err)
			}
			if err := v.SetRate(1000); err != nil {
				t.Fatal(err)
			}
			n.checkMerged(copied)
			if got := sums(t, n.targetPath(copied, "pod")); got != want[copied] {
				t.Error("files have changed with the merge")
			}
			n.leave(id)
			n.leave(copied)
			n.checkClean(copied, fsType)
		})
	}
}

// TestDeadDevice: a volume whose device has died is staged anew, whatever is
// still mounted.
func TestDeadDevice(t *testing.T) {
	for _, fsType := range []string{ext4, xfs} {
		t.Run(fsType, func(t *testing.T) {
			needDevices(t, "mkfs."+fsType)
			n := newNode(t, nil)
			c := mountCap(writer, fsType)
			id := n.create("v", 400*mib, "", c)
			target := n.use(id, c)
			writeFiles(t, target, 1, 10)
			syncFS(t, target)
			want := sums(t, target)
			if err := n.p.volumes.Abort(id); err != nil {
				t.Fatal(err)
			}
			_, err := n.publish(id, "new", c, false)
			wantCode(t, err, codes.FailedPrecondition, "not staged")
			if err := n.stage(id, c); err != nil {
				t.Fatal(err)
			}
			// The old pod must not be told that it has the volume.
			_, err = n.publish(id, "pod", c, false)
			wantCode(t, err, codes.AlreadyExists, "mounted there")
			target, err = n.publish(id, "new", c, false)
			if err != nil {
				t.Fatal(err)
			}
			if sums(t, target) != want {
				t.Error("files are lost")
			}
			n.unpublish(id, "pod")
			n.unpublish(id, "new")
			n.unstage(id)
			n.checkClean(id, fsType)
		})
	}
}

// TestSnapshotOfBlank: what is restored from a volume that nobody has used yet
// can be used.
func TestSnapshotOfBlank(t *testing.T) {
	needDevices(t, "mkfs.ext4")
	n := newNode(t, nil)
	c := mountCap(writer, ext4)
	id := n.create("v", 64*mib, "", c)
	snap := n.snapshot("snap", id)
	copied := n.create("copy", 128*mib, snap.SnapshotId, c)
	target := n.use(copied, c)
	writeFiles(t, target, 1, 10)
	if got := sizeOf(t, target); got < 100*mib {
		t.Errorf("file system of %d bytes", got)
	}
	n.leave(copied)
}

// TestSnapshotTopology: a snapshot says which node has it, and is not made for
// another one.
func TestSnapshotTopology(t *testing.T) {
	needDevices(t)
	n := newNode(t, nil)
	id := n.create("v", 64*mib, "", mountCap(writer, ext4))
	info, err := n.NodeGetInfo(t.Context(), &csi.NodeGetInfoRequest{})
	if err != nil {
		t.Fatal(err)
	}
	here := info.GetAccessibleTopology()
	req := &csi.CreateSnapshotRequest{Name: "s", SourceVolumeId: id,
		AccessibilityRequirements: &csi.TopologyRequirement{Requisite: []*csi.Topology{here}}}
	got, err := n.CreateSnapshot(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	if at := got.GetSnapshot().GetAccessibleTopology(); len(at) != 1 || !proto.Equal(at[0], here) {
		t.Errorf("snapshot is accessible at %v, node at %v", at, here)
	}
	elsewhere := &csi.Topology{Segments: map[string]string{}}
	for key := range here.GetSegments() {
		elsewhere.Segments[key] = "another-node"
	}
	req.Name, req.AccessibilityRequirements.Requisite = "t", []*csi.Topology{elsewhere}
	_, err = n.CreateSnapshot(t.Context(), req)
	wantCode(t, err, codes.ResourceExhausted, "not on this node")
}

// TestExpand grows a file system that is mounted, and one that is not.
func TestExpand(t *testing.T) {
	for _, fsType := range []string{ext4, xfs} {
		t.Run(fsType, func(t *testing.T) {
			needDevices(t, "mkfs."+fsType)
			n := newNode(t, nil)
			c := mountCap(writer, fsType)
			id := n.create("v", 400*mib, "", c)
			target := n.use(id, c)
			writeFiles(t, target, 1, 10)
			want := sums(t, target)
			expand := func(size int64) error {
				_, err := n.NodeExpandVolume(t.Context(), &csi.NodeExpandVolumeRequest{
					VolumeId: id, VolumePath: target, CapacityRange: &csi.CapacityRange{RequiredBytes: size}})
				return err
			}
			err := expand(600 * mib)
			if fsType == ext4 && !n.p.growsMounted {
				wantCode(t, err, codes.FailedPrecondition, "CAP_SYS_RESOURCE")
				n.leave(id)
				n.use(id, c)
				t.Log("grown when staged again; growing a mounted ext4 needs CAP_SYS_RESOURCE")
			} else if err != nil {
				t.Fatal(err)
			}
			if got := sizeOf(t, target); got < 520*mib {
				t.Errorf("file system of %d bytes after growing to 600 MiB", got)
			}
			if err := expand(600 * mib); err != nil {
				t.Errorf("the same again: %v", err)
			}
			if err := expand(100 * mib); err != nil {
				t.Errorf("a size that it has already: %v", err)
			}
			_, err = n.NodeExpandVolume(t.Context(), &csi.NodeExpandVolumeRequest{VolumeId: id, VolumePath: target,
				CapacityRange: &csi.CapacityRange{LimitBytes: 100 * mib}})
			wantCode(t, err, codes.OutOfRange, "")
			wantCode(t, expand(1<<60), codes.OutOfRange, "pool")
			if sums(t, target) != want {
				t.Error("files have changed")
			}
			n.leave(id)
			n.checkClean(id, fsType)
		})
	}
}
