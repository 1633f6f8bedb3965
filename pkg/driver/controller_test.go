package driver

import (
	"context"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"

	"github.com/snapmerge/snapmerge/pkg/blockio"
	"github.com/snapmerge/snapmerge/pkg/volume"
)

// noJournalFS cannot open journals that are there while it is told so.
type noJournalFS struct {
	blockio.FS
	on atomic.Bool
}

func (f *noJournalFS) Open(name string, flag blockio.Flag) (blockio.File, error) {
	if f.on.Load() && filepath.Base(name) == "journal" && flag&blockio.Create == 0 {
		return nil, syscall.EMFILE
	}
	return f.FS.Open(name, flag)
}

// TestCreateAgain: what kept a new volume from being opened is told, and is over
// when it is over.
func TestCreateAgain(t *testing.T) {
	needDevices(t)
	fs := &noJournalFS{FS: blockio.OS()}
	n := newNodeWith(t, func(p *plugin) { p.fs = fs })
	req := &csi.CreateVolumeRequest{Name: "v", VolumeCapabilities: []*csi.VolumeCapability{blockCap(writer)}}
	fs.on.Store(true)
	for range 2 {
		_, err := n.CreateVolume(t.Context(), req)
		wantCode(t, err, codes.Internal, "too many open files")
	}
	fs.on.Store(false)
	if _, err := n.CreateVolume(t.Context(), req); err != nil {
		t.Error(err)
	}
}

// TestTwoNamesOneID: the hash of a name that cannot be an id is a name itself.
func TestTwoNamesOneID(t *testing.T) {
	needDevices(t)
	n := newNode(t, nil)
	name := "A name that is not safe"
	id := n.create(name, mib, "", blockCap(writer))
	_, err := n.CreateVolume(t.Context(), &csi.CreateVolumeRequest{Name: id, VolumeCapabilities: []*csi.VolumeCapability{blockCap(writer)},
		CapacityRange: &csi.CapacityRange{RequiredBytes: mib}})
	wantCode(t, err, codes.AlreadyExists, name)
	if again := n.create(name, mib, "", blockCap(writer)); again != id {
		t.Errorf("the same again is %s", again)
	}
}

// fullFS has no room for snapshots.
type fullFS struct{ blockio.FS }

func (f fullFS) Open(name string, flag blockio.Flag) (blockio.File, error) {
	file, err := f.FS.Open(name, flag)
	if err == nil && strings.HasPrefix(filepath.Base(name), "data.cow") {
		return fullFile{file}, nil
	}
	return file, err
}

type fullFile struct{ blockio.File }

func (f fullFile) WriteAt([]byte, int64) (int, error) { return 0, syscall.ENOSPC }

// TestSnapshotPoolFull: the sidecar asks again and again. It must not be told to
// do so at once, and the pod is frozen only once.
func TestSnapshotPoolFull(t *testing.T) {
	needDevices(t, "mkfs.ext4")
	n := newNodeWith(t, func(p *plugin) { p.fs = fullFS{blockio.OS()} })
	var freezes atomic.Int32
	freeze := n.p.freeze
	n.p.freeze = func(ctx context.Context, volume string, dir int) (func() error, error) {
		freezes.Add(1)
		return freeze(ctx, volume, dir)
	}
	c := mountCap(writer, ext4)
	id := n.create("v", 64*mib, "", c)
	n.use(id, c)
	for range 3 {
		_, err := n.CreateSnapshot(t.Context(), &csi.CreateSnapshotRequest{Name: "s", SourceVolumeId: id})
		wantCode(t, err, codes.FailedPrecondition, "")
	}
	if freezes.Load() != 1 {
		t.Errorf("the pod was frozen %d times", freezes.Load())
	}
	n.leave(id)
}

// TestClaim: what the provisioner tells of the claim is kept, told of a volume
// that cannot be opened too, and makes no difference to which volume it is.
func TestClaim(t *testing.T) {
	needDevices(t)
	fs := &noJournalFS{FS: blockio.OS()}
	n := newNodeWith(t, func(p *plugin) { p.fs = fs })
	req := &csi.CreateVolumeRequest{
		Name: "pvc-1", VolumeCapabilities: []*csi.VolumeCapability{blockCap(writer)},
		Parameters: map[string]string{
			"mergeRate": "7", sidecarPrefix + "pvc/name": "data", sidecarPrefix + "pvc/namespace": "shop", sidecarPrefix + "pv/name": "pvc-1",
		},
	}
	want := volume.Claim{Namespace: "shop", PVC: "data", PV: "pvc-1"}
	check := func(when string) {
		t.Helper()
		if st, err := n.p.volumes.Status("pvc-1"); err != nil || st.Claim != want {
			t.Errorf("%s: %+v, %v", when, st.Claim, err)
		}
	}
	create := func() {
		t.Helper()
		if _, err := n.CreateVolume(t.Context(), req); err != nil {
			t.Error(err)
		}
	}
	create()
	check("made")
	delete(req.Parameters, sidecarPrefix+"pvc/name")
	create()
	check("asked for by a provisioner that does not tell")
	if err := n.stop(); err != nil {
		t.Fatal(err)
	}
	fs.on.Store(true)
	n.start(func(p *plugin) { p.fs = fs })
	check("not opened")
}
