package driver

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/snapmerge/snapmerge/pkg/admin"
	"github.com/snapmerge/snapmerge/pkg/volume"
	"github.com/snapmerge/snapmerge/test/devicetest"
)

// TestRestart ends the node plugin ten times by kill -9 and twice in order, or more often,
// while fio writes and verifies files of a restored volume that is being merged, what
// is read first. The keeper lives, so there is no error; the file system is clean
// afterwards.
func TestRestart(t *testing.T) {
	for _, fsType := range []string{ext4, xfs} {
		t.Run(fsType, func(t *testing.T) { restart(t, fsType) })
	}
}

func restart(t *testing.T, fsType string) {
	needDevices(t, "mkfs."+fsType, "fio", "e2fsck", "xfs_repair")
	n := makeNode(t, nil)
	n.cfg.AdminSocket, n.cfg.MetricsAddr = filepath.Join(n.dir, "admin.sock"), metricsAddr()
	k, _ := n.withKeeper()
	n.asProcesses()
	// Not a clean-up of each process: the load must have ended before the last of
	// them, or it would wait for ever.
	var plugin *exec.Cmd
	t.Cleanup(func() { end(t, plugin, syscall.SIGKILL) })
	plugin = n.startProcess()
	c := mountCap(writer, fsType)
	id := n.create("source", 400*mib, "", c)
	source := n.use(id, c)
	size := 190 // MiB
	if os.Getenv("SNAPMERGE_VM_GUEST") != "" {
		size = 48 // takes an emulated processor as long
	}
	sh(t, fmt.Sprintf("dd if=/dev/urandom of=%s/big bs=1M count=%d 2>/dev/null", source, size))
	want := sh(t, "sha256sum <"+source+"/big")
	snap := n.snapshot("snap", id) // frozen by the keeper
	copied := n.create("copy", 400*mib, snap.SnapshotId, c, "mergeRate", "3", "readPromotion", "on")
	target := n.use(copied, c)

	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	load := startVerify(t, target)
	endReads := startReads(t, target+"/big", source+"/big")
	promoted := 0.0
	ends := max(12, devicetest.Kills(t))
	for i := range ends {
		sig := syscall.SIGKILL
		if i%6 == 5 {
			sig = syscall.SIGTERM
		}
		load.round()
		promoted += n.scrape()[`snapmerge_merge_promoted_bytes_total{namespace="",pvc="",volume_id="`+copied+`"}`]
		time.Sleep(time.Duration(rng.IntN(1000)) * time.Millisecond) // anywhere in the next round
		end(t, plugin, sig)
		plugin = n.startProcess()
	}
	if m := n.scrape(); m["snapmerge_devices_adopted_total"] != 2 || m["snapmerge_device_adoption_errors_total"] != 0 || m["snapmerge_devices"] != 2 {
		t.Errorf("%v devices were taken over, %v in service", m["snapmerge_devices_adopted_total"], m["snapmerge_devices"])
	}
	s := n.status(copied)
	t.Logf("merged to %.1f %% meanwhile", s.Percent)
	if s.State == volume.Merged {
		t.Log("on this slow machine that was too little to merge")
	} else if s.State != volume.Merging || s.BytesDone == 0 {
		t.Errorf("the volume was %s at %.1f %%: the merge did not go on over the restarts", s.State, s.Percent)
	}
	t.Logf("%d ends of the node plugin, %d rounds of fio, the longest wait of a request was %v; %.1f MiB merged early", ends, load.finish(), load.longest, promoted/mib)
	if endReads(); promoted == 0 {
		t.Error("nothing of what was read was merged early")
	}
	if got := sh(t, "sha256sum <"+target+"/big"); got != want {
		t.Error("the restored file has changed")
	}
	if _, err := admin.NewClient(n.cfg.AdminSocket).SetRate(t.Context(), copied, 10000); err != nil {
		t.Fatal(err)
	}
	for start := time.Now(); n.status(copied).State != volume.Merged; time.Sleep(10 * time.Millisecond) {
		if time.Since(start) > patience {
			t.Fatalf("the merge does not end: %+v", n.status(copied))
		}
	}
	n.leave(copied)
	base := filepath.Join(n.cfg.StateDir, "volumes", copied, "base.img")
	if fsType == ext4 {
		sh(t, "e2fsck -f -n "+base)
	} else {
		sh(t, "xfs_repair -n -f "+base)
	}
	n.leave(id)
	if _, err := n.DeleteSnapshot(t.Context(), &csi.DeleteSnapshotRequest{SnapshotId: snap.SnapshotId}); err != nil {
		t.Error(err)
	}
	n.delete(copied)
	n.delete(id)
	end(t, plugin, syscall.SIGTERM) // in order: nothing is in service
	end(t, k, syscall.SIGKILL)
}

// startReads reads a file here and there, past the page cache, and compares it with
// another until end is called.
func startReads(t *testing.T, name, want string) (end func()) {
	t.Helper()
	const length = 64 << 10
	f := devicetest.Open(t, name, os.O_RDONLY)
	g, err := os.Open(want)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { g.Close() })
	info, err := g.Stat()
	if err != nil {
		t.Fatal(err)
	}
	stop, done := make(chan struct{}), make(chan error, 1)
	read := func(p, exp []byte) error {
		off := rand.Int64N(info.Size()/length) * length
		if _, err := f.ReadAt(p, off); err != nil {
			return err
		}
		if _, err := g.ReadAt(exp, off); err != nil {
			return err
		}
		if !bytes.Equal(p, exp) {
			return fmt.Errorf("%s differs in 64 KiB from %d on", name, off)
		}
		return nil
	}
	p := devicetest.Aligned(t, length)
	go func() {
		exp := make([]byte, length)
		for {
			select {
			case <-stop:
				done <- nil
				return
			default:
			}
			if err := read(p, exp); err != nil {
				done <- err
				return
			}
		}
	}()
	return func() {
		t.Helper()
		close(stop)
		if err := errors.Join(<-done, f.Close(), g.Close()); err != nil {
			t.Error(err)
		}
	}
}

func (n *node) status(id string) volume.Status {
	n.t.Helper()
	for start := time.Now(); ; time.Sleep(10 * time.Millisecond) {
		s, err := admin.NewClient(n.cfg.AdminSocket).Get(n.t.Context(), id)
		if err == nil {
			return s
		}
		if time.Since(start) > patience { // it is served a moment after Probe says ready
			n.t.Fatal(err)
		}
	}
}

// startProcess starts a node plugin as a process of its own, with the status
// command's socket.
func (n *node) startProcess() *exec.Cmd {
	n.t.Helper()
	cfg, err := json.Marshal(n.cfg)
	if err != nil {
		n.t.Fatal(err)
	}
	cmd := startHelper(n.t, "node", string(cfg))
	n.waitReady()
	return cmd
}

// verifyLoad is fio in a loop. Each round writes a file and verifies it; the
// loop ends at the first error.
type verifyLoad struct {
	t       *testing.T
	cmd     *exec.Cmd
	stop    string
	rounds  *json.Decoder
	stderr  bytes.Buffer
	count   int
	longest time.Duration // wait for one request
}

// verifySize is that of the file: an emulated processor is slow.
func verifySize() string {
	if os.Getenv("SNAPMERGE_VM_GUEST") != "" {
		return "8M"
	}
	return "48M"
}

func startVerify(t *testing.T, dir string) *verifyLoad {
	t.Helper()
	l := &verifyLoad{t: t, stop: filepath.Join(t.TempDir(), "stop")}
	l.cmd = exec.Command("sh", "-euc", `while [ ! -e "$1" ]; do
			fio --name=verify --directory="$0" --size="$2" --rw=randwrite --bsrange=4k-64k --bs_unaligned=0 \
				--ioengine=libaio --iodepth=8 --direct=1 --fsync=16 --verify=crc32c --verify_fatal=1 --verify_state_save=0 \
				--output-format=json
		done`, dir, l.stop, verifySize())
	l.cmd.Stderr = &l.stderr
	out, err := l.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	l.rounds = json.NewDecoder(out)
	if err := l.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if l.cmd.ProcessState != nil {
			return
		}
		os.WriteFile(l.stop, nil, 0o600)
		ended := make(chan struct{})
		go func() {
			l.cmd.Wait()
			close(ended)
		}()
		select {
		case <-ended:
		case <-time.After(patience):
			t.Error("fio hangs; it ends with the keeper")
		}
	})
	return l
}

// round waits for the end of one round.
func (l *verifyLoad) round() {
	l.t.Helper()
	if !l.next() {
		l.t.Fatalf("fio has ended: %v\n%s", l.cmd.Wait(), l.stderr.Bytes())
	}
}

func (l *verifyLoad) next() bool {
	type side struct {
		Latency struct {
			Max int64 `json:"max"` // ns
		} `json:"lat_ns"`
		Bytes int64 `json:"io_bytes"`
	}
	var report struct {
		Jobs []struct{ Read, Write side }
	}
	if err := l.rounds.Decode(&report); err != nil {
		return false
	}
	l.count++
	for _, j := range report.Jobs {
		if j.Read.Bytes == 0 || j.Write.Bytes == 0 {
			l.t.Errorf("fio has written %d bytes and verified %d", j.Write.Bytes, j.Read.Bytes)
		}
		l.longest = max(l.longest, time.Duration(max(j.Read.Latency.Max, j.Write.Latency.Max)))
	}
	return true
}

// finish lets the round under way end and returns how many there were.
func (l *verifyLoad) finish() int {
	l.t.Helper()
	if err := os.WriteFile(l.stop, nil, 0o600); err != nil {
		l.t.Fatal(err)
	}
	for l.next() {
	}
	if err := l.cmd.Wait(); err != nil {
		l.t.Errorf("fio: %v\n%s", err, l.stderr.Bytes())
	}
	return l.count
}
