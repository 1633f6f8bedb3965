// Package health tells in CSI's words how a volume is: as the VolumeCondition of
// the versions before 1.13, which kubelets up to 1.36 read, and as the list of
// troubles that came with 1.13.
package health

import (
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/dustin/go-humanize"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/snapmerge/snapmerge/pkg/volume"
)

// Reasons are stable: alerts and scripts compare them.
const (
	MergeStalled    = "MergeStalled"    // DEGRADED: goes on when something outside has changed, such as free space, or gets nothing done
	MergeFailed     = "MergeFailed"     // DEGRADED: fails again and again
	TransportDown   = "TransportDown"   // INACCESSIBLE: the device is dead, gone or does not answer
	SnapshotCorrupt = "SnapshotCorrupt" // DATA_LOSS: data is damaged
)

// Troubles are the adverse states of a volume, the worst first; none if there
// is nothing to worry about.
func Troubles(s volume.Status) []*csi.VolumeHealth_VolumeHealthEntry {
	var out []*csi.VolumeHealth_VolumeHealthEntry
	add := func(status csi.VolumeHealthErrorType, reason string) {
		out = append(out, &csi.VolumeHealth_VolumeHealthEntry{Status: status, Reason: reason, Message: text(s.Error)})
	}
	if s.Corrupt {
		add(csi.VolumeHealthErrorType_DATA_LOSS, SnapshotCorrupt)
	}
	if s.DeviceDown {
		add(csi.VolumeHealthErrorType_INACCESSIBLE, TransportDown)
	}
	switch {
	case s.State == volume.Stalled:
		add(csi.VolumeHealthErrorType_DEGRADED, MergeStalled)
	case s.State == volume.Failed && !s.Corrupt:
		add(csi.VolumeHealthErrorType_DEGRADED, MergeFailed)
	}
	return out
}

// Condition is the VolumeCondition of CSI 1.12 and before.
type Condition struct {
	Abnormal bool
	Message  string
}

// ConditionOf tells the state and the percentage of the merge always, and what is
// wrong if anything is; only that makes it abnormal.
func ConditionOf(s volume.Status) Condition {
	var wrong []string
	for _, t := range Troubles(s) {
		wrong = append(wrong, t.Reason)
	}
	if len(wrong) == 0 {
		return Condition{Message: progress(s)}
	}
	return Condition{Abnormal: true, Message: fmt.Sprintf("%s: %s; %s", strings.Join(wrong, ", "), s.Error, progress(s))}
}

// text is s as protobuf takes it: names of files may be any bytes.
func text(s string) string { return strings.ToValidUTF8(s, "?") }

// progress is the state of the merge in a line.
func progress(s volume.Status) string {
	b := &strings.Builder{}
	fmt.Fprintf(b, "%s, merge at %.1f %%", s.State, s.Percent)
	if s.BytesDone < s.BytesTotal {
		fmt.Fprintf(b, " (%s of %s", humanize.IBytes(uint64(s.BytesDone)), humanize.IBytes(uint64(s.BytesTotal)))
		if s.RateMiB > 0 {
			fmt.Fprintf(b, ", %.1f MiB/s", s.RateMiB)
		}
		if s.Yielding {
			b.WriteString(", yields to the pods")
		}
		if s.ETASeconds > 0 {
			fmt.Fprintf(b, ", %s left", time.Duration(s.ETASeconds)*time.Second)
		}
		b.WriteByte(')')
	}
	return b.String()
}

// The fields of CSI 1.12 that 1.13 does not have any more.
const (
	// NodeCapability is the number that VOLUME_CONDITION had among the node's
	// capabilities.
	NodeCapability = csi.NodeServiceCapability_RPC_Type(4)

	statsField    = 2 // volume_condition of NodeGetVolumeStatsResponse
	abnormalField = 1 // of VolumeCondition, a bool
	messageField  = 2 // of VolumeCondition, a string
)

var errNoCondition = errors.New("no volume condition in the reply")

// SetCondition adds the condition to a reply of NodeGetVolumeStats, where the
// kubelets that know the field find it.
func SetCondition(r *csi.NodeGetVolumeStatsResponse, c Condition) {
	var msg []byte
	msg = protowire.AppendTag(msg, abnormalField, protowire.VarintType)
	msg = protowire.AppendVarint(msg, protowire.EncodeBool(c.Abnormal))
	msg = protowire.AppendTag(msg, messageField, protowire.BytesType)
	msg = protowire.AppendString(msg, text(c.Message))
	raw := protowire.AppendTag(nil, statsField, protowire.BytesType)
	r.ProtoReflect().SetUnknown(protowire.AppendBytes(raw, msg))
}

// GetCondition reads what SetCondition has added, after any way through the
// wire.
func GetCondition(r *csi.NodeGetVolumeStatsResponse) (Condition, error) {
	raw := r.ProtoReflect().GetUnknown()
	num, typ, n := protowire.ConsumeTag(raw)
	if n < 0 || num != statsField || typ != protowire.BytesType {
		return Condition{}, errNoCondition
	}
	msg, n := protowire.ConsumeBytes(raw[n:])
	if n < 0 {
		return Condition{}, protowire.ParseError(n)
	}
	return parseCondition(msg)
}

func parseCondition(msg []byte) (c Condition, err error) {
	for len(msg) > 0 {
		num, typ, n := protowire.ConsumeTag(msg)
		if n < 0 {
			return c, protowire.ParseError(n)
		}
		msg = msg[n:]
		switch {
		case num == abnormalField && typ == protowire.VarintType:
			var v uint64
			v, n = protowire.ConsumeVarint(msg)
			c.Abnormal = protowire.DecodeBool(v)
		case num == messageField && typ == protowire.BytesType:
			c.Message, n = protowire.ConsumeString(msg)
		default:
			n = protowire.ConsumeFieldValue(num, typ, msg)
		}
		if n < 0 {
			return c, protowire.ParseError(n)
		}
		msg = msg[n:]
	}
	return c, nil
}

// HealthOf is the reply of CSI 1.13.
func HealthOf(s volume.Status) *csi.VolumeHealth {
	return &csi.VolumeHealth{VolumeId: s.ID, HealthStatuses: Troubles(s)}
}
