// Package csi112 reads what the driver answers with the types of CSI 1.12, as
// kubelets up to 1.36 do. The replies are those that package health's test keeps
// in its testdata and compares with what the driver sends now.
package csi112

import (
	"os"
	"strings"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/protobuf/proto"
)

func read(t *testing.T, name string, m proto.Message) {
	t.Helper()
	b, err := os.ReadFile("../../pkg/health/testdata/" + name)
	if err != nil {
		t.Fatal(err)
	}
	if err := proto.Unmarshal(b, m); err != nil {
		t.Fatal(err)
	}
}

func TestStats(t *testing.T) {
	for name, want := range map[string]struct {
		abnormal bool
		message  string
	}{
		"merging.pb": {false, "merging, merge at 25.0 % (1.0 GiB of 4.0 GiB, 51.2 MiB/s, 1m1s left)"},
		"stalled.pb": {true, "MergeStalled: no space left on device; stalled, merge at 25.0 %"},
	} {
		var r csi.NodeGetVolumeStatsResponse
		read(t, name, &r)
		c := r.GetVolumeCondition()
		if c == nil || c.GetAbnormal() != want.abnormal || !strings.HasPrefix(c.GetMessage(), want.message) {
			t.Errorf("%s: condition %v, want %+v", name, c, want)
		}
		if u := r.GetUsage(); len(u) != 1 || u[0].GetTotal() != 7 || u[0].GetUnit() != csi.VolumeUsage_BYTES {
			t.Errorf("%s: usage %v", name, u)
		}
		if len(r.ProtoReflect().GetUnknown()) > 0 {
			t.Errorf("%s: fields that 1.12 does not know", name)
		}
	}
}

func TestCapability(t *testing.T) {
	var r csi.NodeGetCapabilitiesResponse
	read(t, "capability.pb", &r)
	if len(r.GetCapabilities()) != 1 || r.GetCapabilities()[0].GetRpc().GetType() != csi.NodeServiceCapability_RPC_VOLUME_CONDITION {
		t.Errorf("capabilities %v", r.GetCapabilities())
	}
}
