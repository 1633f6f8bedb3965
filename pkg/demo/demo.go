// Package demo shows the main job on one machine without a cluster: it starts a
// keeper and a node plugin, talks to the plugin through its CSI socket as
// kubelet does, and checks everything that it says. It needs root.
package demo

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	csi "github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/dustin/go-humanize"
	"golang.org/x/sys/unix"

	"github.com/snapmerge/snapmerge/pkg/localnode"
)

// Options of a demo.
type Options struct {
	// Size of the volume in bytes.
	Size int64
	// Keep leaves processes, devices and files as they are at the end.
	Keep bool
	// Binary is the snapmerge program that is started.
	Binary string
	// Dir is where a new directory for everything is made; empty: /var/tmp.
	Dir string
	Out io.Writer
}

// Bounds of Options.Size in bytes.
const (
	MinSize = 64 << 20
	MaxSize = 1 << 40
)

// demo is one run.
type demo struct {
	Options
	dir    string
	step   int
	keeper *localnode.Process
	node   *localnode.Process
	csi    *localnode.Client

	source, snapshot, restored string // ids
	files                      []file
	total                      int64 // bytes of files
	extra                      []file
	mergeTime                  time.Duration // that the merge is to take
	staged                     map[string]bool
	published                  map[string]bool
	backing                    []string // files in the loop devices, as sysfs has them
	load                       *load    // on the restored volume, nil before it starts
	began                      time.Time
}

// Run shows everything and returns an error if any of it is not so.
func Run(ctx context.Context, o Options) (err error) {
	if os.Geteuid() != 0 {
		return errors.New("the demo makes devices and mounts and has to run as root")
	}
	d := &demo{Options: o, staged: map[string]bool{}, published: map[string]bool{}, began: time.Now()}
	if o.Dir == "" {
		o.Dir = "/var/tmp"
	}
	if d.dir, err = os.MkdirTemp(o.Dir, "snapmerge-demo-"); err != nil {
		return err
	}
	defer func() {
		if o.Keep {
			d.say("Kept: everything under %s, keeper (pid %d) and node plugin (pid %d).", d.dir, d.keeper.Pid(), d.node.Pid())
			return
		}
		if err = errors.Join(err, d.cleanUp()); err == nil {
			d.say("Clean: no mount, loop device, process or file of the demo is left.")
			d.say("Done in %v.", time.Since(d.began).Round(100*time.Millisecond))
		}
	}()
	for _, part := range []func(context.Context) error{
		d.start, d.makeSource, d.fill, d.takeSnapshot, d.restore, d.readDuringMerge, d.kill, d.complete, d.ordinary,
	} {
		if err := part(ctx); err != nil {
			if ctx.Err() != nil { // whatever was under way failed of that
				return ctx.Err()
			}
			return errors.Join(err, localnode.LogTail(d.path("node.log")))
		}
	}
	return nil
}

func (d *demo) path(elem ...string) string { return filepath.Join(append([]string{d.dir}, elem...)...) }

// title starts a part of the show.
func (d *demo) title(format string, args ...any) {
	d.step++
	fmt.Fprintf(d.Out, "\n%d. %s\n", d.step, fmt.Sprintf(format, args...))
}

func (d *demo) say(format string, args ...any) { fmt.Fprintf(d.Out, "   "+format+"\n", args...) }

func size(n int64) string { return humanize.IBytes(uint64(n)) }

func (d *demo) start(ctx context.Context) error {
	d.title("A keeper and a node plugin, talked to through the CSI socket as kubelet does")
	if err := localnode.CheckDir(d.dir); err != nil {
		return err
	}
	free, err := localnode.Free(d.dir)
	if err != nil {
		return err
	}
	if free < 2*d.Size+256<<20 {
		return fmt.Errorf("%s has %s free, the demo wants twice the volume's size and 256 MiB more", d.dir, size(free))
	}
	for _, sub := range []string{"state", "stage", "pods"} {
		if err := os.Mkdir(d.path(sub), 0o700); err != nil {
			return err
		}
	}
	if d.keeper, err = localnode.Start(d.Binary, d.path("keeper.log"), "keeper", "--socket", d.path("keeper.sock")); err != nil {
		return err
	}
	if err := d.startNode(ctx); err != nil {
		return err
	}
	info, err := d.csi.GetPluginInfo(ctx, &csi.GetPluginInfoRequest{})
	if err != nil {
		return err
	}
	d.say("Driver %s %s, everything under %s.", info.GetName(), info.GetVendorVersion(), d.dir)
	return nil
}

// startNode starts the node plugin and waits until it answers.
func (d *demo) startNode(ctx context.Context) error {
	var err error
	d.node, err = localnode.Start(d.Binary, d.path("node.log"), "node", "--endpoint", "unix://"+d.path("csi.sock"),
		"--node-id", "demo", "--state-dir", d.path("state"), "--init", "--keeper", d.path("keeper.sock"), "--admin-socket", d.path("admin.sock"))
	if err != nil {
		return err
	}
	if d.csi == nil {
		if d.csi, err = localnode.Dial(d.path("csi.sock")); err != nil {
			return err
		}
	}
	return d.csi.WaitReady(ctx, d.node)
}

func (d *demo) makeSource(ctx context.Context) error {
	d.title("A volume of %s with ext4", size(d.Size))
	r, err := d.csi.CreateVolume(whole(ctx), &csi.CreateVolumeRequest{
		Name: "demo-source", CapacityRange: &csi.CapacityRange{RequiredBytes: d.Size}, VolumeCapabilities: []*csi.VolumeCapability{localnode.Ext4()},
	})
	if err != nil {
		return err
	}
	d.source = r.GetVolume().GetVolumeId()
	took, err := d.stageAndPublish(ctx, d.source)
	if err != nil {
		return err
	}
	d.say("CreateVolume, NodeStageVolume (mkfs), NodePublishVolume: a pod could write to it after %v.", took)
	return nil
}

func (d *demo) fill(ctx context.Context) error {
	d.title("Several hundred files of real data, each with its checksum")
	var err error
	start := time.Now()
	d.files, err = copyRealFiles(ctx, "/usr", d.pod(d.source), d.Size*2/5)
	if err != nil {
		return err
	}
	d.mergeTime = max(leastMergeTime, 3*time.Since(start))
	for _, f := range d.files {
		d.total += f.size
	}
	d.say("%d files, %s, copied from this machine's /usr and synced.", len(d.files), size(d.total))
	return nil
}

func (d *demo) takeSnapshot(ctx context.Context) error {
	d.title("A snapshot of the mounted volume")
	start := time.Now()
	req := &csi.CreateSnapshotRequest{Name: "demo-snapshot", SourceVolumeId: d.source}
	r, err := d.csi.CreateSnapshot(whole(ctx), req)
	if err != nil {
		return err
	}
	d.snapshot = r.GetSnapshot().GetSnapshotId()
	cut := r.GetSnapshot().GetCreationTime().AsTime().Sub(start)
	for !r.GetSnapshot().GetReadyToUse() {
		if err := sleep(ctx, 100*time.Millisecond); err != nil {
			return err
		}
		if r, err = d.csi.CreateSnapshot(whole(ctx), req); err != nil {
			return err
		}
	}
	d.say("Frozen, cut and thawed %v after the call; encoded in the background, ready after %v.",
		cut.Round(time.Millisecond), time.Since(start).Round(time.Millisecond))
	// What happens to the source now must not show in the snapshot.
	return os.WriteFile(filepath.Join(d.pod(d.source), "after-the-snapshot"), []byte("not in it\n"), 0o600)
}

// leastMergeTime is how long the demo makes the merge take at least, so that there
// is something to see while it goes on. On a slow machine, where all the rest takes
// longer, so does the merge.
const leastMergeTime = 20 * time.Second

func (d *demo) restore(ctx context.Context) error {
	d.title("The snapshot restored into a second volume, used at once")
	rate := max(d.total>>20/int64(d.mergeTime/time.Second), 1)
	r, err := d.csi.CreateVolume(whole(ctx), &csi.CreateVolumeRequest{
		Name: "demo-restored", CapacityRange: &csi.CapacityRange{RequiredBytes: d.Size}, VolumeCapabilities: []*csi.VolumeCapability{localnode.Ext4()},
		VolumeContentSource: localnode.FromSnapshot(d.snapshot),
		Parameters:          map[string]string{"mergeRate": fmt.Sprint(rate)},
	})
	if err != nil {
		return err
	}
	d.restored = r.GetVolume().GetVolumeId()
	start := time.Now()
	took, err := d.stageAndPublish(ctx, d.restored)
	if err != nil {
		return err
	}
	if err := readFirstByte(filepath.Join(d.pod(d.restored), d.files[0].name)); err != nil {
		return err
	}
	first := time.Since(start)
	s, err := d.status(ctx)
	if err != nil {
		return err
	}
	d.say("NodeStage + NodePublish took %v; the first byte of a file was read after %v.", took, first.Round(time.Millisecond))
	d.say("At that moment %.1f %% of the volume was merged (%s).", s.Percent, s.State)
	if s.State != "merging" {
		return fmt.Errorf("volume is %q, not merging: nothing of what follows would show anything", s.State)
	}
	if _, err := os.Stat(filepath.Join(d.pod(d.restored), "after-the-snapshot")); !os.IsNotExist(err) {
		return fmt.Errorf("a file that was made after the snapshot: %v", err)
	}
	return nil
}

// waitPercent waits until that much of the volume is merged.
func (d *demo) waitPercent(ctx context.Context, percent float64) (status, error) {
	for start := time.Now(); ; {
		s, err := d.status(ctx)
		if err != nil || s.Percent >= percent {
			return s, err
		}
		if time.Since(start) > 3*d.mergeTime {
			return s, fmt.Errorf("merge does not get to %.0f %%: it is %s at %.1f %% %s", percent, s.State, s.Percent, s.Error)
		}
		if err := sleep(ctx, 50*time.Millisecond); err != nil {
			return s, err
		}
	}
}

func (d *demo) readDuringMerge(ctx context.Context) error {
	d.title("Everything is there while the merge goes on in the background")
	before, err := d.waitPercent(ctx, 10)
	if err != nil {
		return err
	}
	if err := verify(ctx, d.pod(d.restored), d.files); err != nil {
		return err
	}
	after, err := d.status(ctx)
	if err != nil {
		return err
	}
	if after.State != "merging" {
		return fmt.Errorf("volume is %q, the merge ended too early to show anything", after.State)
	}
	d.say("All %d checksums are right, read between %.1f %% and %.1f %% of the merge.", len(d.files), before.Percent, after.Percent)
	if d.extra, err = writeFiles(d.pod(d.restored), "written-during-the-merge", 40); err != nil {
		return err
	}
	if err := verify(ctx, d.pod(d.restored), d.extra); err != nil {
		return err
	}
	d.say("%d files were written and synced meanwhile.", len(d.extra))
	old, adverse, err := d.conditions(ctx, d.restored, d.pod(d.restored))
	if err != nil {
		return err
	}
	d.say("Volume condition (kubelet ≤ 1.36): abnormal=%v, %q.", old.Abnormal, old.Message)
	d.say("Volume health (kubelet ≥ 1.37): %s.", adverse)
	if old.Abnormal || !strings.Contains(old.Message, "%") {
		return fmt.Errorf("volume condition is not what a healthy merge has: %+v", old)
	}
	return nil
}

func (d *demo) kill(ctx context.Context) error {
	d.title("kill -9 of the node plugin in the middle, under load")
	d.load = startLoad(d.pod(d.restored), d.Size/8)
	if err := sleep(ctx, 500*time.Millisecond); err != nil {
		return err
	}
	before, err := d.waitPercent(ctx, 30)
	if err != nil {
		return err
	}
	pid := d.node.Pid()
	if err := d.node.Kill(); err != nil {
		return err
	}
	if err := sleep(ctx, 300*time.Millisecond); err != nil {
		return err
	}
	if err := d.startNode(ctx); err != nil {
		return err
	}
	if err := sleep(ctx, time.Second); err != nil {
		return err
	}
	after, err := d.status(ctx)
	if err != nil {
		return err
	}
	res, err := d.load.end()
	if err != nil {
		return fmt.Errorf("I/O while the node plugin was killed: %w", err)
	}
	d.extra = append(d.extra, res.file)
	d.say("Killed pid %d at %.1f %%, 300 ms without a node plugin, new pid %d at %.1f %%.", pid, before.Percent, d.node.Pid(), after.Percent)
	d.say("%d synced writes and %d reads went on: no error, the longest waited %v.", res.writes, res.reads, res.longest.Round(time.Millisecond))
	if before.State != "merging" || after.Percent < before.Percent {
		return fmt.Errorf("merge was %s at %.1f %% and is %s at %.1f %%", before.State, before.Percent, after.State, after.Percent)
	}
	return nil
}

func (d *demo) complete(ctx context.Context) error {
	d.title("The merge to its end, at full rate")
	if _, err := d.command(ctx, "rate", d.restored, "0", "--socket", d.path("admin.sock")); err != nil {
		return err
	}
	start := time.Now()
	for {
		s, err := d.status(ctx)
		if err != nil {
			return err
		}
		if s.State == "failed" || s.State == "stalled" {
			return fmt.Errorf("merge is %s: %s", s.State, s.Error)
		}
		if (s.State == "merged" || s.State == "native") && s.Layers == 0 {
			break
		}
		if time.Since(start) > 10*time.Minute {
			return fmt.Errorf("merge does not end: %+v", s)
		}
		if err := sleep(ctx, 50*time.Millisecond); err != nil {
			return err
		}
	}
	d.say("Without its rate limit the rest took %v; no layer and no log is left.", time.Since(start).Round(time.Millisecond))
	if err := verify(ctx, d.pod(d.restored), append(d.files, d.extra...)); err != nil {
		return err
	}
	d.say("All %d checksums are right, those of the files written during the merge too.", len(d.files)+len(d.extra))
	return nil
}

func (d *demo) ordinary(ctx context.Context) error {
	d.title("The volume is an ordinary image again")
	if err := d.unpublishAndUnstage(whole(ctx), d.restored); err != nil {
		return err
	}
	base := d.path("state", "volumes", d.restored, "base.img")
	out, err := exec.CommandContext(ctx, "e2fsck", "-f", "-n", base).CombinedOutput()
	if err != nil {
		return fmt.Errorf("e2fsck -f -n of the base: %w: %s", err, strings.TrimSpace(string(out)))
	}
	lines := strings.Split(strings.TrimSpace(string(out)), "\n")
	d.say("e2fsck of the base file itself: %s", lines[len(lines)-1])
	mnt := d.path("plain")
	if err := os.Mkdir(mnt, 0o700); err != nil {
		return err
	}
	if out, err := exec.CommandContext(ctx, "mount", "-o", "loop,ro", base, mnt).CombinedOutput(); err != nil {
		return fmt.Errorf("plain mount of the base: %w: %s", err, out)
	}
	err = verify(ctx, mnt, append(d.files, d.extra...))
	if uerr := unix.Unmount(mnt, 0); err == nil {
		err = uerr
	}
	if err != nil {
		return err
	}
	d.say("Mounted without snapmerge, every file is there with the right checksum.")
	return nil
}
