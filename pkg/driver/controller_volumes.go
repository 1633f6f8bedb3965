package driver

import (
	"context"
	"errors"
	"fmt"
	"maps"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"k8s.io/klog/v2"

	"github.com/snapmerge/snapmerge/pkg/health"
	"github.com/snapmerge/snapmerge/pkg/snapshot"
	"github.com/snapmerge/snapmerge/pkg/volume"
)

// volumeRequest is a CreateVolumeRequest that has been understood.
type volumeRequest struct {
	name     string
	access   []access
	capacity capacity
	given    map[string]string // own parameters, as given
	params   volumeParameters
	claim    volume.Claim
	snapshot string // id in the store; empty: a blank volume
}

func (s controllerServer) CreateVolume(ctx context.Context, req *csi.CreateVolumeRequest) (*csi.CreateVolumeResponse, error) {
	r, err := s.parseVolumeRequest(req)
	if err != nil {
		return nil, err
	}
	id := volumeID(r.name)
	var v *volume.Volume
	err = s.ops.do(ctx, "CreateVolume", func(ctx context.Context) (err error) {
		v, err = s.createVolume(ctx, id, r)
		return err
	}, keyOf(id))
	if err != nil {
		return nil, err
	}
	out := s.volumeOf(id, v.Size())
	out.ContentSource = req.GetVolumeContentSource()
	return &csi.CreateVolumeResponse{Volume: out}, nil
}

func (s controllerServer) parseVolumeRequest(req *csi.CreateVolumeRequest) (volumeRequest, error) {
	r := volumeRequest{name: req.GetName(), given: own(req.GetParameters()), claim: claimOf(req.GetParameters())}
	err := checkName(r.name)
	if err == nil {
		r.access, err = parseAll(req.GetVolumeCapabilities())
		err = asked(err)
	}
	if err == nil {
		r.capacity, err = parseCapacity(req.GetCapacityRange())
	}
	if err == nil {
		r.params, err = parseVolumeParameters(req.GetParameters())
	}
	if err == nil && len(req.GetMutableParameters()) > 0 {
		err = invalid("mutable parameters: there are none")
	}
	if err == nil {
		r.snapshot, err = s.parseSource(req.GetVolumeContentSource())
	}
	if err == nil {
		err = s.checkTopology(req.GetAccessibilityRequirements())
	}
	return r, err
}

// parseSource returns the snapshot of the store that a volume is made from, or
// "".
func (p *plugin) parseSource(src *csi.VolumeContentSource) (string, error) {
	if src == nil {
		return "", nil
	}
	if src.GetSnapshot() == nil {
		return "", invalid("volumes are made from snapshots, not from volumes")
	}
	csiID := src.GetSnapshot().GetSnapshotId()
	if csiID == "" {
		return "", invalid("snapshot id of the content source is missing")
	}
	id, here, ok := p.splitSnapshotID(csiID)
	switch {
	case !ok:
		return "", fmt.Errorf("snapshot %q: %w", csiID, errNotFound)
	case !here:
		return "", fmt.Errorf("snapshot %q: %w", csiID, errElsewhere)
	}
	return id, nil
}

func (p *plugin) createVolume(ctx context.Context, id string, r volumeRequest) (*volume.Volume, error) {
	v, err := p.volumes.Open(ctx, id)
	if err == nil {
		rec := v.Record()
		if rec.Name != r.name { // names that are not safe become hashes, which are names too
			return nil, fmt.Errorf("volume %s, named %q: %w", id, rec.Name, errIncompatible)
		}
		if !r.capacity.allows(v.Size()) {
			return nil, fmt.Errorf("volume %s of %d bytes: %w", id, v.Size(), errIncompatible)
		}
		if !maps.Equal(own(rec.Params), r.given) || rec.Source != r.snapshot {
			return nil, fmt.Errorf("volume %s with parameters %v from snapshot %q: %w", id, rec.Params, rec.Source, errIncompatible)
		}
		return v, nil
	}
	if !errors.Is(err, volume.ErrNotFound) {
		return nil, err
	}
	smallest, err := p.smallest(r)
	if err != nil {
		return nil, err
	}
	size, err := r.capacity.choose(smallest)
	if err != nil {
		return nil, err
	}
	v, err = p.volumes.CreateVolume(ctx, volume.VolumeSpec{
		ID: id, Name: r.name, Size: size, Snapshot: r.snapshot, Claim: r.claim, Params: r.given, Limits: r.params.limits, Rate: r.params.rate, ReadAhead: r.params.readAhead,
		ReadPromotion: r.params.promotion,
	})
	if err == nil {
		klog.InfoS("Volume made", "volume", id, "bytes", size, "snapshot", r.snapshot)
	}
	return v, err
}

// smallest is the least size in bytes that the volume can have.
func (p *plugin) smallest(r volumeRequest) (int64, error) {
	made := int64(bs) // with a file system that is made when it is staged
	for _, a := range r.access {
		if !a.block {
			made = max(made, minSize[fsTypeOr(a.fsType, defaultFS)])
		}
	}
	if r.snapshot == "" {
		return made, nil
	}
	rec, err := p.volumes.ReadySnapshot(r.snapshot)
	if err != nil {
		return 0, err
	}
	least := rec.Size
	if rec.Blank {
		least = max(least, made)
	}
	return least, checkFS(rec, r.access)
}

// checkFS finds out early what would fail when the volume is staged.
func checkFS(rec snapshot.Record, all []access) error {
	for _, a := range all {
		if a.fsType != "" && rec.FSType != "" && a.fsType != rec.FSType {
			return invalid("file system %s is asked for, snapshot %s has %s", a.fsType, rec.ID, rec.FSType)
		}
	}
	return nil
}

func fsTypeOr(fsType, other string) string {
	if fsType == "" {
		return other
	}
	return fsType
}

// volumeOf is a volume in CSI's terms; a size of 0 stands for unknown.
func (p *plugin) volumeOf(id string, size int64) *csi.Volume {
	return &csi.Volume{VolumeId: id, CapacityBytes: size, AccessibleTopology: []*csi.Topology{p.topology()}}
}

// describe is a volume that exists in CSI's terms.
func (p *plugin) describe(id string) (*csi.Volume, error) {
	v, err := p.volumes.Get(id)
	if errors.Is(err, volume.ErrNotFound) {
		return nil, err
	}
	if err != nil { // it is there, whatever is wrong with it
		return p.volumeOf(id, 0), nil
	}
	out := p.volumeOf(id, v.Size())
	if src := v.Record().Source; src != "" {
		out.ContentSource = &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Snapshot{
			Snapshot: &csi.VolumeContentSource_SnapshotSource{SnapshotId: p.snapshotID(src)}}}
	}
	return out, nil
}

func (s controllerServer) DeleteVolume(ctx context.Context, req *csi.DeleteVolumeRequest) (*csi.DeleteVolumeResponse, error) {
	id := req.GetVolumeId()
	if id == "" {
		return nil, invalid("volume id is missing")
	}
	err := s.ops.do(ctx, "DeleteVolume", func(context.Context) error { return s.volumes.DeleteVolume(id) }, keyOf(id))
	if err != nil {
		return nil, err
	}
	s.used.forget(id)
	s.staged.forget(id)
	klog.InfoS("Volume deleted", "volume", id)
	return &csi.DeleteVolumeResponse{}, nil
}

func (s controllerServer) ValidateVolumeCapabilities(_ context.Context, req *csi.ValidateVolumeCapabilitiesRequest) (*csi.ValidateVolumeCapabilitiesResponse, error) {
	if req.GetVolumeId() == "" {
		return nil, invalid("volume id is missing")
	}
	if len(req.GetVolumeCapabilities()) == 0 {
		return nil, invalid("volume capabilities are missing")
	}
	if _, err := s.describe(req.GetVolumeId()); err != nil {
		return nil, err
	}
	_, err := parseAll(req.GetVolumeCapabilities())
	if err == nil {
		_, err = parseVolumeParameters(req.GetParameters())
	}
	if err == nil && len(req.GetMutableParameters()) > 0 {
		err = invalid("mutable parameters: there are none")
	}
	if err != nil {
		return &csi.ValidateVolumeCapabilitiesResponse{Message: err.Error()}, nil
	}
	return &csi.ValidateVolumeCapabilitiesResponse{Confirmed: &csi.ValidateVolumeCapabilitiesResponse_Confirmed{
		VolumeContext: req.GetVolumeContext(), VolumeCapabilities: req.GetVolumeCapabilities(), Parameters: req.GetParameters(),
	}}, nil
}

func (s controllerServer) ListVolumes(_ context.Context, req *csi.ListVolumesRequest) (*csi.ListVolumesResponse, error) {
	ids, next, err := page(s.volumes.IDs(), req.GetMaxEntries(), req.GetStartingToken(), func(id string) string { return id })
	if err != nil {
		return nil, err
	}
	r := &csi.ListVolumesResponse{NextToken: next}
	for _, id := range ids {
		v, err := s.describe(id)
		if err != nil {
			continue // deleted meanwhile
		}
		r.Entries = append(r.Entries, &csi.ListVolumesResponse_Entry{Volume: v})
	}
	return r, nil
}

func (s controllerServer) ControllerGetVolume(_ context.Context, req *csi.ControllerGetVolumeRequest) (*csi.ControllerGetVolumeResponse, error) {
	if req.GetVolumeId() == "" {
		return nil, invalid("volume id is missing")
	}
	v, err := s.describe(req.GetVolumeId())
	if err != nil {
		return nil, err
	}
	return &csi.ControllerGetVolumeResponse{Volume: v, Status: &csi.ControllerGetVolumeResponse_VolumeStatus{}}, nil
}

func (s controllerServer) ControllerGetVolumeHealth(_ context.Context, req *csi.ControllerGetVolumeHealthRequest) (*csi.ControllerGetVolumeHealthResponse, error) {
	if req.GetVolumeId() == "" {
		return nil, invalid("volume id is missing")
	}
	st, err := s.volumes.Status(req.GetVolumeId())
	if err != nil {
		return nil, err
	}
	return &csi.ControllerGetVolumeHealthResponse{VolumeHealth: health.HealthOf(st)}, nil
}
