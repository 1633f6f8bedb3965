package driver

import (
	"context"
	"errors"
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
		if err := p.growInUse(ctx, v.ID(), dev, m.Path, rec.FSType); err != nil {
			return err
		}
		return record(v, func(r *volume.Record) { r.Grow = false })
	}
	return nil
}

// errGrowing says that an earlier call has not ended.
var errGrowing = errors.New("its file system is being grown")

// growInUse grows a file system that pods may use. However long it takes, it goes on as
// long as the device does something. Where that hangs it gives up, but does not take the
// device away: it may yet come back, and the next call goes on.
func (p *plugin) growInUse(ctx context.Context, id, dev, path, fsType string) error {
	if _, already := p.growing.LoadOrStore(id, nil); already {
		return fmt.Errorf("volume %s: %w", id, errGrowing)
	}
	ctx, cancel := p.endsIfHung(context.WithoutCancel(ctx), dev)
	defer cancel(nil)
	done := make(chan error, 1)
	go func() {
		err := guard("growing of volume "+id, func() error { return p.grow(ctx, dev, path, fsType) })
		p.growing.Delete(id) // before the caller can ask for the next
		done <- err
	}()
	select {
	case err := <-done:
		return err
	case <-ctx.Done(): // nothing else ends it
		go p.abortUnused(id, dev)
		return fmt.Errorf("volume %s: %w: its file system is not grown yet", id, errHangs)
	}
}
