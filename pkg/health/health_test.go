package health

import (
	"strings"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/protobuf/proto"

	"github.com/snapmerge/snapmerge/pkg/volume"
)

func TestTroubles(t *testing.T) {
	const (
		degraded     = csi.VolumeHealthErrorType_DEGRADED
		inaccessible = csi.VolumeHealthErrorType_INACCESSIBLE
		loss         = csi.VolumeHealthErrorType_DATA_LOSS
	)
	type trouble struct {
		status csi.VolumeHealthErrorType
		reason string
	}
	for _, c := range []struct {
		name   string
		status volume.Status
		want   []trouble
	}{
		{"staged", volume.Status{State: volume.Staged}, nil},
		{"merging", volume.Status{State: volume.Merging, Percent: 40}, nil},
		// A first failure that is tried again is no trouble yet.
		{"merging after a failure", volume.Status{State: volume.Merging, Error: "EIO"}, nil},
		{"paused", volume.Status{State: volume.Paused}, nil},
		{"stalled", volume.Status{State: volume.Stalled, Error: "ENOSPC"}, []trouble{{degraded, "MergeStalled"}}},
		{"failed", volume.Status{State: volume.Failed, Error: "EIO"}, []trouble{{degraded, "MergeFailed"}}},
		{"corrupt", volume.Status{State: volume.Failed, Corrupt: true, Error: "bad sum"}, []trouble{{loss, "SnapshotCorrupt"}}},
		{"device down", volume.Status{State: volume.Staged, DeviceDown: true}, []trouble{{inaccessible, "TransportDown"}}},
		{"all at once", volume.Status{State: volume.Failed, DeviceDown: true, Corrupt: true},
			[]trouble{{loss, "SnapshotCorrupt"}, {inaccessible, "TransportDown"}}},
		{"stalled and down", volume.Status{State: volume.Stalled, DeviceDown: true},
			[]trouble{{inaccessible, "TransportDown"}, {degraded, "MergeStalled"}}},
	} {
		t.Run(c.name, func(t *testing.T) {
			got := Troubles(c.status)
			if len(got) != len(c.want) {
				t.Fatalf("%d troubles, want %d: %v", len(got), len(c.want), got)
			}
			for i, w := range c.want {
				if got[i].Status != w.status || got[i].Reason != w.reason || got[i].Message != c.status.Error {
					t.Errorf("trouble %d is %v, want %v and %q", i, got[i], w, c.status.Error)
				}
			}
			if abnormal := ConditionOf(c.status).Abnormal; abnormal != (len(c.want) > 0) {
				t.Errorf("abnormal %v with %d troubles", abnormal, len(c.want))
			}
		})
	}
}

func TestConditionMessage(t *testing.T) {
	for _, c := range []struct {
		status volume.Status
		want   string
	}{
		{volume.Status{State: volume.Staged, Percent: 100}, "staged, merge at 100.0 %"},
		{volume.Status{State: volume.Merged, Percent: 100, BytesDone: 5, BytesTotal: 5}, "merged, merge at 100.0 %"},
		{volume.Status{State: volume.Merging, Percent: 25, BytesDone: 1 << 30, BytesTotal: 4 << 30, RateMiB: 51.2, ETASeconds: 61},
			"merging, merge at 25.0 % (1.0 GiB of 4.0 GiB, 51.2 MiB/s, 1m1s left)"},
		{volume.Status{State: volume.Merging, BytesTotal: 4 << 30, ETASeconds: -1}, "merging, merge at 0.0 % (0 B of 4.0 GiB)"},
		{volume.Status{State: volume.Stalled, Percent: 25, BytesDone: 1, BytesTotal: 4, ETASeconds: -1, Error: "no space"},
			"MergeStalled: no space; stalled, merge at 25.0 % (1 B of 4 B)"},
	} {
		if got := ConditionOf(c.status).Message; got != c.want {
			t.Errorf("%+v:\n got %q\nwant %q", c.status, got, c.want)
		}
	}
}

func TestConditionOnTheWire(t *testing.T) {
	for _, want := range []Condition{
		{},
		{Message: "merging"},
		{Abnormal: true, Message: strings.Repeat("long ", 1000)},
	} {
		r := &csi.NodeGetVolumeStatsResponse{Usage: []*csi.VolumeUsage{{Unit: csi.VolumeUsage_BYTES, Total: 7}}}
		SetCondition(r, want)
		raw, err := proto.Marshal(r)
		if err != nil {
			t.Fatal(err)
		}
		back := &csi.NodeGetVolumeStatsResponse{}
		if err := proto.Unmarshal(raw, back); err != nil {
			t.Fatal(err)
		}
		if got, err := GetCondition(back); err != nil || got != want {
			t.Errorf("%+v, %v; want %+v", got, err, want)
		}
		if back.Usage[0].Total != 7 {
			t.Error("usage is lost")
		}
	}
	if c, err := GetCondition(&csi.NodeGetVolumeStatsResponse{}); err == nil {
		t.Errorf("condition %v of a reply without one", c)
	}
}

// TestNamesOfAnyBytes: an error may name a file whose name is no UTF-8, which
// protobuf would refuse to send.
func TestNamesOfAnyBytes(t *testing.T) {
	s := volume.Status{ID: "v", State: volume.Failed, Error: "open \xff: no such file"}
	if _, err := proto.Marshal(HealthOf(s)); err != nil {
		t.Error(err)
	}
	r := &csi.NodeGetVolumeStatsResponse{}
	SetCondition(r, ConditionOf(s))
	if c, err := GetCondition(r); err != nil || !strings.Contains(c.Message, "open ?: no such file") {
		t.Errorf("%+v, %v", c, err)
	}
}
