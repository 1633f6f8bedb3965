package driver

import (
	"bytes"
	"cmp"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/snapmerge/snapmerge/pkg/admin"
	"github.com/snapmerge/snapmerge/pkg/volume"
	"github.com/snapmerge/snapmerge/test/nextrelease"
)

// releases are the programs of this and the next release: of nextrelease.Dir, for
// machines without a Go toolchain, or built now.
func releases(t *testing.T) (this, next string) {
	t.Helper()
	if dir := os.Getenv(nextrelease.Dir); dir != "" {
		return filepath.Join(dir, nextrelease.This), filepath.Join(dir, nextrelease.Next)
	}
	if testing.Short() {
		t.Skip("builds two releases, which takes its time; run it without -short")
	}
	dir := t.TempDir()
	nextrelease.Build(t, dir)
	return filepath.Join(dir, nextrelease.This), filepath.Join(dir, nextrelease.Next)
}

// TestUpgrade replaces a node plugin by that of a release whose volume records have a
// newer format, while fio writes and verifies files of a volume that is being merged,
// and then the keeper. An attempt to go back in between is refused, with one error, and
// costs nothing but time.
func TestUpgrade(t *testing.T) {
	needDevices(t, "mkfs.ext4", "fio", "e2fsck")
	this, next := releases(t)
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL} {
		t.Run(sig.String(), func(t *testing.T) { upgrade(t, this, next, sig) })
	}
}

func upgrade(t *testing.T, this, next string, sig syscall.Signal) {
	const size = 160 * mib
	n := makeNode(t, nil)
	n.cfg.AdminSocket, n.cfg.MetricsAddr = filepath.Join(n.dir, "admin.sock"), metricsAddr()
	n.cfg.KeeperSocket = filepath.Join(n.dir, "keeper.sock")
	keep := startRelease(t, this, "keeper", "--socket", n.cfg.KeeperSocket)
	t.Cleanup(func() { end(t, keep, syscall.SIGKILL) })
	client := n.dialKeeper()
	n.asProcesses()
	var plugin *exec.Cmd
	t.Cleanup(func() { end(t, plugin, syscall.SIGKILL) })
	start := func(program string) {
		t.Helper()
		plugin = startRelease(t, program, n.args()...)
		n.waitReady()
	}
	start(this)
	c := mountCap(writer, ext4)
	id := n.create("source", size, "", c)
	source := n.use(id, c)
	sh(t, "head -c 41943040 /dev/urandom >"+source+"/big")
	want := sh(t, "sha256sum <"+source+"/big")
	snap := n.snapshot("snap", id)
	image := n.create("image", size, snap.SnapshotId, blockCap(writer), "mergeRate", "2")
	wantImage := sh(t, "sha256sum <"+n.use(image, blockCap(writer)))
	copied := n.create("copy", size, snap.SnapshotId, c, "mergeRate", "2")
	target := n.use(copied, c)
	wantFormat := func(when string, format float64) {
		t.Helper()
		for _, id := range []string{id, image, copied} {
			r := n.record(id)
			if upgraded, _ := r["upgraded"].(bool); r["format"] != format || upgraded != (format > 1) {
				t.Errorf("%s the record of %s has format %v, upgraded %v", when, id, r["format"], r["upgraded"])
			}
		}
	}
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	load := startVerify(t, target)
	anywhere := func() {
		load.round()
		time.Sleep(time.Duration(rng.IntN(1000)) * time.Millisecond) // anywhere in the next round
	}

	anywhere()
	wantFormat("before", 1)
	end(t, plugin, sig)
	start(next)
	wantFormat("after the upgrade", 3)
	merging := n.status(copied).State == volume.Merging

	anywhere()
	end(t, plugin, sig)
	n.refused(this, copied)
	wantFormat("after the attempt to go back", 3)
	start(next)

	anywhere()
	end(t, keep, sig)
	keep = startRelease(t, next, "keeper", "--socket", n.cfg.KeeperSocket)
	for start := time.Now(); n.cfg.Transport == ""; time.Sleep(10 * time.Millisecond) {
		if keys, err := client.List(t.Context()); err == nil && len(keys) == 3 {
			break
		} else if time.Since(start) > patience {
			t.Fatalf("the new keeper has %v, %v", keys, err)
		}
	}
	anywhere()
	end(t, plugin, sig)
	start(next)
	if m := n.scrape(); m["snapmerge_devices_adopted_total"] != 3 || m["snapmerge_device_adoption_errors_total"] != 0 || m["snapmerge_devices"] != 3 {
		t.Errorf("%v devices were taken over, %v in service", m["snapmerge_devices_adopted_total"], m["snapmerge_devices"])
	}
	if !merging {
		t.Log("on this slow machine the merge has ended before the upgrade")
	}
	t.Logf("%v: %d rounds of fio over an upgrade, an attempt to go back, and an upgrade of the keeper: 0 errors; the longest wait of a request was %v", sig, load.finish(), load.longest)

	for _, id := range []string{image, copied} {
		if _, err := admin.NewClient(n.cfg.AdminSocket).SetRate(t.Context(), id, 10000); err != nil {
			t.Fatal(err)
		}
		for start := time.Now(); n.status(id).State != volume.Merged; time.Sleep(10 * time.Millisecond) {
			if time.Since(start) > patience {
				t.Fatalf("the merge does not end: %+v", n.status(id))
			}
		}
	}
	if got := sh(t, "sha256sum <"+target+"/big"); got != want {
		t.Error("the restored file has changed")
	}
	n.leave(copied)
	n.leave(image)
	base := func(id string) string { return filepath.Join(n.cfg.StateDir, "volumes", id, "base.img") }
	if got := sh(t, "sha256sum <"+base(image)); got != wantImage {
		t.Error("the merged image is not that of the snapshot")
	}
	sh(t, "e2fsck -f -n "+base(copied))
	n.leave(id)
	wantFormat("at the end", 3)
	if _, err := n.DeleteSnapshot(t.Context(), &csi.DeleteSnapshotRequest{SnapshotId: snap.SnapshotId}); err != nil {
		t.Error(err)
	}
	for _, id := range []string{image, copied, id} {
		n.delete(id)
	}
	end(t, plugin, syscall.SIGTERM)
}

// refused starts the node plugin of a release that does not know the volume's record. It
// ends by itself, saying why in one line, while the guests wait.
func (n *node) refused(program, id string) {
	n.t.Helper()
	c := exec.Command(program, n.args()...)
	var out bytes.Buffer
	c.Stderr = &out
	if err := c.Start(); err != nil {
		n.t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- c.Wait() }()
	select {
	case <-ended:
	case <-time.After(patience):
		_ = c.Process.Kill()
		<-ended
		n.t.Fatalf("an earlier release has started:\n%s", &out)
	}
	said := 0
	for line := range strings.Lines(out.String()) {
		if strings.HasPrefix(line, "snapmerge: ") {
			said++
			n.t.Logf("%s", strings.TrimSpace(line))
			if !strings.Contains(line, volume.ErrNewer.Error()) || !strings.Contains(line, "volume.json") {
				n.t.Errorf("it does not say why: %s", line)
			}
		}
	}
	if code := c.ProcessState.ExitCode(); code != 3 || said != 1 {
		n.t.Errorf("exit code %d, %d errors\n%s", code, said, &out)
	}
}

// args are those of a node plugin with the node's configuration.
func (n *node) args() []string {
	return []string{"node", "--endpoint", n.cfg.Endpoint, "--node-id", n.cfg.NodeID, "--state-dir", n.cfg.StateDir, "--init", "--keeper", n.cfg.KeeperSocket,
		"--kubelet-dir", n.cfg.KubeletDir, "--admin-socket", n.cfg.AdminSocket, "--metrics-addr", n.cfg.MetricsAddr, "--kube-api", "off",
		"--transport", cmp.Or(n.cfg.Transport, "auto"), fmt.Sprint("--hand-over=", n.cfg.HandOver)}
}

func startRelease(t *testing.T, program string, args ...string) *exec.Cmd {
	t.Helper()
	c := exec.Command(program, args...)
	c.Stderr = os.Stderr
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	return c
}

// record is what lies on disk of a volume's record.
func (n *node) record(id string) (r map[string]any) {
	n.t.Helper()
	b, err := os.ReadFile(filepath.Join(n.cfg.StateDir, "volumes", id, "volume.json"))
	if err == nil {
		err = json.Unmarshal(b, &r)
	}
	if err != nil {
		n.t.Fatal(fmt.Errorf("record of %s: %w", id, err))
	}
	return r
}
