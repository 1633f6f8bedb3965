package driver

import (
	"context"
	"errors"
	"fmt"

	"github.com/container-storage-interface/spec/lib/go/csi"
)

type controllerServer struct {
	csi.UnimplementedControllerServer
	*plugin
}

func (s controllerServer) ControllerGetCapabilities(context.Context, *csi.ControllerGetCapabilitiesRequest) (*csi.ControllerGetCapabilitiesResponse, error) {
	r := &csi.ControllerGetCapabilitiesResponse{}
	for _, t := range []csi.ControllerServiceCapability_RPC_Type{
		csi.ControllerServiceCapability_RPC_CREATE_DELETE_VOLUME,
		csi.ControllerServiceCapability_RPC_LIST_VOLUMES,
		csi.ControllerServiceCapability_RPC_GET_VOLUME,
		csi.ControllerServiceCapability_RPC_GET_CAPACITY,
		csi.ControllerServiceCapability_RPC_CREATE_DELETE_SNAPSHOT,
		csi.ControllerServiceCapability_RPC_LIST_SNAPSHOTS,
		csi.ControllerServiceCapability_RPC_GET_SNAPSHOT,
		csi.ControllerServiceCapability_RPC_SINGLE_NODE_MULTI_WRITER,
		csi.ControllerServiceCapability_RPC_GET_VOLUME_HEALTH,
	} {
		r.Capabilities = append(r.Capabilities, &csi.ControllerServiceCapability{
			Type: &csi.ControllerServiceCapability_Rpc{Rpc: &csi.ControllerServiceCapability_RPC{Type: t}},
		})
	}
	return r, nil
}

// topology is where this node's volumes are accessible from.
func (p *plugin) topology() *csi.Topology {
	return &csi.Topology{Segments: map[string]string{TopologyKey: p.cfg.NodeID}}
}

// matches tells whether this node is part of a topology.
func (p *plugin) matches(t *csi.Topology) bool {
	for k, v := range t.GetSegments() {
		if k != TopologyKey || v != p.cfg.NodeID {
			return false
		}
	}
	return true
}

// checkTopology makes sure that a volume of this node is what is asked for. What
// is merely preferred cannot change where we are.
func (p *plugin) checkTopology(r *csi.TopologyRequirement) error {
	if len(r.GetRequisite()) == 0 {
		return nil
	}
	for _, t := range r.GetRequisite() {
		if p.matches(t) {
			return nil
		}
	}
	return fmt.Errorf("%w: node %s is not in the required topology", errElsewhere, p.cfg.NodeID)
}

func (s controllerServer) GetCapacity(_ context.Context, req *csi.GetCapacityRequest) (*csi.GetCapacityResponse, error) {
	if _, err := parseVolumeParameters(req.GetParameters()); err != nil {
		return nil, err
	}
	for _, c := range req.GetVolumeCapabilities() {
		_, err := parseAccess(c)
		if errors.Is(err, errUnsupported) {
			return &csi.GetCapacityResponse{}, nil // there will never be any
		}
		if err != nil {
			return nil, err
		}
	}
	if !s.matches(req.GetAccessibleTopology()) {
		return &csi.GetCapacityResponse{}, nil
	}
	free, _, err := s.volumes.Capacity()
	if err != nil {
		return nil, err
	}
	return &csi.GetCapacityResponse{AvailableCapacity: free / bs * bs}, nil
}
