package driver

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/protobuf/types/known/timestamppb"
	"k8s.io/klog/v2"

	"github.com/snapmerge/snapmerge/pkg/snapshot"
	"github.com/snapmerge/snapmerge/pkg/volume"
)

const (
	// readyWait is how long CreateSnapshot waits for the snapshot to be encoded
	// before it answers that it is not ready.
	readyWait = 5 * time.Second
	// answerTime is what is left of the caller's time when it answers.
	answerTime = 2 * time.Second
)

func (s controllerServer) CreateSnapshot(ctx context.Context, req *csi.CreateSnapshotRequest) (*csi.CreateSnapshotResponse, error) {
	source := req.GetSourceVolumeId()
	if source == "" {
		return nil, invalid("source volume id is missing")
	}
	if err := checkName(req.GetName()); err != nil {
		return nil, err
	}
	params, err := parseSnapshotParameters(req.GetParameters())
	if err != nil {
		return nil, err
	}
	if err := s.checkTopology(req.GetAccessibilityRequirements()); err != nil {
		return nil, err
	}
	spec := volume.SnapshotSpec{ID: safe(snapshotPrefix, req.GetName()), Name: req.GetName(), Volume: source, Compression: params.compression}
	var rec snapshot.Record
	err = s.ops.do(ctx, "CreateSnapshot", func(ctx context.Context) (err error) {
		rec, err = s.cut(ctx, spec)
		return err
	}, keyOfSnapshot(spec.ID), keyOf(source))
	if err != nil {
		return nil, err
	}
	if rec, err = s.waitReady(ctx, rec); err != nil {
		return nil, err
	}
	return &csi.CreateSnapshotResponse{Snapshot: s.snapshotOf(rec)}, nil
}

// cut makes the snapshot as far as the volume has to stand still for it.
func (p *plugin) cut(ctx context.Context, spec volume.SnapshotSpec) (snapshot.Record, error) {
	if v, err := p.volumes.Get(spec.Volume); err == nil {
		spec.FSType = v.Record().FSType
		spec.Freeze = func() (func(), error) { return p.freezeGuest(ctx, spec.Volume) }
	}
	start := time.Now()
	rec, err := p.volumes.CreateSnapshot(spec)
	if full(err) {
		// The sidecar would try again for ever after ResourceExhausted.
		return rec, fmt.Errorf("%w: %w", errState, err)
	}
	if err != nil {
		return rec, err
	}
	if rec.Name != spec.Name {
		return rec, fmt.Errorf("snapshot %s, named %q: %w", rec.ID, rec.Name, errIncompatible)
	}
	if !rec.CreatedAt.Before(start) {
		klog.InfoS("Snapshot cut", "snapshot", spec.ID, "volume", spec.Volume, "took", time.Since(start))
	}
	return rec, nil
}

// waitReady gives the encoder a little time, so that small snapshots are ready
// at once.
func (p *plugin) waitReady(ctx context.Context, rec snapshot.Record) (snapshot.Record, error) {
	wait := readyWait
	if deadline, ok := ctx.Deadline(); ok {
		wait = min(wait, time.Until(deadline)-answerTime)
	}
	short, cancel := context.WithTimeout(ctx, wait)
	defer cancel()
	rec, err := p.volumes.WaitSnapshot(short, rec.ID)
	if err != nil {
		return rec, err
	}
	return rec, failed(rec)
}

// failed is why a snapshot will never be ready, or nil.
func failed(rec snapshot.Record) error {
	if rec.State == snapshot.Failed {
		return fmt.Errorf("snapshot %s: %w: %s", rec.ID, volume.ErrSnapshotFailed, rec.Message)
	}
	return nil
}

func (p *plugin) snapshotOf(rec snapshot.Record) *csi.Snapshot {
	return &csi.Snapshot{
		SnapshotId: p.snapshotID(rec.ID), SourceVolumeId: rec.SourceVolumeID, SizeBytes: rec.Size,
		CreationTime: timestamppb.New(rec.CreatedAt), ReadyToUse: rec.State == snapshot.Ready,
		AccessibleTopology: []*csi.Topology{p.topology()},
	}
}

func (s controllerServer) DeleteSnapshot(ctx context.Context, req *csi.DeleteSnapshotRequest) (*csi.DeleteSnapshotResponse, error) {
	if req.GetSnapshotId() == "" {
		return nil, invalid("snapshot id is missing")
	}
	id, here, ok := s.splitSnapshotID(req.GetSnapshotId())
	if !ok {
		return &csi.DeleteSnapshotResponse{}, nil // there never was one
	}
	if !here { // success would leave it there for ever
		return nil, fmt.Errorf("snapshot %q: %w: %w", req.GetSnapshotId(), errState, errElsewhere)
	}
	err := s.ops.do(ctx, "DeleteSnapshot", func(context.Context) error { return s.volumes.DeleteSnapshot(id) }, keyOfSnapshot(id))
	if err != nil {
		return nil, err
	}
	klog.InfoS("Snapshot deleted", "snapshot", id)
	return &csi.DeleteSnapshotResponse{}, nil
}

// find returns a snapshot of this node by CSI's id. One that has failed gives
// the reason as an error, for who waits for it would wait for ever.
func (p *plugin) find(csiID string) (snapshot.Record, error) {
	id, here, ok := p.splitSnapshotID(csiID)
	if !ok || !here {
		return snapshot.Record{}, fmt.Errorf("snapshot %q: %w", csiID, snapshot.ErrNotFound)
	}
	rec, err := p.volumes.Snapshot(id)
	if err != nil {
		return rec, err
	}
	return rec, failed(rec)
}

func (s controllerServer) GetSnapshot(_ context.Context, req *csi.GetSnapshotRequest) (*csi.GetSnapshotResponse, error) {
	if req.GetSnapshotId() == "" {
		return nil, invalid("snapshot id is missing")
	}
	rec, err := s.find(req.GetSnapshotId())
	if err != nil {
		return nil, err
	}
	return &csi.GetSnapshotResponse{Snapshot: s.snapshotOf(rec)}, nil
}

func (s controllerServer) ListSnapshots(_ context.Context, req *csi.ListSnapshotsRequest) (*csi.ListSnapshotsResponse, error) {
	records, err := s.listed(req)
	if err != nil {
		return nil, err
	}
	records, next, err := page(records, req.GetMaxEntries(), req.GetStartingToken(), func(r snapshot.Record) string { return r.ID })
	if err != nil {
		return nil, err
	}
	r := &csi.ListSnapshotsResponse{NextToken: next}
	for _, rec := range records {
		r.Entries = append(r.Entries, &csi.ListSnapshotsResponse_Entry{Snapshot: s.snapshotOf(rec)})
	}
	return r, nil
}

// listed returns the snapshots that the request's filters leave, sorted by id.
func (p *plugin) listed(req *csi.ListSnapshotsRequest) ([]snapshot.Record, error) {
	var records []snapshot.Record
	if id := req.GetSnapshotId(); id != "" {
		rec, err := p.find(id)
		switch {
		case errors.Is(err, snapshot.ErrNotFound):
		case err != nil:
			return nil, err
		default:
			records = append(records, rec)
		}
	} else {
		var err error
		if records, err = p.volumes.Snapshots(); err != nil {
			return nil, err
		}
	}
	source := req.GetSourceVolumeId()
	if source == "" {
		return records, nil
	}
	var of []snapshot.Record
	for _, r := range records {
		if r.SourceVolumeID == source {
			of = append(of, r)
		}
	}
	return of, nil
}
