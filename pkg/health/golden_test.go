package health

import (
	"bytes"
	"flag"
	"os"
	"path/filepath"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/protobuf/proto"

	"github.com/snapmerge/snapmerge/pkg/volume"
)

var update = flag.Bool("update", false, "write testdata anew")

// TestGolden keeps replies as they are on the wire. The module test/csi112 reads
// them with the types of CSI 1.12, this test with those of 1.13.
func TestGolden(t *testing.T) {
	stats := func(s volume.Status) proto.Message {
		r := &csi.NodeGetVolumeStatsResponse{Usage: []*csi.VolumeUsage{{Unit: csi.VolumeUsage_BYTES, Total: 7}}}
		SetCondition(r, ConditionOf(s))
		return r
	}
	for name, m := range map[string]proto.Message{
		"merging.pb": stats(volume.Status{State: volume.Merging, Percent: 25, BytesDone: 1 << 30, BytesTotal: 4 << 30, RateMiB: 51.2, ETASeconds: 61}),
		"stalled.pb": stats(volume.Status{State: volume.Stalled, Percent: 25, BytesDone: 1, BytesTotal: 4, ETASeconds: -1, Error: "no space left on device"}),
		"capability.pb": &csi.NodeGetCapabilitiesResponse{Capabilities: []*csi.NodeServiceCapability{
			{Type: &csi.NodeServiceCapability_Rpc{Rpc: &csi.NodeServiceCapability_RPC{Type: NodeCapability}}}}},
	} {
		got, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		path := filepath.Join("testdata", name)
		if *update {
			if err := os.WriteFile(path, got, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, want) {
			t.Errorf("%s is not what the driver sends (go test -run TestGolden -update):\n%x\n%x", name, want, got)
		}
		back := m.ProtoReflect().New().Interface()
		if err := proto.Unmarshal(want, back); err != nil || !proto.Equal(back, m) {
			t.Errorf("%s with the types of 1.13: %v, %v", name, back, err)
		}
	}
	// The other way: what 1.12 would send is no mystery to GetCondition.
	b, err := os.ReadFile("testdata/stalled.pb")
	if err != nil {
		t.Fatal(err)
	}
	r := &csi.NodeGetVolumeStatsResponse{}
	if err := proto.Unmarshal(b, r); err != nil {
		t.Fatal(err)
	}
	if c, err := GetCondition(r); err != nil || !c.Abnormal {
		t.Errorf("%+v, %v", c, err)
	}
}
