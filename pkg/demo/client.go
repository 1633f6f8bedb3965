package demo

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	csi "github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"

	"github.com/snapmerge/snapmerge/pkg/health"
	"github.com/snapmerge/snapmerge/pkg/localnode"
)

// pod is where a pod would see the volume.
func (d *demo) pod(id string) string { return d.path("pods", id) }

func (d *demo) staging(id string) string { return d.path("stage", id) }

// whole is the context of calls that change something. An interrupt lets them end:
// the plugin goes on with a call that was broken off, and what it makes then would
// be missed by the clean-up.
func whole(ctx context.Context) context.Context { return context.WithoutCancel(ctx) }

// stageAndPublish does what kubelet does before a pod starts, and tells how long
// that took.
func (d *demo) stageAndPublish(ctx context.Context, id string) (time.Duration, error) {
	if err := os.Mkdir(d.staging(id), 0o700); err != nil {
		return 0, err
	}
	start := time.Now()
	d.staged[id] = true
	_, err := d.csi.NodeStageVolume(whole(ctx), &csi.NodeStageVolumeRequest{
		VolumeId: id, StagingTargetPath: d.staging(id), VolumeCapability: localnode.Ext4()})
	if err != nil {
		return 0, err
	}
	d.published[id] = true
	_, err = d.csi.NodePublishVolume(whole(ctx), &csi.NodePublishVolumeRequest{
		VolumeId: id, StagingTargetPath: d.staging(id), TargetPath: d.pod(id), VolumeCapability: localnode.Ext4()})
	took := time.Since(start).Round(time.Millisecond)
	if err == nil {
		err = d.noteBacking(id)
	}
	return took, err
}

// noteBacking remembers what lies in the loop device that the volume is mounted
// from, if it is one.
func (d *demo) noteBacking(id string) error {
	var st unix.Stat_t
	if err := unix.Stat(d.pod(id), &st); err != nil {
		return err
	}
	b, err := os.ReadFile(fmt.Sprintf("/sys/dev/block/%d:%d/loop/backing_file", unix.Major(st.Dev), unix.Minor(st.Dev)))
	if errors.Is(err, os.ErrNotExist) {
		return nil // another transport
	}
	d.backing = append(d.backing, string(b))
	return err
}

func (d *demo) unpublishAndUnstage(ctx context.Context, id string) error {
	if d.published[id] {
		if _, err := d.csi.NodeUnpublishVolume(ctx, &csi.NodeUnpublishVolumeRequest{VolumeId: id, TargetPath: d.pod(id)}); err != nil {
			return err
		}
		delete(d.published, id)
	}
	if d.staged[id] {
		if _, err := d.csi.NodeUnstageVolume(ctx, &csi.NodeUnstageVolumeRequest{VolumeId: id, StagingTargetPath: d.staging(id)}); err != nil {
			return err
		}
		delete(d.staged, id)
	}
	return nil
}

// conditions asks for the state of a volume in both ways.
func (d *demo) conditions(ctx context.Context, id, path string) (old health.Condition, adverse string, err error) {
	st, err := d.csi.NodeGetVolumeStats(ctx, &csi.NodeGetVolumeStatsRequest{VolumeId: id, VolumePath: path})
	if err != nil {
		return old, "", err
	}
	if old, err = health.GetCondition(st); err != nil {
		return old, "", err
	}
	h, err := d.csi.NodeGetVolumeHealth(ctx, &csi.NodeGetVolumeHealthRequest{VolumeId: id})
	if err != nil {
		return old, "", err
	}
	adverse = "no adverse state"
	if text := strings.TrimSpace(h.String()); text != "" {
		adverse = text
	}
	return old, adverse, nil
}

// cleanUp takes everything down and looks that nothing is left.
func (d *demo) cleanUp() error {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	var errs []error
	note := func(what string, err error) {
		if err != nil {
			errs = append(errs, fmt.Errorf("clean-up: %s: %w", what, err))
		}
	}
	if d.csi != nil {
		if d.node != nil {
			select {
			case <-d.node.Done(): // it died where it should not; once more, to be able to end in order
				note("node plugin", d.startNode(ctx))
			default: // an interrupt may have come before it was ready
				note("node plugin", d.csi.WaitReady(ctx, d.node))
			}
		}
		// Its requests are answered only now, if the plugin was away.
		note("load", d.load.close())
		for _, id := range []string{d.restored, d.source} {
			if id == "" {
				continue
			}
			note("unstage "+id, d.unpublishAndUnstage(ctx, id))
			_, err := d.csi.DeleteVolume(ctx, &csi.DeleteVolumeRequest{VolumeId: id})
			note("delete "+id, err)
		}
		if d.snapshot != "" {
			_, err := d.csi.DeleteSnapshot(ctx, &csi.DeleteSnapshotRequest{SnapshotId: d.snapshot})
			note("delete "+d.snapshot, err)
		}
		d.csi.Close()
	}
	note("node plugin", d.node.Stop())
	note("keeper", d.keeper.Stop())
	if left, err := filepath.Glob(d.path("state", "volumes", "*")); err != nil || len(left) > 0 {
		note("volumes are left", fmt.Errorf("%v %v", left, err))
	}
	mounted, err := localnode.Mounted(d.dir)
	note("mounts", err)
	if mounted {
		note("mounts", errors.New("mounts are left under "+d.dir))
		return errors.Join(errs...) // what is mounted is not removed
	}
	loops, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	note("loop devices", err)
	for _, l := range loops {
		if b, err := os.ReadFile(l); err == nil && slices.Contains(d.backing, string(b)) {
			note("loop devices", fmt.Errorf("%s is left", l))
		}
	}
	note("files", os.RemoveAll(d.dir))
	return errors.Join(errs...)
}
