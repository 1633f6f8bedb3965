package driver

import (
	"fmt"
	"maps"
	"math"
	"slices"
	"strconv"
	"strings"

	"github.com/dustin/go-humanize"

	"github.com/snapmerge/snapmerge/pkg/cow"
	"github.com/snapmerge/snapmerge/pkg/readahead"
	"github.com/snapmerge/snapmerge/pkg/transport/choose"
	"github.com/snapmerge/snapmerge/pkg/volume"
)

// sidecarPrefix is that of parameters which are for the sidecars.
const sidecarPrefix = "csi.storage.k8s.io/"

// volumeParameters are a new volume's parameters.
type volumeParameters struct {
	rate      int // MiB/s, 0: the node's
	limits    volume.Limits
	readAhead string // "": the node's
	promotion string // "": the node's
}

// transportParameter is the parameter that the volume is staged with.
const transportParameter = "transport"

// snapshotsParameter says when snapshots of the volume can be made.
const (
	snapshotsParameter = "snapshots"
	snapshotsOnline    = "online"
	snapshotsOffline   = "offline"
)

// snapshotParameters are a new snapshot's parameters.
type snapshotParameters struct {
	compression string
}

// minLogLimit is the least limit of a write log, in bytes: a few segments.
const minLogLimit = 64 << 20

// maxRate is the highest merge rate in MiB/s: a tebibyte.
const maxRate = 1 << 20

// parameter is one of a class. All but set is what its documentation says.
type parameter[T any] struct {
	name, unit, initial, doc string
	set                      func(p *T, value string) error
}

// storageClass are the parameters of a StorageClass.
var storageClass = []parameter[volumeParameters]{
	{
		"mergeRate", "MiB/s", "the node plugin's `--merge-rate`",
		"The most that the background merge of the volume writes. 0 stands for the default. " +
			"Above `logSoftLimit` the merge goes as fast as it can all the same.",
		func(p *volumeParameters, value string) (err error) {
			p.rate, err = strconv.Atoi(value)
			if err != nil || p.rate < 0 || p.rate > maxRate {
				return fmt.Errorf("want a whole number from 0 to %d", maxRate)
			}
			return nil
		},
	},
	{
		"logSoftLimit", "size (bytes)", humanize.IBytes(uint64(volume.DefaultLimits.Soft)),
		"Disk space of the volume's write log above which the merge is not slowed down by anything, so that the log can shrink.",
		func(p *volumeParameters, value string) (err error) {
			p.limits.Soft, err = parseSize(value)
			return err
		},
	},
	{
		"logHardLimit", "size (bytes)", humanize.IBytes(uint64(volume.DefaultLimits.Hard)),
		"Disk space of the volume's write log above which writes of the pods are slowed down. At least `logSoftLimit`.",
		func(p *volumeParameters, value string) (err error) {
			p.limits.Hard, err = parseSize(value)
			return err
		},
	},
	{
		transportParameter, "`auto` or a transport", "the node plugin's `--transport`",
		"How the volume becomes a device: `" + strings.Join(choose.Names(), "`, `") + "`. " +
			"Where the node does not have it the volume cannot be staged.",
		func(_ *volumeParameters, value string) error {
			if value != choose.Auto && !slices.Contains(choose.Names(), value) {
				return fmt.Errorf("want auto, %s", strings.Join(choose.Names(), ", "))
			}
			return nil
		},
	},
	{
		"readAhead", "`none`, `sync` or `async`", "the node plugin's `--read-ahead`",
		"How data that is still to be merged is read ahead for pods that read in sequence: not at all, by the reader itself, or in the background.",
		func(p *volumeParameters, value string) error {
			_, err := readahead.ParseMode(value)
			p.readAhead = value
			return err
		},
	},
	{
		"readPromotion", "`on` or `off`", "the node plugin's `--read-promotion`",
		"`on` has data that pods read merged before the rest, so that it is read and written without detours the sooner.",
		func(p *volumeParameters, value string) (err error) {
			p.promotion, err = volume.ParsePromotion(value)
			return err
		},
	},
	{
		snapshotsParameter, "`online` or `offline`", "`online`",
		"`offline` allows reads and writes of a volume that is merged to go straight to its base file while it is staged, past the node plugin: " +
			"nearly as fast as the disk. Snapshots of it can then be made only while no pod uses it. It takes the transport `fuse` and kernel 6.9, " +
			"and has no effect where the node plugin hands volumes over to their base by device-mapper; see [transports](transports.md#passthrough).",
		func(_ *volumeParameters, value string) error {
			if value != snapshotsOnline && value != snapshotsOffline {
				return fmt.Errorf("want %s or %s", snapshotsOnline, snapshotsOffline)
			}
			return nil
		},
	},
}

// snapshotClass are the parameters of a VolumeSnapshotClass.
var snapshotClass = []parameter[snapshotParameters]{
	{
		"compression", "`none`, `lz4`, `zstd` or `zstd,LEVEL`", "`lz4`",
		"How the snapshot's data is packed. Levels of zstd are whole numbers up to 22; 3 if none is given. " +
			"Higher ones pack tighter and take longer to make; reading takes the same time.",
		func(p *snapshotParameters, value string) error {
			c, _, err := cow.ParseCompression(value)
			if err == nil && c != cow.None && c != cow.LZ4 && c != cow.Zstd {
				err = fmt.Errorf("want none, lz4 or zstd")
			}
			p.compression = value
			return err
		},
	},
}

// parseSize reads a size such as 512MiB, 4Gi or 1073741824.
func parseSize(value string) (int64, error) {
	n, err := humanize.ParseBytes(value)
	// Of a comma it takes no notice: 1,5GiB would be 15 GiB.
	if err != nil || strings.ContainsAny(value, "-,") || n > math.MaxInt64 {
		return 0, fmt.Errorf("want a size such as 512MiB")
	}
	if n < minLogLimit {
		return 0, fmt.Errorf("want at least %s", humanize.IBytes(minLogLimit))
	}
	return int64(n), nil
}

func parseVolumeParameters(given map[string]string) (volumeParameters, error) {
	p := volumeParameters{limits: volume.DefaultLimits}
	if err := apply(storageClass, &p, given); err != nil {
		return p, err
	}
	if p.limits.Hard < p.limits.Soft {
		return p, invalid("parameters: logHardLimit %s is less than logSoftLimit %s",
			humanize.IBytes(uint64(p.limits.Hard)), humanize.IBytes(uint64(p.limits.Soft)))
	}
	return p, nil
}

func parseSnapshotParameters(given map[string]string) (snapshotParameters, error) {
	p := snapshotParameters{compression: cow.LZ4.String()}
	return p, apply(snapshotClass, &p, given)
}

// apply sets p from what is given. A parameter that is not known would be a
// wish that nobody fulfils, so it is refused.
func apply[T any](known []parameter[T], p *T, given map[string]string) error {
	for _, key := range slices.Sorted(maps.Keys(own(given))) {
		i := slices.IndexFunc(known, func(k parameter[T]) bool { return k.name == key })
		if i < 0 {
			var names []string
			for _, k := range known {
				names = append(names, k.name)
			}
			return invalid("unknown parameter %q; there are %s", key, strings.Join(names, ", "))
		}
		if err := known[i].set(p, given[key]); err != nil {
			return invalid("parameter %s is %q: %v", key, given[key], err)
		}
	}
	return nil
}

// claimOf is what csi-provisioner tells of a new volume's claim, if it is run with
// --extra-create-metadata.
func claimOf(given map[string]string) volume.Claim {
	return volume.Claim{
		Namespace: given[sidecarPrefix+"pvc/namespace"], PVC: given[sidecarPrefix+"pvc/name"], PV: given[sidecarPrefix+"pv/name"],
	}
}

// own leaves out the sidecars' parameters.
func own(given map[string]string) map[string]string {
	mine := map[string]string{}
	for k, v := range given {
		if !strings.HasPrefix(k, sidecarPrefix) {
			mine[k] = v
		}
	}
	return mine
}
