package driver

import (
	"crypto/sha256"
	"encoding/hex"
	"strings"
	"unicode/utf8"

	"github.com/snapmerge/snapmerge/pkg/snapshot"
)

const (
	// Name is the driver's name.
	Name = "csi.snapmerge.io"
	// TopologyKey is the key of the one topology segment, whose value is the node
	// id.
	TopologyKey = "topology.csi.snapmerge.io/node"

	// maxName is CSI's limit for strings, in bytes.
	maxName = 128
	// maxSafe is the longest name that is used as it is, in bytes.
	maxSafe = 63

	volumePrefix   = "v-"
	snapshotPrefix = "s-"
	nodePrefix     = "n-"
)

// checkName checks a name that is asked for by CSI's rules.
func checkName(name string) error {
	switch {
	case name == "":
		return invalid("name is missing")
	case len(name) > maxName:
		return invalid("name of %d bytes, at most %d", len(name), maxName)
	case !utf8.ValidString(name):
		return invalid("name is not UTF-8")
	}
	for _, r := range name {
		if r < ' ' && r != '\t' && r != '\n' && r != '\r' || r >= 0x7f && r <= 0x9f {
			return invalid("name has the control character %U", r)
		}
	}
	return nil
}

// safe is name if it can be the name of a directory everywhere, else prefix and
// a hash of it.
func safe(prefix, name string) string {
	if len(name) <= maxSafe && snapshot.CheckID(name) == nil {
		return name
	}
	sum := sha256.Sum256([]byte(name))
	return prefix + hex.EncodeToString(sum[:16])
}

// volumeID is the id of the volume that is asked for by that name.
func volumeID(name string) string { return safe(volumePrefix, name) }

// snapshotID is CSI's id of a snapshot of this node's store.
func (p *plugin) snapshotID(id string) string { return id + "@" + safe(nodePrefix, p.cfg.NodeID) }

// splitSnapshotID takes a CSI snapshot id apart: the store's id, and whether it
// lies on this node. ok is false for what can be no snapshot's id of this driver.
func (p *plugin) splitSnapshotID(csiID string) (id string, here, ok bool) {
	id, node, ok := strings.Cut(csiID, "@")
	if !ok || snapshot.CheckID(id) != nil || node == "" {
		return "", false, false
	}
	return id, node == safe(nodePrefix, p.cfg.NodeID), true
}
