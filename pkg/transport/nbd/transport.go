package nbd

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"

	"github.com/snapmerge/snapmerge/pkg/transport"
)

const (
	// connections of a device. A process that adopts one must know how many there
	// are.
	connections = 4
	// pollDead is how often to ask whether the driver has noticed that a connection
	// is dead.
	pollDead = 5 * time.Millisecond
)

// Transport is the transport "nbd". It implements transport.Transport.
type Transport struct {
	records transport.Records
	devices transport.Registry
}

var _ transport.Transport = (*Transport)(nil)

// New makes the transport. Files in dir, which is made when it is needed, say
// which device is whose; dir must be the same for the next process and no other.
func New(dir string) *Transport { return &Transport{records: transport.Records{Dir: dir}} }

// Name is "nbd".
func (t *Transport) Name() string { return "nbd" }

// Create makes a device. The size of the backend must be a multiple of 4096.
func (t *Transport) Create(ctx context.Context, volume string, b transport.Backend, o transport.Options) (transport.Device, error) {
	return t.devices.Make("nbd: create", volume, b, func() (transport.Device, error) { return t.create(ctx, volume, b, o) })
}

func (t *Transport) create(ctx context.Context, volume string, b transport.Backend, o transport.Options) (_ *device, err error) {
	if _, _, found, err := t.find(volume); err != nil {
		return nil, err
	} else if found {
		return nil, transport.ErrLeftover
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	d := t.newDevice(volume, transport.NewTag(), b, o.ReadOnly)
	if err := t.records.Put(volume, d.tag); err != nil {
		return nil, err
	}
	if err := d.connect(); err != nil {
		return nil, errors.Join(err, t.records.Drop(volume))
	}
	if err := d.inService(); err != nil {
		return nil, errors.Join(err, d.Abort())
	}
	return d, nil
}

// Adopt serves on where an earlier process was killed. It waits, within ctx,
// until that process has let go of its connections. A backend that is smaller than
// the device is served all the same: requests beyond its end fail.
func (t *Transport) Adopt(ctx context.Context, volume string, b transport.Backend) (transport.Device, error) {
	return t.devices.Make("nbd: adopt", volume, b, func() (transport.Device, error) { return t.adopt(ctx, volume, b) })
}

func (t *Transport) adopt(ctx context.Context, volume string, b transport.Backend) (_ *device, err error) {
	tag, index, found, err := t.find(volume)
	if err != nil {
		return nil, err
	}
	if !found {
		return nil, transport.ErrNotFound
	}
	ro, err := attribute(index, "ro")
	if err != nil {
		return nil, err
	}
	d := t.newDevice(volume, tag, b, ro == "1")
	d.index = index
	if err := d.reconnectAll(ctx); err != nil {
		return nil, err // the next one may adopt it
	}
	if err := d.inService(); err != nil {
		return nil, errors.Join(err, d.Abort())
	}
	if err := d.Resize(); err != nil {
		// The guest's requests matter more than this.
		klog.ErrorS(err, "Adopted a device whose size is not the volume's", "volume", volume, "device", d.Path())
	}
	return d, nil
}

// find returns the device of the volume, if there is one. A record without a
// device is dropped.
func (t *Transport) find(volume string) (tag uint64, index uint32, found bool, err error) {
	tag, err = t.records.Get(volume)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, 0, false, nil
	}
	if err != nil {
		return 0, 0, false, err
	}
	devices, err := devicesByTag()
	if err != nil {
		return 0, 0, false, err
	}
	index, found = devices[identifier(tag)]
	if !found {
		err = t.records.Drop(volume)
	}
	return tag, index, found, err
}

// Leftovers lists the volumes that have devices which this process does not
// serve.
func (t *Transport) Leftovers(context.Context) ([]string, error) {
	recs, badFiles := t.records.List()
	devices, err := devicesByTag()
	if err != nil {
		return nil, fmt.Errorf("nbd: leftovers: %w", err)
	}
	var volumes []string
	for _, r := range recs {
		if _, exists := devices[identifier(r.Tag)]; exists && !t.devices.Has(r.Volume) {
			volumes = append(volumes, r.Volume)
		}
	}
	if badFiles != nil {
		badFiles = fmt.Errorf("nbd: leftovers: %w", badFiles)
	}
	return volumes, badFiles
}

// Discard has nothing to do: a device without a server is a leftover one until the
// driver gives it up, and nothing is left of it then.
func (t *Transport) Discard([]string) error { return nil }

// Probe makes a small device, reads it and takes it away again.
func (t *Transport) Probe() error {
	dir, err := os.MkdirTemp("", "snapmerge-nbd-")
	if err != nil {
		return fmt.Errorf("nbd: %w", err)
	}
	defer os.RemoveAll(dir)
	err = transport.Try(func(ctx context.Context, b transport.Backend, o transport.Options) (transport.Device, error) {
		return New(dir).create(ctx, "probe", b, o)
	})
	if err != nil {
		return fmt.Errorf("nbd: %w", err)
	}
	return nil
}

// SurvivesRestart is nil: the driver keeps devices without a server.
func (t *Transport) SurvivesRestart() error { return nil }

// fdsPerVolume is what a volume needs in this process: its connections, twice while
// they are made, and its files.
const fdsPerVolume = 2*connections + 8

// MaxVolumes is how many devices this process could have at a time, bounded by
// descriptors; the driver makes devices as they are needed.
func (t *Transport) MaxVolumes() (int64, error) { return transport.FilesFor(fdsPerVolume) }

// reconnectTime bounds the reconnection of a device in service.
const reconnectTime = 30 * time.Second

// errNotTaken says that the driver has no dead connection for a new socket.
var errNotTaken = errors.New("another process serves the device")

// reconnect gives the driver one new connection in place of a dead one, and waits
// within ctx until there is a dead one.
func (d *device) reconnect(ctx context.Context) (*net.UnixConn, error) {
	for {
		ours, theirs, err := pair()
		if err != nil {
			return nil, err
		}
		err = reconfigure(d.index, d.tag, 0, theirs)
		theirs.Close()
		if err == nil && taken(ours) {
			return ours, nil
		}
		ours.Close()
		if err != nil {
			return nil, err
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("%w: %w", errNotTaken, ctx.Err())
		case <-time.After(pollDead):
		}
	}
}

// makeNode makes sure that the device's node is there.
func makeNode(index uint32) error {
	return transport.MakeNode(blockPath(index), blockDir(index), unix.S_IFBLK)
}
