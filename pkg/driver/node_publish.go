package driver

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"k8s.io/klog/v2"
	"k8s.io/mount-utils"

	"github.com/snapmerge/snapmerge/pkg/volume"
)

// publication is a NodePublishVolumeRequest that has been understood.
type publication struct {
	id, staging, target string
	access              access
	readOnly            bool
}

func (s nodeServer) NodePublishVolume(ctx context.Context, req *csi.NodePublishVolumeRequest) (*csi.NodePublishVolumeResponse, error) {
	if req.GetVolumeId() == "" {
		return nil, invalid("volume id is missing")
	}
	target, err := s.resolve("target_path", req.GetTargetPath())
	if err != nil {
		return nil, err
	}
	a, err := parseAccess(req.GetVolumeCapability())
	if err != nil {
		return nil, exceeds(err)
	}
	if req.GetStagingTargetPath() == "" {
		return nil, fmt.Errorf("%w: staging_target_path is missing: the volume has to be staged first", errState)
	}
	staging, err := s.resolve("staging_target_path", req.GetStagingTargetPath())
	if err != nil {
		return nil, err
	}
	pub := publication{req.GetVolumeId(), staging, target, a, req.GetReadonly() || a.readOnly()}
	err = s.ops.do(ctx, "NodePublishVolume", func(context.Context) error { return s.publish(pub) }, keyOf(pub.id))
	if err != nil {
		return nil, err
	}
	klog.InfoS("Volume published", "volume", pub.id, "path", target, "readOnly", pub.readOnly)
	return &csi.NodePublishVolumeResponse{}, nil
}

// publish bind mounts what is staged at the target.
func (p *plugin) publish(pub publication) error {
	v, err := p.volumes.Get(pub.id)
	if err != nil {
		return err
	}
	dev := p.volumes.Device(pub.id)
	users, err := p.checkPublish(v, dev, pub)
	if err != nil {
		return err
	}
	at, err := p.mountsAt(pub.target)
	if err != nil {
		return err
	}
	if n := len(at); n > 0 {
		number, _ := blockNumber(dev)
		if !isOf(at[n-1], dev, number) {
			// A device that has died since, or somebody else's: not to be shown to
			// the pod as its volume.
			return fmt.Errorf("%s: %w: %s is mounted there", pub.target, errIncompatible, at[n-1].Device)
		}
		switch ro := readOnly(at[n-1]); {
		case ro == pub.readOnly:
			return nil
		case ro:
			return fmt.Errorf("%s: %w: mounted read-only", pub.target, errIncompatible)
		}
		// A read-only bind mount takes two steps, and an earlier process was ended
		// between them. No pod has seen it.
		if err := p.unmountAll(pub.target); err != nil {
			return err
		}
	}
	if pub.access.single() && len(users) > 0 {
		return fmt.Errorf("volume %s: %w: it has a single writer and is published at %q", pub.id, errState, pathsOf(users))
	}
	source := pub.staging
	if pub.access.block {
		source = dev
	}
	if err := makeTarget(pub.target, pub.access.block); err != nil {
		return err
	}
	options := []string{"bind"}
	if pub.readOnly {
		options = append(options, "ro")
	}
	if err := p.mounter.Mount(source, pub.target, "", options); err != nil {
		// The first of two steps may have been done.
		return errors.Join(err, p.unmountAll(pub.target), removeTarget(pub.target))
	}
	return nil
}

// checkPublish makes sure that the volume is staged as the publication needs it,
// and returns its mounts but for the staging one and the target.
//
// A raw block volume that was staged for writers may be published read-only all the
// same, beside writers. A mount option keeps nobody from writing to a device; it is
// the kubelet that gives the container the device for reading alone (device cgroup).
func (p *plugin) checkPublish(v *volume.Volume, dev string, pub publication) (users []mount.MountPoint, err error) {
	st := v.Record().Stage
	switch {
	case st == nil || dev == "" || st.Path != pub.staging:
		return nil, fmt.Errorf("volume %s: %w: it is not staged at %s", pub.id, errState, pub.staging)
	case st.Block != pub.access.block || st.ReadOnly && !pub.readOnly:
		return nil, fmt.Errorf("volume %s: %w: it is staged in another way", pub.id, errState)
	}
	all, err := p.mountsOf(dev)
	if err != nil {
		return nil, err
	}
	staged := st.Block
	for _, m := range all {
		switch m.Path {
		case pub.staging:
			staged = true
		case pub.target:
		default:
			users = append(users, m)
		}
	}
	if !staged {
		return nil, fmt.Errorf("volume %s: %w: it is not mounted at %s", pub.id, errState, pub.staging)
	}
	return users, nil
}

// makeTarget makes what the volume is bind mounted on.
func makeTarget(target string, block bool) error {
	if !block {
		if err := os.Mkdir(target, 0o750); err != nil && !errors.Is(err, fs.ErrExist) {
			return fmt.Errorf("target path: %w", err)
		}
		return nil
	}
	f, err := os.OpenFile(target, os.O_CREATE|os.O_RDONLY|noFollow, 0o600)
	if err != nil {
		return fmt.Errorf("target path: %w", err)
	}
	return f.Close()
}

// removeTarget removes what makeTarget made.
func removeTarget(target string) error {
	if err := os.Remove(target); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("target path: %w", err)
	}
	return nil
}

func (s nodeServer) NodeUnpublishVolume(ctx context.Context, req *csi.NodeUnpublishVolumeRequest) (*csi.NodeUnpublishVolumeResponse, error) {
	id := req.GetVolumeId()
	if id == "" {
		return nil, invalid("volume id is missing")
	}
	target, err := s.resolve("target_path", req.GetTargetPath())
	if err != nil {
		return nil, err
	}
	err = s.ops.do(ctx, "NodeUnpublishVolume", func(ctx context.Context) error {
		// The volume may be gone for long; the mount has to go all the same.
		err := s.unlessHung(ctx, id, s.volumes.Device(id), func(context.Context) error { return s.unmountAll(target) })
		if err != nil {
			return err
		}
		return removeTarget(target)
	}, keyOf(id))
	if err != nil {
		return nil, err
	}
	klog.InfoS("Volume unpublished", "volume", id, "path", target)
	return &csi.NodeUnpublishVolumeResponse{}, nil
}
