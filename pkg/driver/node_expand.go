package driver

import (
	"context"
	"fmt"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"k8s.io/klog/v2"

	"github.com/snapmerge/snapmerge/pkg/volume"
)

// NodeExpandVolume makes volume, device and file system larger, mounted or not;
// there is nothing that a controller would have to do first.
func (s nodeServer) NodeExpandVolume(ctx context.Context, req *csi.NodeExpandVolumeRequest) (*csi.NodeExpandVolumeResponse, error) {
	id := req.GetVolumeId()
	switch {
	case id == "":
		return nil, invalid("volume id is missing")
	case req.GetVolumePath() == "":
		return nil, invalid("volume_path is missing")
	}
	if c := req.GetVolumeCapability(); c != nil {
		if _, err := parseAccess(c); err != nil {
			return nil, asked(err)
		}
	}
	want, err := parseCapacity(req.GetCapacityRange())
	if err != nil {
		return nil, err
	}
	var size int64
	err = s.ops.do(ctx, "NodeExpandVolume", func(ctx context.Context) (err error) {
		size, err = s.expand(ctx, id, want)
		return err
	}, keyOf(id))
	if err != nil {
		return nil, err
	}
	klog.InfoS("Volume expanded", "volume", id, "bytes", size)
	return &csi.NodeExpandVolumeResponse{CapacityBytes: size}, nil
}

func (p *plugin) expand(ctx context.Context, id string, want capacity) (int64, error) {
	v, err := p.volumes.Get(id)
	if err != nil {
		return 0, err
	}
	size := max(v.Size(), volume.RoundUp(want.required))
	if want.limit > 0 && size > want.limit {
		return 0, fmt.Errorf("volume %s: %w: it would have %d bytes, the limit is %d", id, errRange, size, want.limit)
	}
	if size, err = p.volumes.Expand(id, size); err != nil {
		if full(err) {
			err = fmt.Errorf("%w: %w", errRange, err)
		}
		return 0, err
	}
	return size, p.growMounted(ctx, v)
}

// growMounted grows the file system where it is mounted for writing; elsewhere it
// grows when it is staged next.
func (p *plugin) growMounted(ctx context.Context, v *volume.Volume) error {
	rec, dev := v.Record(), p.volumes.Device(v.ID())
	if !rec.Grow || dev == "" || rec.Stage == nil || rec.Stage.Block {
		return nil
	}
	all, err := p.mountsOf(dev)
	if err != nil {
		return err
	}
	for _, m := range all {
		if readOnly(m) {
			continue
		}
		// However long it takes: as long as the device does something it goes on.
		err := p.unlessHung(context.WithoutCancel(ctx), v.ID(), dev, func(ctx context.Context) error {
			return p.grow(ctx, dev, m.Path, rec.FSType)
		})
		if err != nil {
			return err
		}
		return record(v, func(r *volume.Record) { r.Grow = false })
	}
	return nil
}
