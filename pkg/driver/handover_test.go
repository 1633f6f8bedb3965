package driver

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/snapmerge/snapmerge/pkg/devmapper"
	"github.com/snapmerge/snapmerge/pkg/volume"
	"github.com/snapmerge/snapmerge/test/devicetest"
)

// TestHandOver runs the program itself, as it would be installed, over each transport:
// a volume is restored, merged, handed over to its base, and comes back for what
// cannot be done without its transport, under a load that verifies what it reads,
// while the processes are ended at bad moments.
func TestHandOver(t *testing.T) {
	binary := os.Getenv("SNAPMERGE_BINARY")
	if os.Getenv("SNAPMERGE_VM_GUEST") == "" || binary == "" {
		t.Skip("makes devices of all kinds with the program SNAPMERGE_BINARY, as root; `make test-vm` runs it in a virtual machine (SNAPMERGE_VM_GUEST=1 runs it here)")
	}
	needDevices(t, "mkfs.ext4", "e2fsck", "resize2fs")
	for _, transport := range []string{"ublk", "fuse", "nbd", "dm-user"} {
		t.Run(transport, func(t *testing.T) {
			if transport == "dm-user" {
				if _, err := devmapper.TargetVersion("user"); err != nil {
					t.Skip(err)
				}
			}
			handOver(t, binary, transport)
		})
	}
}

const (
	handOverSize  = 64 * mib
	handOverGrown = 96 * mib
	loadWorkers   = 4
	loadFile      = "load"
)

func handOver(t *testing.T, binary, transport string) {
	seed, rng := devicetest.Seeded(t)
	n := makeNode(t, nil)
	n.cfg.AdminSocket, n.cfg.KeeperSocket, n.cfg.Transport = filepath.Join(n.dir, "admin.sock"), filepath.Join(n.dir, "keeper.sock"), transport
	n.asProcesses()
	p := &program{t: t, n: n, binary: binary, log: filepath.Join(n.dir, "log"), began: time.Now()}
	t.Cleanup(p.cleanUp)
	p.startKeeper()
	p.startPlugin()

	c := mountCap(writer, ext4)
	source := n.create("source", handOverSize, "", c)
	from := n.use(source, c)
	p.waitNative(source) // as it is blank
	p.load = devicetest.StartLoad(t, filepath.Join(from, loadFile), loadWorkers, seed)
	sh(t, "dd if=/dev/urandom of="+from+"/big bs=1M count=2 conv=fsync 2>/dev/null")
	sum := sh(t, "sha256sum <"+from+"/big")
	p.waitRequests(200)
	p.phase("a new volume", "")
	snap := n.snapshot("snap", source).SnapshotId // of what was written past the plugin
	p.waitNative(source)

	id := n.create("restored", handOverSize, snap, c, "mergeRate", "3")
	target := n.use(id, c)
	if s := n.status(id); s.State != volume.Merging {
		t.Errorf("just staged: %+v", s)
	}
	file := filepath.Join(target, loadFile)
	p.load = p.load.Continue(t, file, rng.Uint64())
	p.waitNative(id)
	p.phase("restored, merged and handed over", file)
	if err := checkStateDir(target); !errors.Is(err, ErrOwnDevice) {
		t.Errorf("state directory on a native volume: %v", err)
	}

	p.snapshot("second", id)
	p.waitNative(id)
	p.phase("a snapshot", file)

	_, err := n.NodeExpandVolume(t.Context(), &csi.NodeExpandVolumeRequest{VolumeId: id, VolumePath: target,
		CapacityRange: &csi.CapacityRange{RequiredBytes: handOverGrown}})
	switch grows := status.Code(err) != codes.FailedPrecondition; {
	case !grows && (transport == "fuse" || transport == "nbd"), grows && err != nil:
		t.Errorf("expansion: %v", err)
	case grows:
		checkLength(t, target, handOverGrown)
	default:
		t.Logf("expansion: %v", err)
	}
	p.waitNative(id)
	p.phase("an expansion", file)

	end(t, p.plugin, syscall.SIGTERM)
	p.waitRequests(100)
	p.startPlugin()
	p.wantState(id, volume.Native)
	p.phase("an end in order while native", file)

	end(t, p.plugin, syscall.SIGKILL)
	p.waitRequests(100)
	p.startPlugin()
	p.wantState(id, volume.Native)
	p.phase("kill -9 while native", file)

	end(t, p.plugin, syscall.SIGKILL)
	end(t, p.keeper, syscall.SIGKILL)
	p.waitRequests(100)
	p.startKeeper()
	p.startPlugin()
	p.wantState(id, volume.Native)
	p.snapshot("third", id) // by a new device of the transport, where the old one has died
	p.waitNative(id)
	p.phase("kill -9 of the keeper, too, and a snapshot", file)

	p.killAround(id, rng)
	p.waitNative(id)
	p.phase(fmt.Sprintf("%d times kill -9 around swaps", devicetest.Kills(t)), "")

	n.leave(id)
	target = n.use(id, c)
	checkLength(t, target, handOverGrown)
	p.load.Check(t, filepath.Join(target, loadFile))
	if got := sh(t, "sha256sum <"+target+"/big"); got != sum {
		t.Error("a file that nobody has written to has changed")
	}
	n.leave(id)
	sh(t, "e2fsck -f -n "+filepath.Join(n.cfg.StateDir, "volumes", id, "base.img"))
	n.leave(source)
	for _, name := range append(p.snapshots, snap) {
		if _, err := n.DeleteSnapshot(t.Context(), &csi.DeleteSnapshotRequest{SnapshotId: name}); err != nil {
			t.Error(err)
		}
	}
	n.delete(id)
	n.delete(source)
	end(t, p.plugin, syscall.SIGTERM)
	end(t, p.keeper, syscall.SIGTERM)
	p.checkSwaps()
	p.nothingLeft()
}

// program is the program's keeper and node plugin, and the load on a volume.
type program struct {
	t              *testing.T
	n              *node
	binary, log    string
	keeper, plugin *exec.Cmd
	load           *devicetest.Load
	began          time.Time // the phase
	snapshots      []string  // ids

	logRead int // bytes of the log that were read
	swaps   map[string][]time.Duration
}

// start starts the program. It does not end by itself with the test: see cleanUp.
func (p *program) start(args ...string) *exec.Cmd {
	p.t.Helper()
	log, err := os.OpenFile(p.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		p.t.Fatal(err)
	}
	defer log.Close()
	cmd := exec.Command(p.binary, append(args, "-v", "2")...)
	cmd.Stderr = log
	if err := cmd.Start(); err != nil {
		p.t.Fatal(err)
	}
	return cmd
}

func (p *program) startKeeper() { p.keeper = p.start("keeper", "--socket", p.n.cfg.KeeperSocket) }

func (p *program) startPlugin() {
	p.t.Helper()
	c := p.n.cfg
	p.plugin = p.start("node", "--endpoint", c.Endpoint, "--node-id", c.NodeID, "--state-dir", c.StateDir, "--init", "--keeper", c.KeeperSocket,
		"--kubelet-dir", c.KubeletDir, "--admin-socket", c.AdminSocket, "--transport", c.Transport, "--hand-over", "--kube-api", "off")
	p.n.waitReady()
}

// cleanUp ends what a failed test has left; the load has ended already.
func (p *program) cleanUp() {
	if p.t.Failed() {
		if b, err := os.ReadFile(p.log); err == nil {
			p.t.Logf("log of the program:\n%s", b[max(0, len(b)-16<<10):])
		}
	}
	end(p.t, p.plugin, syscall.SIGKILL)
	end(p.t, p.keeper, syscall.SIGKILL)
}

func (p *program) wantState(id string, want volume.State) {
	p.t.Helper()
	if s := p.n.status(id); s.State != want || s.Error != "" || s.Transport != p.n.cfg.Transport {
		p.t.Errorf("%+v, want %s", s, want)
	}
}

func (p *program) waitNative(id string) {
	p.t.Helper()
	for stop := time.Now().Add(patience); p.n.status(id).State != volume.Native; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(stop) {
			p.t.Fatalf("not handed over: %+v", p.n.status(id))
		}
	}
}

// waitRequests waits until the load has done so many more.
func (p *program) waitRequests(more int64) {
	p.t.Helper()
	before := p.load.Requests()
	for stop := time.Now().Add(patience); p.load.Requests() < before+more; time.Sleep(time.Millisecond) {
		if p.t.Failed() || time.Now().After(stop) {
			p.t.Fatal("the load does not go on")
		}
	}
}

// phase ends a phase of the load, says how it went, and starts the next one on the
// file, if there is one.
func (p *program) phase(what, file string) {
	p.t.Helper()
	ops, longest := p.load.Finish()
	p.t.Logf("%s, %v: %d requests, 0 errors, the longest took %v%s", what, time.Since(p.began).Round(time.Second), ops, longest.Round(time.Millisecond), p.newSwaps())
	p.began = time.Now()
	if p.t.Failed() {
		p.t.FailNow()
	}
	if file != "" {
		p.load = p.load.Continue(p.t, file, uint64(ops))
	}
}

// snapshot makes a snapshot after what earlier calls have begun.
func (p *program) snapshot(name, id string) {
	p.t.Helper()
	for stop := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) {
		r, err := p.n.CreateSnapshot(p.t.Context(), &csi.CreateSnapshotRequest{Name: name, SourceVolumeId: id})
		if err == nil && r.Snapshot.ReadyToUse {
			p.snapshots = append(p.snapshots, r.Snapshot.SnapshotId)
			return
		}
		if c := status.Code(err); c != codes.OK && c != codes.Aborted && c != codes.Unavailable || time.Now().After(stop) {
			p.t.Fatalf("snapshot %s: %v, %v", name, r, err)
		}
	}
}

// killAround kills the node plugin at random moments of a snapshot, for which the
// volume comes back and is handed over again.
func (p *program) killAround(id string, rng *rand.Rand) {
	for i := range devicetest.Kills(p.t) {
		name := fmt.Sprint("kill-", i)
		asked := make(chan struct{})
		go func() { // it may be cut short
			_, _ = p.n.CreateSnapshot(p.t.Context(), &csi.CreateSnapshotRequest{Name: name, SourceVolumeId: id})
			close(asked)
		}()
		time.Sleep(time.Duration(rng.IntN(1000)) * time.Millisecond)
		end(p.t, p.plugin, syscall.SIGKILL)
		<-asked
		p.startPlugin()
		p.snapshot(name, id)
		if rng.IntN(2) == 0 {
			p.waitNative(id)
		}
	}
}

// swapped and frozen are lines of the log.
var (
	swapped = regexp.MustCompile(`"Swapped the table of a device".* to="(\w+)" drain="([^"]+)" held="([^"]+)"`)
	frozen  = regexp.MustCompile(`"File system was frozen".* sync="([^"]+)" frozen="([^"]+)"`)
)

// newSwaps tells of the swaps that the log has told of since the last call, and of
// freezes, which hold requests back as well.
func (p *program) newSwaps() string {
	p.t.Helper()
	b, err := os.ReadFile(p.log)
	if err != nil {
		p.t.Fatal(err)
	}
	end := strings.LastIndexByte(string(b), '\n') + 1
	var text strings.Builder
	for _, m := range swapped.FindAllStringSubmatch(string(b[p.logRead:end]), -1) {
		held, err := time.ParseDuration(m[3])
		if err != nil {
			p.t.Error(err)
		}
		if p.swaps == nil {
			p.swaps = map[string][]time.Duration{}
		}
		p.swaps[m[1]] = append(p.swaps[m[1]], held)
		fmt.Fprintf(&text, "; to the %s: held %v (drain %s)", m[1], held.Round(time.Millisecond/10), m[2])
	}
	for _, m := range frozen.FindAllStringSubmatch(string(b[p.logRead:end]), -1) {
		fmt.Fprintf(&text, "; frozen for %s after a sync of %s", m[2], m[1])
	}
	p.logRead = end
	return text.String()
}

// checkSwaps makes sure that there were some, and says how long they took.
func (p *program) checkSwaps() {
	p.t.Helper()
	p.newSwaps()
	for _, to := range []string{"base", "transport"} {
		all := p.swaps[to]
		if len(all) < 3 {
			p.t.Errorf("only %d swaps to the %s", len(all), to)
			continue
		}
		longest, sum := all[0], time.Duration(0)
		for _, d := range all {
			longest, sum = max(longest, d), sum+d
		}
		p.t.Logf("%d swaps to the %s held requests back for %v at most, %v on average", len(all), to,
			longest.Round(time.Millisecond/10), (sum / time.Duration(len(all))).Round(time.Millisecond/10))
	}
}

// nothingLeft makes sure that no device and no file of any volume is left.
func (p *program) nothingLeft() {
	p.t.Helper()
	for _, pattern := range []string{"/sys/block/dm-*", "/sys/block/loop*/loop", "/sys/block/ublkb*", "/sys/block/nbd*/pid",
		filepath.Join(p.n.cfg.StateDir, "volumes", "*"), filepath.Join(p.n.cfg.StateDir, "native", "*"), filepath.Join(p.n.cfg.StateDir, "nbd", "*"),
		filepath.Join(p.n.cfg.StateDir, "ublk", "*")} {
		left, err := filepath.Glob(pattern)
		for stop := time.Now().Add(5 * time.Second); len(left) > 0 && time.Now().Before(stop); left, err = filepath.Glob(pattern) {
			time.Sleep(10 * time.Millisecond) // loop devices go, and files are removed, in the background
		}
		if err != nil || len(left) > 0 {
			p.t.Errorf("left: %v, %v", left, err)
		}
	}
	b, err := os.ReadFile(p.log)
	for line := range strings.Lines(string(b)) {
		if strings.Contains(line, "handed over to its base") && strings.HasPrefix(line, "E") {
			err = errors.Join(err, errors.New(strings.TrimSpace(line)))
		}
	}
	if err != nil {
		p.t.Errorf("log: %v", err)
	}
}

// checkLength makes sure that the file system at the path is nearly as large as that.
func checkLength(t *testing.T, path string, want int64) {
	t.Helper()
	var st unix.Statfs_t
	if err := unix.Statfs(path, &st); err != nil {
		t.Fatal(err)
	}
	if got := int64(st.Blocks) * st.Bsize; got < want*3/4 {
		t.Errorf("the file system at %s has %d bytes, the volume %d", path, got, want)
	}
}
