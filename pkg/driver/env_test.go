package driver

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/snapmerge/snapmerge/pkg/keeper"
	"github.com/snapmerge/snapmerge/pkg/transport/fuseloop"
	"github.com/snapmerge/snapmerge/test/machine"
)

// TestMain lets the test binary be a keeper or a node plugin.
func TestMain(m *testing.M) {
	keeper.Child(fuseloop.Tasks())
	var err error
	switch os.Getenv("DRIVER_TEST_HELPER") {
	case "":
		os.Exit(m.Run())
	case "keeper":
		err = keeper.Serve(context.Background(), os.Args[1], fuseloop.Tasks())
	case "node":
		var cfg Config
		if err = json.Unmarshal([]byte(os.Args[1]), &cfg); err == nil {
			ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
			defer stop()
			err = helperNode(ctx, cfg)
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// helperNode is Run, with what the tests want to be otherwise.
func helperNode(ctx context.Context, cfg Config) error {
	if err := cfg.check(); err != nil {
		return err
	}
	p := newPlugin(cfg)
	if limit, err := time.ParseDuration(os.Getenv(shutdownEnv)); err == nil {
		p.shutdownLimit = limit
	}
	return p.serve(ctx)
}

// helper starts the test binary as another process, which ends with the test at
// the latest.
func helper(t testing.TB, kind, arg string) *exec.Cmd {
	t.Helper()
	cmd := startHelper(t, kind, arg)
	t.Cleanup(func() { end(t, cmd, syscall.SIGKILL) })
	return cmd
}

// startHelper is helper; the caller ends the process.
func startHelper(t testing.TB, kind, arg string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command(os.Args[0], arg)
	cmd.Env = append(os.Environ(), "DRIVER_TEST_HELPER="+kind)
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	return cmd
}

// end sends a signal and waits for the end of the process.
func end(t testing.TB, cmd *exec.Cmd, sig syscall.Signal) {
	t.Helper()
	if cmd == nil || cmd.ProcessState != nil {
		return
	}
	cmd.Process.Signal(sig)
	gone := make(chan error, 1)
	go func() { gone <- cmd.Wait() }()
	select {
	case err := <-gone:
		if err != nil && sig == syscall.SIGTERM {
			t.Errorf("%v: %v", cmd.Args, err)
		}
	case <-time.After(patience):
		t.Fatalf("process %d does not end", cmd.Process.Pid)
	}
}

// patience is how long a test waits for what must come, and slack what a slow
// machine may add to what has a bound of its own.
const (
	patience = 3 * time.Minute
	slack    = 30 * time.Second
)

const (
	kib = 1 << 10
	mib = 1 << 20
	gib = 1 << 30
)

// needDevices skips where no block devices can be made.
func needDevices(t testing.TB, tools ...string) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("makes block devices and mounts, so it needs root")
	}
	for _, tool := range append(tools, "blkid", "mount", "umount") {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("needs %s", tool)
		}
		if kind, ok := strings.CutPrefix(tool, "mkfs."); ok {
			machine.NeedFS(t, kind)
		}
	}
	if err := fuseloop.New(nil).Probe(); err != nil {
		t.Skipf("needs FUSE and loop devices: %v", err)
	}
}

// transportEnv names the transport of all tests; not set: the best one.
const transportEnv = "SNAPMERGE_TEST_TRANSPORT"

// node is a node plugin in this process.
type node struct {
	t      testing.TB
	cfg    Config
	dir    string // below it all that the test makes
	p      *plugin
	cancel context.CancelFunc
	done   chan error

	csi.IdentityClient
	csi.ControllerClient
	csi.NodeClient
	conn *grpc.ClientConn
}

// newNodeWith is newNode; change may change what the plugin consists of.
func newNodeWith(t testing.TB, change func(p *plugin)) *node {
	t.Helper()
	n := makeNode(t, nil)
	n.start(change)
	return n
}

// newNode starts a node plugin with a new state directory. change, if not nil,
// may change its configuration.
func newNode(t testing.TB, change func(c *Config)) *node {
	t.Helper()
	n := makeNode(t, change)
	n.start(nil)
	return n
}

func makeNode(t testing.TB, change func(c *Config)) *node {
	t.Helper()
	dir := machine.SocketDir(t)
	n := &node{t: t, dir: dir, cfg: Config{
		Endpoint: "unix://" + filepath.Join(dir, "csi.sock"), NodeID: "node-1",
		StateDir: filepath.Join(dir, "state"), KubeletDir: filepath.Join(dir, "kubelet"), Init: true, Transport: os.Getenv(transportEnv),
	}}
	for _, d := range []string{"state", "kubelet/plugins_registry", "kubelet/pods"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if change != nil {
		change(&n.cfg)
	}
	t.Cleanup(n.cleanUp)
	return n
}

// start starts the plugin; change, if not nil, may change what it consists of.
func (n *node) start(change func(p *plugin)) {
	n.t.Helper()
	cfg := n.cfg
	if err := cfg.check(); err != nil {
		n.t.Fatal(err)
	}
	n.p = newPlugin(cfg)
	if change != nil {
		change(n.p)
	}
	var ctx context.Context
	ctx, n.cancel = context.WithCancel(context.Background())
	n.done = make(chan error, 1)
	go func(p *plugin) { n.done <- p.serve(ctx) }(n.p)
	n.connect(cfg.Endpoint)
	n.waitReady()
}

// asProcesses has the plugin run in processes of its own, which startProcess
// starts.
func (n *node) asProcesses() {
	n.t.Helper()
	n.p = newPlugin(n.cfg) // for what cleanUp wants to know of it
	n.done = make(chan error, 1)
	n.cancel = func() { n.done <- nil }
	n.connect(filepath.Join(n.dir, "csi.sock"))
}

// withKeeper starts a keeper for the plugin; see dialKeeper.
func (n *node) withKeeper() (process *exec.Cmd, client *keeper.Client) {
	n.t.Helper()
	n.cfg.KeeperSocket = filepath.Join(n.dir, "keeper.sock")
	process = helper(n.t, "keeper", n.cfg.KeeperSocket)
	return process, n.dialKeeper()
}

// dialKeeper connects to the node's keeper. It skips the test where devices would not
// survive a restart of the plugin all the same.
func (n *node) dialKeeper() *keeper.Client {
	n.t.Helper()
	ctx, cancel := context.WithTimeout(n.t.Context(), patience)
	defer cancel()
	client, err := keeper.Dial(ctx, n.cfg.KeeperSocket)
	if err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(func() { client.Close() })
	if err := fuseloop.New(client).SurvivesRestart(); err != nil && n.cfg.Transport == "" {
		n.t.Skip(err)
	}
	return client
}

func (n *node) connect(socket string) {
	n.t.Helper()
	soon := backoff.Config{BaseDelay: 10 * time.Millisecond, Multiplier: 1, MaxDelay: 10 * time.Millisecond}
	conn, err := grpc.NewClient("unix:"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: soon, MinConnectTimeout: time.Second}))
	if err != nil {
		n.t.Fatal(err)
	}
	n.conn = conn
	n.IdentityClient, n.ControllerClient, n.NodeClient = csi.NewIdentityClient(conn), csi.NewControllerClient(conn), csi.NewNodeClient(conn)
}

func (n *node) waitReady() {
	n.t.Helper()
	for end := time.Now().Add(patience); ; {
		ctx, cancel := context.WithTimeout(n.t.Context(), 5*time.Second)
		r, err := n.Probe(ctx, &csi.ProbeRequest{}, grpc.WaitForReady(true))
		cancel()
		if err == nil && r.GetReady().GetValue() {
			return
		}
		select {
		case err := <-n.done:
			n.done <- err
			n.t.Fatalf("node plugin has ended: %v", err)
		case <-time.After(10 * time.Millisecond):
		}
		if time.Now().After(end) {
			n.t.Fatalf("node plugin does not get ready: %v", err)
		}
	}
}

// stop ends the plugin.
func (n *node) stop() error {
	n.conn.Close()
	n.cancel()
	select {
	case err := <-n.done:
		n.done <- err
		return err
	case <-time.After(patience):
		n.t.Fatal("node plugin does not end")
		return nil
	}
}

// crash is the end of the node itself: no device and no mount is left, and what
// was not flushed to a device is lost.
func (n *node) crash() {
	n.t.Helper()
	for _, id := range n.p.volumes.IDs() {
		if err := n.p.volumes.Abort(id); err != nil {
			n.t.Fatal(err)
		}
	}
	n.unmountAll()
	if err := n.stop(); err != nil {
		n.t.Fatal(err)
	}
}

// hangsAfter makes the plugin take a device for hung after that time, until it is
// called with hangLimit. All that does not need it is done before and after, so
// that a slow disk is not a hung one. No call may be under way.
func (n *node) hangsAfter(limit time.Duration) { n.p.hangLimit.Store(int64(limit)) }

// unmountAll takes away all mounts below the test's directory.
func (n *node) unmountAll() (left []string) {
	all, err := n.p.mounts()
	if err != nil {
		n.t.Error(err)
	}
	for i := len(all) - 1; i >= 0; i-- {
		if below(n.dir, all[i].Path) {
			left = append(left, all[i].Path)
			unix.Unmount(all[i].Path, unix.MNT_DETACH)
		}
	}
	return left
}

// cleanUp leaves no mounts and devices behind whatever the test has done.
func (n *node) cleanUp() {
	left := n.unmountAll()
	if n.p.volumes != nil {
		for _, id := range n.p.inService() {
			left = append(left, id)
			if err := n.p.volumes.Abort(id); err != nil {
				n.t.Error(err)
			}
		}
	}
	if err := n.stop(); err != nil && !n.t.Failed() {
		n.t.Errorf("node plugin: %v", err)
	}
	if len(left) > 0 && !n.t.Failed() {
		n.t.Errorf("the test left behind: %q", left)
	}
	if err := os.RemoveAll(n.dir); err != nil {
		n.t.Error(err)
	}
}

func mountCap(mode csi.VolumeCapability_AccessMode_Mode, fsType string, flags ...string) *csi.VolumeCapability {
	return &csi.VolumeCapability{
		AccessMode: &csi.VolumeCapability_AccessMode{Mode: mode},
		AccessType: &csi.VolumeCapability_Mount{Mount: &csi.VolumeCapability_MountVolume{FsType: fsType, MountFlags: flags}},
	}
}

func blockCap(mode csi.VolumeCapability_AccessMode_Mode) *csi.VolumeCapability {
	return &csi.VolumeCapability{
		AccessMode: &csi.VolumeCapability_AccessMode{Mode: mode},
		AccessType: &csi.VolumeCapability_Block{Block: &csi.VolumeCapability_BlockVolume{}},
	}
}

const (
	writer = csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER
	rwop   = csi.VolumeCapability_AccessMode_SINGLE_NODE_SINGLE_WRITER
	rox    = csi.VolumeCapability_AccessMode_MULTI_NODE_READER_ONLY
)

// create makes a volume of that many bytes, from the snapshot if that is not
// empty, and returns its id. params are names and values of parameters.
func (n *node) create(name string, size int64, snapshot string, c *csi.VolumeCapability, params ...string) string {
	n.t.Helper()
	req := &csi.CreateVolumeRequest{Name: name, VolumeCapabilities: []*csi.VolumeCapability{c}, CapacityRange: &csi.CapacityRange{RequiredBytes: size}}
	if snapshot != "" {
		req.VolumeContentSource = fromSnapshot(snapshot)
	}
	for pair := range slices.Chunk(params, 2) {
		if req.Parameters == nil {
			req.Parameters = map[string]string{}
		}
		req.Parameters[pair[0]] = pair[1]
	}
	r, err := n.CreateVolume(n.t.Context(), req)
	if err != nil {
		n.t.Fatal(err)
	}
	return r.Volume.VolumeId
}

func fromSnapshot(id string) *csi.VolumeContentSource {
	return &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Snapshot{
		Snapshot: &csi.VolumeContentSource_SnapshotSource{SnapshotId: id}}}
}

// snapshot makes a snapshot and waits until it is ready.
func (n *node) snapshot(name, volume string) *csi.Snapshot {
	n.t.Helper()
	for end := time.Now().Add(patience); ; {
		r, err := n.CreateSnapshot(n.t.Context(), &csi.CreateSnapshotRequest{Name: name, SourceVolumeId: volume})
		if err != nil {
			n.t.Fatal(err)
		}
		if r.Snapshot.ReadyToUse {
			return r.Snapshot
		}
		if time.Now().After(end) {
			n.t.Fatal("snapshot does not get ready")
		}
	}
}

// stagingPath makes the directory that kubelet would.
func (n *node) stagingPath(id string) string {
	n.t.Helper()
	path := filepath.Join(n.dir, "kubelet", "plugins", id, "globalmount")
	err := os.MkdirAll(filepath.Dir(path), 0o750)
	if err == nil {
		err = os.Mkdir(path, 0o750)
	}
	if err != nil && !errors.Is(err, fs.ErrExist) { // a dead file system may be mounted there
		n.t.Fatal(err)
	}
	return path
}

func (n *node) targetPath(id, pod string) string {
	n.t.Helper()
	path := filepath.Join(n.dir, "kubelet", "pods", pod, "volumes", id)
	if err := os.MkdirAll(path, 0o750); err != nil {
		n.t.Fatal(err)
	}
	return filepath.Join(path, "mount")
}

func (n *node) stage(id string, c *csi.VolumeCapability) error {
	n.t.Helper()
	_, err := n.NodeStageVolume(n.t.Context(), &csi.NodeStageVolumeRequest{
		VolumeId: id, StagingTargetPath: n.stagingPath(id), VolumeCapability: c})
	return err
}

func (n *node) publish(id, pod string, c *csi.VolumeCapability, readOnly bool) (string, error) {
	n.t.Helper()
	target := n.targetPath(id, pod)
	_, err := n.NodePublishVolume(n.t.Context(), &csi.NodePublishVolumeRequest{
		VolumeId: id, StagingTargetPath: n.stagingPath(id), TargetPath: target, VolumeCapability: c, Readonly: readOnly})
	return target, err
}

// use stages and publishes a volume.
func (n *node) use(id string, c *csi.VolumeCapability) (target string) {
	n.t.Helper()
	if err := n.stage(id, c); err != nil {
		n.t.Fatal(err)
	}
	target, err := n.publish(id, "pod", c, false)
	if err != nil {
		n.t.Fatal(err)
	}
	return target
}

func (n *node) unpublish(id, pod string) {
	n.t.Helper()
	_, err := n.NodeUnpublishVolume(n.t.Context(), &csi.NodeUnpublishVolumeRequest{VolumeId: id, TargetPath: n.targetPath(id, pod)})
	if err != nil {
		n.t.Fatal(err)
	}
}

func (n *node) unstage(id string) {
	n.t.Helper()
	_, err := n.NodeUnstageVolume(n.t.Context(), &csi.NodeUnstageVolumeRequest{VolumeId: id, StagingTargetPath: n.stagingPath(id)})
	if err != nil {
		n.t.Fatal(err)
	}
}

// leave undoes use.
func (n *node) leave(id string) {
	n.t.Helper()
	n.unpublish(id, "pod")
	n.unstage(id)
}

func (n *node) delete(id string) {
	n.t.Helper()
	if _, err := n.DeleteVolume(n.t.Context(), &csi.DeleteVolumeRequest{VolumeId: id}); err != nil {
		n.t.Fatal(err)
	}
}

// wantCode checks the gRPC code of an error and a part of its text.
func wantCode(t testing.TB, err error, want codes.Code, text string) {
	t.Helper()
	if status.Code(err) != want || want != codes.OK && !strings.Contains(err.Error(), text) {
		t.Errorf("error %v, want %v with %q", err, want, text)
	}
}

func sh(t testing.TB, command string) string {
	t.Helper()
	out, err := exec.Command("sh", "-ec", command).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v: %s", command, err, out)
	}
	return string(out)
}
