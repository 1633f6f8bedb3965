package localnode

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	csi "github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
)

// NodeID is the name of a Node.
const NodeID = "local"

// Node is a keeper and a node plugin with everything of theirs in one directory.
// One goroutine uses it at a time.
type Node struct {
	*Client
	// Plugin and Keeper are their processes; nil: there is none.
	Plugin, Keeper *Process

	binary, dir string
	used        map[string]*csi.VolumeCapability // by volume: staged, or half so
	volumes     map[string]bool
	snapshots   map[string]bool
}

// maxSocketPath is the most bytes that the kernel takes as the path of a socket,
// see unix(7).
const maxSocketPath = 107

// CheckDir refuses a directory in which no socket can have its name.
func CheckDir(dir string) error {
	if n := len(filepath.Join(dir, "keeper.sock")); n > maxSocketPath {
		return fmt.Errorf("%s is %d bytes too long for the path of a socket", dir, n-maxSocketPath)
	}
	return nil
}

// Open makes the directories of a node in dir and starts it: the program, with args
// for the node plugin. Close follows, after an error too, unless the Node is nil.
func Open(ctx context.Context, binary, dir string, args ...string) (*Node, error) {
	if err := CheckDir(dir); err != nil {
		return nil, err
	}
	n := &Node{binary: binary, dir: dir, used: map[string]*csi.VolumeCapability{}, volumes: map[string]bool{}, snapshots: map[string]bool{}}
	for _, sub := range []string{"state", "stage", "pods"} {
		if err := os.Mkdir(n.Path(sub), 0o700); err != nil {
			return nil, err
		}
	}
	var err error
	if n.Client, err = Dial(n.Path("csi.sock")); err != nil {
		return nil, err
	}
	if n.Keeper, err = Start(binary, n.Path("keeper.log"), "keeper", "--socket", n.Path("keeper.sock")); err != nil {
		return n, err
	}
	return n, n.StartPlugin(ctx, args...)
}

// StartPlugin starts the plugin, after StopPlugin, and waits until it answers.
func (n *Node) StartPlugin(ctx context.Context, args ...string) (err error) {
	n.Plugin, err = Start(n.binary, n.Path("node.log"), append([]string{"node", "--endpoint", "unix://" + n.Path("csi.sock"),
		"--node-id", NodeID, "--state-dir", n.Path("state"), "--init", "--keeper", n.Path("keeper.sock"),
		"--admin-socket", n.AdminSocket(), "--kube-api", "off"}, args...)...)
	if err != nil {
		return err
	}
	return n.WaitReady(ctx, n.Plugin)
}

// StopPlugin stops the plugin. Devices stay.
func (n *Node) StopPlugin() error {
	p := n.Plugin
	n.Plugin = nil
	return p.Stop()
}

// Path is the name of something in the node's directory.
func (n *Node) Path(elem ...string) string {
	return filepath.Join(append([]string{n.dir}, elem...)...)
}

// AdminSocket is where the plugin tells its status.
func (n *Node) AdminSocket() string { return n.Path("admin.sock") }

// Create makes a volume of that many bytes, from the snapshot unless that is "", with
// the parameters that a StorageClass would give.
func (n *Node) Create(ctx context.Context, name string, size int64, snapshot string, c *csi.VolumeCapability, params map[string]string) (id string, err error) {
	req := &csi.CreateVolumeRequest{Name: name, CapacityRange: &csi.CapacityRange{RequiredBytes: size}, VolumeCapabilities: []*csi.VolumeCapability{c}, Parameters: params}
	if snapshot != "" {
		req.VolumeContentSource = FromSnapshot(snapshot)
	}
	r, err := n.CreateVolume(ctx, req)
	if err != nil {
		return "", err
	}
	id = r.GetVolume().GetVolumeId()
	n.volumes[id] = true
	return id, nil
}

// Snapshot makes a snapshot of a volume and waits until it is ready.
func (n *Node) Snapshot(ctx context.Context, name, volume string) (id string, err error) {
	for {
		r, err := n.CreateSnapshot(ctx, &csi.CreateSnapshotRequest{Name: name, SourceVolumeId: volume})
		if err != nil {
			return "", err
		}
		id = r.GetSnapshot().GetSnapshotId()
		n.snapshots[id] = true
		if r.GetSnapshot().GetReadyToUse() {
			return id, nil
		}
		select {
		case <-ctx.Done():
			return "", ctx.Err()
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// Use stages and publishes a volume, and returns where a pod would find it.
func (n *Node) Use(ctx context.Context, id string, c *csi.VolumeCapability) (path string, err error) {
	if err := os.Mkdir(n.Path("stage", id), 0o700); err != nil {
		return "", err
	}
	n.used[id] = c
	if _, err := n.NodeStageVolume(ctx, &csi.NodeStageVolumeRequest{VolumeId: id, StagingTargetPath: n.Path("stage", id), VolumeCapability: c}); err != nil {
		return "", err
	}
	_, err = n.NodePublishVolume(ctx, &csi.NodePublishVolumeRequest{
		VolumeId: id, StagingTargetPath: n.Path("stage", id), TargetPath: n.Path("pods", id), VolumeCapability: c})
	return n.Path("pods", id), err
}

// Leave undoes Use, however far that got.
func (n *Node) Leave(ctx context.Context, id string) error {
	if n.used[id] == nil {
		return nil
	}
	if _, err := n.NodeUnpublishVolume(ctx, &csi.NodeUnpublishVolumeRequest{VolumeId: id, TargetPath: n.Path("pods", id)}); err != nil {
		return err
	}
	if _, err := n.NodeUnstageVolume(ctx, &csi.NodeUnstageVolumeRequest{VolumeId: id, StagingTargetPath: n.Path("stage", id)}); err != nil {
		return err
	}
	delete(n.used, id)
	return os.RemoveAll(n.Path("stage", id))
}

// Delete deletes a volume, which it leaves first.
func (n *Node) Delete(ctx context.Context, id string) error {
	if err := n.Leave(ctx, id); err != nil {
		return err
	}
	_, err := n.DeleteVolume(ctx, &csi.DeleteVolumeRequest{VolumeId: id})
	if err == nil {
		delete(n.volumes, id)
	}
	return err
}

// DropSnapshot deletes a snapshot.
func (n *Node) DropSnapshot(ctx context.Context, id string) error {
	_, err := n.DeleteSnapshot(ctx, &csi.DeleteSnapshotRequest{SnapshotId: id})
	if err == nil {
		delete(n.snapshots, id)
	}
	return err
}

// closeLimit is how long Close may take.
const closeLimit = 2 * time.Minute

// Close takes everything down that was made here. The files of the node, its
// logs among them, stay.
func (n *Node) Close() error {
	ctx, cancel := context.WithTimeout(context.Background(), closeLimit)
	defer cancel()
	var errs []error
	if n.Plugin != nil {
		for id := range n.volumes {
			errs = append(errs, n.Delete(ctx, id))
		}
		for id := range n.snapshots {
			errs = append(errs, n.DropSnapshot(ctx, id))
		}
	}
	errs = append(errs, n.Plugin.Stop(), n.Keeper.Stop(), n.Client.Close())
	return errors.Join(errs...)
}

// LogTail is an error with the last lines of the plugin's log, or nil.
func LogTail(log string) error {
	b, err := os.ReadFile(log)
	if err != nil || len(b) == 0 {
		return nil
	}
	lines := strings.Split(strings.TrimSpace(string(b)), "\n")
	return fmt.Errorf("end of %s:\n%s", log, strings.Join(lines[max(0, len(lines)-15):], "\n"))
}

// Mounted tells whether something is mounted below a directory.
func Mounted(dir string) (bool, error) {
	b, err := os.ReadFile("/proc/self/mountinfo")
	return strings.Contains(string(b), dir), err
}

// Free is the room of the file system that dir is in, in bytes.
func Free(dir string) (int64, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return 0, fmt.Errorf("%s: %w", dir, err)
	}
	return int64(st.Bavail) * st.Bsize, nil
}
