package driver

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	utilexec "k8s.io/utils/exec"

	"github.com/snapmerge/snapmerge/pkg/blockio"
	"github.com/snapmerge/snapmerge/pkg/health"
)

// hangFS is a file system whose base images do not answer while it is told so.
type hangFS struct {
	blockio.FS
	mu     sync.Mutex
	hang   chan struct{} // nil: it does not hang
	waiter chan struct{} // closed when somebody waits
	delay  atomic.Int64  // of each request, nanoseconds
}

func (f *hangFS) Open(name string, flag blockio.Flag) (blockio.File, error) {
	file, err := f.FS.Open(name, flag)
	if err == nil && filepath.Base(name) == "base.img" {
		return &hangFile{file, f}, nil
	}
	return file, err
}

// start makes it hang; the channel is closed when somebody waits for it.
func (f *hangFS) start() (waiter chan struct{}) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.hang, f.waiter = make(chan struct{}), make(chan struct{})
	return f.waiter
}

func (f *hangFS) end() {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.hang != nil {
		close(f.hang)
		f.hang = nil
	}
}

func (f *hangFS) wait() {
	time.Sleep(time.Duration(f.delay.Load()))
	f.mu.Lock()
	hang := f.hang
	if hang != nil && f.waiter != nil {
		close(f.waiter)
		f.waiter = nil
	}
	f.mu.Unlock()
	if hang != nil {
		<-hang
	}
}

type hangFile struct {
	blockio.File
	fs *hangFS
}

func (f *hangFile) WriteAt(p []byte, off int64) (int, error) {
	f.fs.wait()
	return f.File.WriteAt(p, off)
}
func (f *hangFile) ReadAt(p []byte, off int64) (int, error) {
	f.fs.wait()
	return f.File.ReadAt(p, off)
}
func (f *hangFile) Flush() error            { f.fs.wait(); return f.File.Flush() }
func (f *hangFile) Zero(off, n int64) error { f.fs.wait(); return f.File.Zero(off, n) }

// TestHungDevice: a device that does not answer any more does not keep a volume
// from being unstaged, nor its condition from being told. This process must not
// do I/O on it: its threads would wait for themselves.
func TestHungDevice(t *testing.T) {
	for _, fsType := range []string{ext4, xfs} {
		t.Run(fsType, func(t *testing.T) {
			needDevices(t, "mkfs."+fsType)
			slow := &hangFS{FS: blockio.OS()}
			n := newNodeWith(t, func(p *plugin) { p.fs = slow })
			t.Cleanup(slow.end) // before the node's
			c := mountCap(writer, fsType)
			id := n.create("v", 400*mib, "", c)
			target := n.use(id, c)
			sh(t, "echo kept >"+target+"/kept; sync -f "+target)
			sh(t, "head -c 8388608 /dev/urandom >"+target+"/dirty")
			const limit = 2 * time.Second
			n.hangsAfter(limit)
			waiting := slow.start()
			read := exec.Command("dd", "if="+n.p.volumes.Device(id), "of=/dev/null", "iflag=direct", "bs=4k", "count=1")
			if err := read.Start(); err != nil {
				t.Fatal(err)
			}
			select {
			case <-waiting:
			case <-time.After(patience):
				t.Fatal("nobody waits for the device")
			}
			start := time.Now()
			st, err := n.NodeGetVolumeStats(t.Context(), &csi.NodeGetVolumeStatsRequest{VolumeId: id, VolumePath: target})
			if err != nil || len(st.Usage) == 0 {
				t.Errorf("stats of a hung device: %v, %v", st, err)
			}
			if took := time.Since(start); took > statLimit+slack {
				t.Errorf("stats of a hung device took %v", took)
			}
			start = time.Now()
			n.leave(id)
			if took := time.Since(start); took > limit+slack {
				t.Errorf("unstaging took %v", took)
			}
			if n.p.volumes.Device(id) != "" {
				t.Error("there is still a device")
			}
			if err := read.Wait(); err == nil {
				t.Error("a read of the device that was taken away succeeds")
			}
			slow.end()
			n.hangsAfter(hangLimit)
			// Not a thing that was flushed is lost.
			if got := sh(t, "cat "+n.use(id, c)+"/kept"); got != "kept\n" {
				t.Errorf("the file has %q", got)
			}
			n.leave(id)
			n.checkClean(id, fsType)
		})
	}
}

// TestSlowDevice: one that gets something done, however slowly, is waited for;
// taking it away would lose what is in the page cache.
func TestSlowDevice(t *testing.T) {
	needDevices(t, "mkfs.ext4")
	slow := &hangFS{FS: blockio.OS()}
	n := newNodeWith(t, func(p *plugin) { p.fs = slow })
	c := mountCap(writer, ext4)
	id := n.create("v", 64*mib, "", c)
	slowly(t, func(limit, delay time.Duration) time.Duration {
		target := n.use(id, c)
		sh(t, "head -c 8388608 /dev/urandom >"+target+"/file")
		want := sh(t, "sha256sum <"+target+"/file")
		n.hangsAfter(limit)
		slow.delay.Store(int64(delay))
		start := time.Now()
		n.leave(id)
		took := time.Since(start)
		slow.delay.Store(0)
		n.hangsAfter(hangLimit)
		if got := sh(t, "sha256sum <"+n.use(id, c)+"/file"); got != want {
			t.Error("the file is lost")
		}
		n.leave(id)
		return took
	})
}

// slowly has something done to a device each of whose requests takes as long as
// delay, and that hangs after limit. It must take longer than limit to show
// anything, so it is done again where the kernel had written most of what was dirty
// before.
func slowly(t *testing.T, do func(limit, delay time.Duration) (took time.Duration)) {
	t.Helper()
	const limit, delay = 2 * time.Second, 300 * time.Millisecond
	for try := 1; ; try++ {
		took := do(limit, delay)
		t.Logf("it took %v", took)
		if t.Failed() || took >= limit {
			return
		}
		if try == 10 {
			t.Fatalf("it took only %v, so it does not show anything", took)
		}
	}
}

// TestSilentFileSystem: one that does not answer statfs.
func TestSilentFileSystem(t *testing.T) {
	needDevices(t, "mkfs.ext4")
	var mu sync.Mutex
	calls, answer := 0, make(chan struct{})
	silent := false
	n := newNodeWith(t, func(p *plugin) {
		p.statfs = func(path string, st *unix.Statfs_t) error {
			mu.Lock()
			calls++
			wait := silent
			mu.Unlock()
			if wait {
				<-answer
			}
			return unix.Statfs(path, st)
		}
	})
	c := mountCap(writer, ext4)
	id := n.create("v", 64*mib, "", c)
	target := n.use(id, c)
	ask := func() (*csi.NodeGetVolumeStatsResponse, health.Condition) {
		t.Helper()
		start := time.Now()
		r, err := n.NodeGetVolumeStats(t.Context(), &csi.NodeGetVolumeStatsRequest{VolumeId: id, VolumePath: target})
		if err != nil {
			t.Fatal(err)
		}
		if took := time.Since(start); took > statLimit+slack {
			t.Errorf("it took %v", took)
		}
		cond, err := health.GetCondition(r)
		if err != nil {
			t.Fatal(err)
		}
		return r, cond
	}
	first, cond := ask()
	for end := time.Now().Add(patience); cond.Abnormal && time.Now().Before(end); { // so slow is this machine
		first, cond = ask()
	}
	if cond.Abnormal || len(first.Usage) != 2 || first.Usage[0].Used <= 0 || first.Usage[1].Unit != csi.VolumeUsage_INODES {
		t.Errorf("%v, %+v", first, cond)
	}
	troubles := func() int {
		t.Helper()
		r, err := n.NodeGetVolumeHealth(t.Context(), &csi.NodeGetVolumeHealthRequest{VolumeId: id})
		if err != nil {
			t.Fatal(err)
		}
		return len(r.VolumeHealth.HealthStatuses)
	}
	mu.Lock()
	silent, calls = true, 0
	mu.Unlock()
	for range 3 {
		r, cond := ask()
		if !cond.Abnormal || len(r.Usage) != 2 || r.Usage[0].Used != first.Usage[0].Used {
			t.Errorf("%v, %+v", r, cond)
		}
		if troubles() != 1 {
			t.Error("its health is said to be good")
		}
	}
	mu.Lock()
	if calls != 1 {
		t.Errorf("%d threads are stuck", calls)
	}
	silent = false
	mu.Unlock()
	close(answer)
	for end := time.Now().Add(patience); ; {
		if _, cond := ask(); !cond.Abnormal {
			break
		}
		if time.Now().After(end) {
			t.Fatal("the condition does not become good")
		}
	}
	if troubles() != 0 {
		t.Error("its health does not become good")
	}
	n.leave(id)
}

// TestStatsOfDeadDevice: the condition tells, and kubelet gets its usage.
func TestStatsOfDeadDevice(t *testing.T) {
	needDevices(t, "mkfs.ext4")
	n := newNode(t, nil)
	c := mountCap(writer, ext4)
	id := n.create("v", 64*mib, "", c)
	n.use(id, c)
	n.crash()
	n.start(nil)
	r, err := n.NodeGetVolumeStats(t.Context(), &csi.NodeGetVolumeStatsRequest{VolumeId: id, VolumePath: n.dir})
	if err != nil || len(r.Usage) == 0 || r.Usage[0].Total == 0 {
		t.Fatalf("%v, %v", r, err)
	}
	if cond, err := health.GetCondition(r); err != nil || !cond.Abnormal {
		t.Errorf("%+v, %v", cond, err)
	}
}

// TestStatsOfUnopenableVolume: kubelet hears of the damage.
func TestStatsOfUnopenableVolume(t *testing.T) {
	needDevices(t, "mkfs.ext4")
	n := newNode(t, nil)
	c := mountCap(writer, ext4)
	id := n.create("v", 64*mib, "", c)
	n.use(id, c)
	n.crash()
	dir := filepath.Join(n.cfg.StateDir, "volumes", id)
	for _, damaged := range []string{"journal", "volume.json", "base.img"} {
		if err := os.WriteFile(filepath.Join(dir, damaged), []byte("nonsense"), 0o600); err != nil {
			t.Fatal(err)
		}
		if damaged == "base.img" {
			if err := os.Remove(filepath.Join(dir, damaged)); err != nil {
				t.Fatal(err)
			}
		}
		n.start(nil)
		r, err := n.NodeGetVolumeStats(t.Context(), &csi.NodeGetVolumeStatsRequest{VolumeId: id, VolumePath: n.dir})
		if err != nil {
			t.Fatalf("%s: %v", damaged, err)
		}
		switch known := damaged != "base.img"; {
		case known && (len(r.Usage) != 1 || r.Usage[0].Total != 64*mib || r.Usage[0].Used != 0):
			t.Errorf("%s: usage %v", damaged, r.Usage)
		case !known && len(r.Usage) != 0: // CSI demands a total
			t.Errorf("%s: usage %v", damaged, r.Usage)
		}
		cond, err := health.GetCondition(r)
		if err != nil || !cond.Abnormal || !strings.Contains(cond.Message, health.SnapshotCorrupt) {
			t.Errorf("%s: %+v, %v", damaged, cond, err)
		}
		_, err = n.NodeGetVolumeStats(t.Context(), &csi.NodeGetVolumeStatsRequest{VolumeId: id, VolumePath: n.dir + "/nowhere"})
		wantCode(t, err, codes.NotFound, "nowhere")
		n.crash()
	}
	n.start(nil)
}

func TestUnlessHung(t *testing.T) {
	p := newPlugin(Config{})
	want := errors.New("x")
	if err := p.unlessHung(t.Context(), "v", "/dev/null", func(context.Context) error { return want }); !errors.Is(err, want) {
		t.Error(err)
	}
	if err := p.unlessHung(t.Context(), "v", "/dev/null", func(context.Context) error { panic("x") }); err == nil {
		t.Error("a panic is no error")
	}
}

// TestIdleDevice: what takes long for another reason does not cost a device that
// has nothing to do.
func TestIdleDevice(t *testing.T) {
	needDevices(t, "mkfs.ext4")
	n := newNode(t, nil)
	c := mountCap(writer, ext4)
	id := n.create("v", 64*mib, "", c)
	target := n.use(id, c)
	syncFS(t, target)
	const limit = 2 * time.Second // longer than what ext4 does by itself may take
	n.hangsAfter(limit)
	err := n.p.unlessHung(t.Context(), id, n.p.volumes.Device(id), func(ctx context.Context) error {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(limit + 4*hangPoll):
			return nil
		}
	})
	n.hangsAfter(hangLimit)
	if err != nil || n.p.volumes.Device(id) == "" {
		t.Errorf("an idle device is taken away: %v", err)
	}
	n.leave(id)
}

// hookExec calls before each tool.
type hookExec struct {
	utilexec.Interface
	before func(tool string)
}

func (e hookExec) CommandContext(ctx context.Context, name string, args ...string) utilexec.Cmd {
	e.before(name)
	return e.Interface.CommandContext(ctx, name, args...)
}

// TestLongTools: a check or a growth for which the time of an operation is not
// enough is carried to its end, and the device stays.
func TestLongTools(t *testing.T) {
	for fsType, tool := range map[string]string{ext4: "e2fsck", xfs: "xfs_growfs"} {
		t.Run(tool, func(t *testing.T) {
			needDevices(t, "mkfs."+fsType, tool)
			n := newNode(t, nil)
			c := mountCap(writer, fsType)
			id := n.create("v", 400*mib, "", c)
			n.use(id, c)
			ctx, cancel := context.WithCancel(t.Context())
			ran := false
			n.p.exec = hookExec{n.p.exec, func(name string) {
				if name == tool {
					ran = true
					cancel()
				}
			}}
			var err error
			if fsType == ext4 {
				n.leave(id)
				err = n.p.stage(ctx, id, n.stagingPath(id), access{mode: writer, fsType: fsType})
			} else {
				_, err = n.p.expand(ctx, id, capacity{required: 600 * mib})
			}
			if err != nil || !ran || n.p.volumes.Device(id) == "" {
				t.Errorf("%v, tool has run: %v, device %q", err, ran, n.p.volumes.Device(id))
			}
			n.leave(id)
		})
	}
}

// TestExpandOfHungDevice: a disk that stands still while a file system that a pod uses is
// grown costs the pod nothing; it is grown when the disk is well again.
func TestExpandOfHungDevice(t *testing.T) {
	needDevices(t, "mkfs.xfs", "xfs_growfs")
	slow := &hangFS{FS: blockio.OS()}
	n := newNodeWith(t, func(p *plugin) { p.fs = slow })
	t.Cleanup(slow.end) // before the node's
	c := mountCap(writer, xfs)
	id := n.create("v", 320*mib, "", c)
	target := n.use(id, c)
	dev := n.p.volumes.Device(id)
	sh(t, "echo kept >"+target+"/kept; sync -f "+target)
	sh(t, "head -c 8M /dev/urandom >"+target+"/dirty")
	const limit = 2 * time.Second
	n.hangsAfter(limit)
	tools := n.p.exec
	n.p.exec = hookExec{tools, func(name string) {
		if name == "xfs_growfs" {
			slow.start()
		}
	}}
	expand := func() error {
		_, err := n.NodeExpandVolume(t.Context(), &csi.NodeExpandVolumeRequest{VolumeId: id, VolumePath: target, CapacityRange: &csi.CapacityRange{RequiredBytes: 600 * mib}})
		return err
	}
	start := time.Now()
	wantCode(t, expand(), codes.Unavailable, errHangs.Error())
	if took := time.Since(start); took > limit+slack {
		t.Errorf("the call took %v", took)
	}
	n.hangsAfter(hangLimit)
	slow.end()
	n.p.exec = tools
	for end := time.Now().Add(patience); ; time.Sleep(hangPoll) { // as kubelet asks again
		err := expand()
		if err == nil {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("it does not grow: %v", err)
		}
	}
	if n.p.volumes.Device(id) != dev {
		t.Error("the device was taken away from the pod")
	}
	if got := sizeOf(t, target); got < 480*mib {
		t.Errorf("file system of %d bytes", got)
	}
	if got := sh(t, "cat "+target+"/kept; echo more >"+target+"/more"); got != "kept\n" {
		t.Errorf("the file has %q", got)
	}
	n.leave(id)
}

// TestPulse takes looks at what the kernel counts. Between two of them are 500 ms
// unless it is said otherwise.
func TestPulse(t *testing.T) {
	const (
		idle  = "5 0 40 1 7 0 56 1 0 10 10 2 0 16 0 3 0"
		stuck = "5 0 40 1 7 0 56 1 1 10 10 2 0 16 0 3 0"
		older = "5 0 40 1 7 0 56 1 1 10 10" // kernels before 4.18
	)
	change := func(from, to string) []string {
		next := strings.Replace(stuck, from, to, 1)
		return []string{stuck, stuck, next, next}
	}
	for name, c := range map[string]struct {
		stats []string
		gaps  map[int]time.Duration // before the look of that number
		want  time.Duration         // at the last look
	}{
		"idle":           {[]string{idle, idle, idle, idle}, nil, 0},
		"stuck":          {[]string{idle, stuck, stuck, stuck}, nil, 3 * hangPoll},
		"stuck at first": {[]string{stuck, stuck, stuck}, nil, 2 * hangPoll},
		"few fields":     {[]string{older, older, older}, nil, 2 * hangPoll},
		"no such device": {[]string{"", "", ""}, nil, 0},
		"idle meanwhile": {[]string{stuck, stuck, idle, stuck}, nil, hangPoll},
		"read":           {change("5", "6"), nil, hangPoll},
		"written":        {change("7", "8"), nil, hangPoll},
		"discarded":      {change("10 2", "10 3"), nil, hangPoll},
		"flushed":        {change("3 0", "4 0"), nil, hangPoll},
		"bytes alone":    {[]string{stuck, stuck, strings.Replace(stuck, "40", "99", 1), stuck}, nil, 3 * hangPoll},
		"process stood":  {[]string{stuck, stuck, stuck, stuck}, map[int]time.Duration{2: time.Minute}, hangPoll},
		"a little late":  {[]string{stuck, stuck, stuck}, map[int]time.Duration{2: hangLate}, hangPoll + hangLate},
	} {
		var p pulse
		now := time.Unix(1000, 0)
		var got time.Duration
		for i, stat := range c.stats {
			gap, ok := c.gaps[i]
			if !ok {
				gap = hangPoll
			}
			now = now.Add(gap)
			got = p.hangs(now, stat)
		}
		if got != c.want {
			t.Errorf("%s: %v, want %v", name, got, c.want)
		}
	}
}
