package driver

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"

	"github.com/snapmerge/snapmerge/pkg/blockio"
	"github.com/snapmerge/snapmerge/pkg/keeper"
	"github.com/snapmerge/snapmerge/pkg/transport/fuseloop"
)

// TestBrokenVolume damages a volume while the node plugin is dead and its pod
// lives. The pod gets errors rather than waiting for ever, nobody is told that
// the device is gone, and once the volume is mended it is used as before.
func TestBrokenVolume(t *testing.T) {
	needDevices(t, "mkfs.ext4")
	n := makeNode(t, nil)
	n.cfg.KeeperSocket = filepath.Join(n.dir, "keeper.sock")
	n.cfg.AdminSocket = filepath.Join(n.dir, "admin.sock")
	helper(t, "keeper", n.cfg.KeeperSocket)
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
