package localnode

import (
	"context"
	"fmt"
	"time"

	csi "github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

// Client speaks CSI to a node plugin.
type Client struct {
	csi.IdentityClient
	csi.ControllerClient
	csi.NodeClient
	conn *grpc.ClientConn
}

// Dial makes a client of the plugin at the socket path, which need not be there yet.
func Dial(socket string) (*Client, error) {
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, err
	}
	return &Client{csi.NewIdentityClient(conn), csi.NewControllerClient(conn), csi.NewNodeClient(conn), conn}, nil
}

// Close ends the connection.
func (c *Client) Close() error { return c.conn.Close() }

// WaitReady waits until the plugin answers, or its process ends.
func (c *Client) WaitReady(ctx context.Context, p *Process) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	for {
		c.conn.ResetConnectBackoff()
		r, err := c.Probe(ctx, &csi.ProbeRequest{}, grpc.WaitForReady(false))
		if err == nil && (r.GetReady() == nil || r.GetReady().GetValue()) {
			return nil
		}
		select {
		case <-p.done:
			return fmt.Errorf("node plugin ended: %v", p.err)
		case <-ctx.Done():
			return fmt.Errorf("node plugin does not get ready: %v", err)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// Ext4 is the capability of a volume that one pod has mounted.
func Ext4() *csi.VolumeCapability {
	return &csi.VolumeCapability{
		AccessMode: singleWriter(),
		AccessType: &csi.VolumeCapability_Mount{Mount: &csi.VolumeCapability_MountVolume{FsType: "ext4"}},
	}
}

// Block is the capability of a volume that one pod has as a block device.
func Block() *csi.VolumeCapability {
	return &csi.VolumeCapability{
		AccessMode: singleWriter(),
		AccessType: &csi.VolumeCapability_Block{Block: &csi.VolumeCapability_BlockVolume{}},
	}
}

func singleWriter() *csi.VolumeCapability_AccessMode {
	return &csi.VolumeCapability_AccessMode{Mode: csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER}
}

// FromSnapshot is the content source of a volume that is restored from the snapshot.
func FromSnapshot(id string) *csi.VolumeContentSource {
	return &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Snapshot{
		Snapshot: &csi.VolumeContentSource_SnapshotSource{SnapshotId: id}}}
}
