package driver

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/container-storage-interface/spec/lib/go/csi"
)

const (
	ext4 = "ext4"
	xfs  = "xfs"
	// defaultFS is made where nobody asks for any.
	defaultFS = ext4
)

// Smallest volumes with a file system, in bytes.
var minSize = map[string]int64{
	ext4: 1 << 20,
	xfs:  300 << 20, // what mkfs.xfs demands
}

// access is a volume capability that the driver can meet.
type access struct {
	mode  csi.VolumeCapability_AccessMode_Mode
	block bool
	// fsType is "" if none was asked for, and for block.
	fsType string
	flags  []string // of the mount, without ro
	ro     bool     // it was among them
}

var modes = []csi.VolumeCapability_AccessMode_Mode{
	csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER,
	csi.VolumeCapability_AccessMode_SINGLE_NODE_SINGLE_WRITER,
	csi.VolumeCapability_AccessMode_SINGLE_NODE_MULTI_WRITER,
	csi.VolumeCapability_AccessMode_SINGLE_NODE_READER_ONLY,
	// Many readers, all of them on this node: topology sees to that.
	csi.VolumeCapability_AccessMode_MULTI_NODE_READER_ONLY,
}

// errUnsupported is wrapped by errInvalid where it must not be asked for.
var errUnsupported = errors.New("volume capability is not supported")

// parseAccess reads a volume capability. A malformed one gives errInvalid, one
// that the driver cannot meet errUnsupported.
func parseAccess(c *csi.VolumeCapability) (access, error) {
	a := access{mode: c.GetAccessMode().GetMode()}
	switch t := c.GetAccessType().(type) {
	case *csi.VolumeCapability_Block:
		a.block = true
	case *csi.VolumeCapability_Mount:
		if t.Mount != nil {
			a.fsType = t.Mount.FsType
			a.ro = slices.Contains(t.Mount.MountFlags, "ro")
			a.flags = slices.DeleteFunc(slices.Clone(t.Mount.MountFlags), func(f string) bool { return f == "ro" })
			if t.Mount.VolumeMountGroup != "" {
				return a, fmt.Errorf("%w: volume_mount_group", errUnsupported)
			}
		}
	default:
		return a, invalid("volume capability has neither block nor mount")
	}
	if a.mode == csi.VolumeCapability_AccessMode_UNKNOWN {
		return a, invalid("volume capability has no access mode")
	}
	if !slices.Contains(modes, a.mode) {
		return a, fmt.Errorf("%w: access mode %s; volumes live on one node", errUnsupported, a.mode)
	}
	if a.fsType != "" && minSize[a.fsType] == 0 {
		return a, fmt.Errorf("%w: file system %q; there are %s and %s", errUnsupported, a.fsType, ext4, xfs)
	}
	for _, f := range a.flags {
		if f == "" || strings.ContainsAny(f, "\x00\n") {
			return a, invalid("mount flag %q", f)
		}
	}
	return a, nil
}

// parseAll reads the capabilities of a request, at least one.
func parseAll(caps []*csi.VolumeCapability) ([]access, error) {
	if len(caps) == 0 {
		return nil, invalid("volume capabilities are missing")
	}
	var all []access
	for i, c := range caps {
		a, err := parseAccess(c)
		if err != nil {
			return nil, fmt.Errorf("volume capability %d: %w", i, err)
		}
		all = append(all, a)
	}
	return all, nil
}

// asked makes errUnsupported the caller's mistake.
func asked(err error) error {
	if errors.Is(err, errUnsupported) {
		return fmt.Errorf("%w: %w", errInvalid, err)
	}
	return err
}

// exceeds makes errUnsupported a matter of the volume, which cannot be used in that way
// (CSI specification, errors of NodeStageVolume and NodePublishVolume).
func exceeds(err error) error {
	if errors.Is(err, errUnsupported) {
		return fmt.Errorf("%w: %w", errState, err)
	}
	return err
}

// readOnly tells whether there is to be no writer.
func (a access) readOnly() bool {
	return a.ro || a.mode == csi.VolumeCapability_AccessMode_SINGLE_NODE_READER_ONLY ||
		a.mode == csi.VolumeCapability_AccessMode_MULTI_NODE_READER_ONLY
}

// single tells whether there may be one publication at a time.
func (a access) single() bool {
	return a.mode == csi.VolumeCapability_AccessMode_SINGLE_NODE_SINGLE_WRITER
}
