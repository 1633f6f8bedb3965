package driver

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"k8s.io/klog/v2"

	"github.com/snapmerge/snapmerge/pkg/transport"
	"github.com/snapmerge/snapmerge/pkg/volume"
)

func (s nodeServer) NodeStageVolume(ctx context.Context, req *csi.NodeStageVolumeRequest) (*csi.NodeStageVolumeResponse, error) {
	id := req.GetVolumeId()
	if id == "" {
		return nil, invalid("volume id is missing")
	}
	path, err := s.resolve("staging_target_path", req.GetStagingTargetPath())
	if err != nil {
		return nil, err
	}
	a, err := parseAccess(req.GetVolumeCapability())
	if err != nil {
		return nil, exceeds(err)
	}
	start := time.Now()
	err = s.ops.do(ctx, "NodeStageVolume", func(ctx context.Context) error { return s.stage(ctx, id, path, a) }, keyOf(id))
	if err != nil {
		return nil, err
	}
	took := time.Since(start)
	s.staged.add(id, took)
	klog.InfoS("Volume staged", "volume", id, "path", path, "took", took)
	return &csi.NodeStageVolumeResponse{}, nil
}

// stage brings the volume's device and what is on it into service. What is there
// already of that stays.
func (p *plugin) stage(ctx context.Context, id, path string, a access) error {
	if err := p.checkStaged(id, path, a); err != nil {
		return err
	}
	v, err := p.volumes.Open(ctx, id)
	if err != nil {
		return err
	}
	params := v.Record().Params
	o := transport.Options{ReadOnly: a.block && a.readOnly(), Transport: params[transportParameter]}
	if params[snapshotsParameter] == snapshotsOffline {
		o.Base = v.Passthrough
	}
	dev, err := p.volumes.Attach(ctx, id, o)
	if err != nil {
		return err
	}
	// Tools wait for the device; if it hangs it has to go. The check of a large file
	// system may take its time, and would begin anew if it were cut short.
	err = p.unlessHung(context.WithoutCancel(ctx), id, dev, func(ctx context.Context) error {
		if a.block {
			return p.stageBlock(v, path, a)
		}
		return p.stageFS(ctx, v, dev, path, a)
	})
	if err != nil {
		// The caller need not unstage what it could not stage, and a volume with a
		// device cannot be deleted.
		return errors.Join(err, p.unstageUnused(ctx, id, dev, path))
	}
	return nil
}

// checkStaged compares with how the volume is staged, if it is.
func (p *plugin) checkStaged(id, path string, a access) error {
	v, err := p.volumes.Get(id)
	if errors.Is(err, volume.ErrNotFound) {
		return err
	}
	if err != nil {
		return nil // Attach tries to open it
	}
	st := v.Record().Stage
	if st == nil || p.volumes.Device(id) == "" {
		return nil // the record is of before a restart of the node
	}
	if st.Path != path || st.Block != a.block || st.ReadOnly != a.readOnly() && !a.ro || a.fsType != "" && a.fsType != st.FSType {
		return fmt.Errorf("volume %s is staged as %+v: %w", id, *st, errIncompatible)
	}
	return nil
}

// stageBlock only makes the record right: the device is what is published.
func (p *plugin) stageBlock(v *volume.Volume, path string, a access) error {
	return record(v, func(r *volume.Record) {
		r.Blank = false // the guest may write anything from now on
		r.Stage = &volume.StageRecord{Path: path, Block: true, ReadOnly: a.readOnly()}
	})
}

// record changes the volume's record unless that would change nothing: staging
// again costs no write.
func record(v *volume.Volume, change func(r *volume.Record)) error {
	old := *v.Record()
	next := old
	change(&next)
	same := old.Blank == next.Blank && old.FSType == next.FSType && old.Grow == next.Grow &&
		(old.Stage == nil) == (next.Stage == nil) && (old.Stage == nil || *old.Stage == *next.Stage)
	if same {
		return nil
	}
	return v.Update(change)
}

// stageFS mounts the volume's file system at the path.
func (p *plugin) stageFS(ctx context.Context, v *volume.Volume, dev, path string, a access) error {
	if err := os.Mkdir(path, 0o750); err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("staging path: %w", err)
	}
	at, err := p.mountsAt(path)
	if err != nil {
		return err
	}
	for i := len(at) - 1; i >= 0; i-- {
		if at[i].Device == dev {
			return p.growStaged(ctx, v, dev, path, a) // it is mounted
		}
		klog.InfoS("What is mounted at the staging path is not the volume", "volume", v.ID(), "path", path, "device", at[i].Device)
		if err := p.mounter.Unmount(path); err != nil {
			return err
		}
	}
	fsType, full, err := p.fsOf(ctx, v, dev, a)
	if err != nil {
		return err
	}
	// Before the first mount it must be durable that there is something to lose.
	if err := record(v, func(r *volume.Record) {
		r.Blank, r.FSType, r.Grow = false, fsType, r.Grow && !full
		r.Stage = &volume.StageRecord{Path: path, FSType: fsType, ReadOnly: a.readOnly()}
	}); err != nil {
		return err
	}
	// A read-only file system cannot grow. Its device is writable, so the journal
	// of one that was not unmounted cleanly is replayed all the same.
	ro := a.readOnly() && !v.Record().Grow
	if err := p.mounter.Mount(dev, path, fsType, mountOptions(fsType, a.flags, ro)); err != nil {
		return err
	}
	return p.growStaged(ctx, v, dev, path, a)
}

// fsOf prepares the file system on the device, unless it is in use. full: it is
// known to fill the device.
func (p *plugin) fsOf(ctx context.Context, v *volume.Volume, dev string, a access) (fsType string, full bool, err error) {
	users, err := p.mountsOf(dev)
	if err != nil {
		return "", false, err
	}
	for _, m := range users {
		if m.Device == dev {
			return m.Type, false, nil // mounted elsewhere: no tool may touch it now
		}
	}
	rec := v.Record()
	if fsType, err = p.prepareFS(ctx, rec, dev, a.fsType); err != nil {
		return "", false, err
	}
	if rec.Grow && !rec.Blank && fsType == ext4 && !p.growsMounted {
		return fsType, true, p.growUnmounted(ctx, dev)
	}
	return fsType, rec.Blank, nil
}

// growStaged grows the mounted file system if the record says so, and makes it
// read-only then if it has to be.
func (p *plugin) growStaged(ctx context.Context, v *volume.Volume, dev, path string, a access) error {
	rec := v.Record()
	if !rec.Grow {
		return nil
	}
	if err := p.grow(ctx, dev, path, rec.FSType); err != nil {
		return err
	}
	if a.readOnly() {
		if err := p.mounter.Mount(dev, path, rec.FSType, append([]string{"remount"}, mountOptions(rec.FSType, a.flags, true)...)); err != nil {
			return err
		}
	}
	return record(v, func(r *volume.Record) { r.Grow = false })
}

func (s nodeServer) NodeUnstageVolume(ctx context.Context, req *csi.NodeUnstageVolumeRequest) (*csi.NodeUnstageVolumeResponse, error) {
	id := req.GetVolumeId()
	if id == "" {
		return nil, invalid("volume id is missing")
	}
	path, err := s.resolve("staging_target_path", req.GetStagingTargetPath())
	if err != nil {
		return nil, err
	}
	err = s.ops.do(ctx, "NodeUnstageVolume", func(ctx context.Context) error { return s.unstage(ctx, id, path) }, keyOf(id))
	if err != nil {
		return nil, err
	}
	klog.InfoS("Volume unstaged", "volume", id, "path", path)
	return &csi.NodeUnstageVolumeResponse{}, nil
}

// unstage takes the mount and the device away, as far as they are there.
func (p *plugin) unstage(ctx context.Context, id, path string) error {
	dev := p.volumes.Device(id)
	if err := p.unlessHung(ctx, id, dev, func(context.Context) error { return p.unmountAll(path) }); err != nil {
		return err
	}
	if err := p.detach(ctx, id, dev); err != nil {
		return err
	}
	v, err := p.volumes.Get(id)
	if err != nil {
		return nil // gone, or it cannot be opened; staged it is not
	}
	return record(v, func(r *volume.Record) { r.Stage = nil })
}

// unstageUnused is unstage after a failure, unless pods use the volume.
func (p *plugin) unstageUnused(ctx context.Context, id, dev, path string) error {
	users, err := p.mountsOf(dev)
	if err != nil {
		return err
	}
	for _, m := range users {
		if m.Path != path {
			return nil
		}
	}
	return p.unstage(ctx, id, path)
}
