package fuseloop

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"

	"k8s.io/klog/v2"

	"github.com/snapmerge/snapmerge/pkg/keeper"
	"github.com/snapmerge/snapmerge/pkg/transport"
)

// keyPrefix is that of our keys in the keeper; the volume id follows.
const keyPrefix = "fuse/"

// Transport is the transport "fuse". It implements transport.Transport.
type Transport struct {
	keeper  *keeper.Client // nil: devices die with this process
	within  string         // see Within
	devices transport.Registry
}

var _ transport.Transport = (*Transport)(nil)

// New makes the transport. k is the keeper that holds the devices over a
// restart of this process, or nil.
func New(k *keeper.Client) *Transport {
	return &Transport{keeper: k}
}

// Within has the transport know only devices that were made within the same
// directory, which is where the volumes are kept. Loop devices are the machine's:
// another node plugin, in another container perhaps, may have a volume of the same
// id. The directory must be there when the first device is made.
func (t *Transport) Within(dir string) *Transport {
	t.within = dir
	return t
}

// unique is a name of the volume that no other node plugin has.
func (t *Transport) unique(volume string) string { return transport.Unique(t.within, volume) }

// Name is "fuse".
func (t *Transport) Name() string { return "fuse" }

// meta is what the keeper keeps beside the descriptors, which are /dev/fuse and
// the mount.
type meta struct {
	Version  int    `json:"version"` // metaVersion
	Conn     uint32 `json:"conn"`    // number of the connection in fusectl
	Resend   bool   `json:"resend"`  // the kernel can send requests again
	ReadOnly bool   `json:"readOnly"`
	Loop     int    `json:"loop"` // index of the loop device, once Tag is found there
	Tag      string `json:"tag"`
}

const metaVersion = 1

// Create makes a device. The size of the backend must be a multiple of 4096.
func (t *Transport) Create(ctx context.Context, volume string, b transport.Backend, o transport.Options) (transport.Device, error) {
	return t.devices.Make("fuse: create", volume, b, func() (transport.Device, error) { return t.create(ctx, volume, b, o) })
}

func (t *Transport) create(ctx context.Context, volume string, b transport.Backend, o transport.Options) (_ *device, err error) {
	if t.keeper != nil {
		held, err := t.keeper.Holds(ctx, keyPrefix+volume)
		if err != nil {
			return nil, err
		}
		if held {
			return nil, transport.ErrLeftover
		}
	}
	if err := t.discardStale([]string{volume}); err != nil {
		return nil, err
	}
	d := newDevice(t, volume, newServer(fileName(t.unique(volume)), b, o.ReadOnly))
	if o.Base != nil && !o.ReadOnly {
		d.base = o.Base
		d.srv.want |= featPassthrough
	}
	if d.conn, err = openConn(); err != nil {
		return nil, err
	}
	d.startReaders()
	if err := d.attach(ctx); err != nil {
		d.giveUp()
		return nil, err
	}
	go d.watch()
	return d, nil
}

// discardStale detaches what is left of devices that died with their process.
func (t *Transport) discardStale(volumes []string) error {
	var names []string
	for _, v := range volumes {
		names = append(names, t.unique(v))
	}
	stale, err := staleLoops(names...)
	if err != nil {
		return err
	}
	for _, l := range stale {
		busy, err := l.discard()
		if err != nil {
			return err
		}
		klog.InfoS("Detached the dead device of an earlier process", "device", l.path(), "inUse", busy)
	}
	return nil
}

// Discard detaches loop devices of the volumes whose server is gone.
func (t *Transport) Discard(volumes []string) error {
	if err := t.discardStale(volumes); err != nil {
		return fmt.Errorf("fuse: discard dead devices: %w", err)
	}
	return nil
}

// Adopt serves on where an earlier process was killed. On a kernel without
// FUSE_NOTIFY_RESEND (before 6.9) the requests that the dead process had read
// would never end; there Adopt aborts the device instead, so that what is in
// flight fails with EIO, and returns an error that says so. A backend that is
// smaller than the device is served all the same: requests beyond its end fail.
func (t *Transport) Adopt(ctx context.Context, volume string, b transport.Backend) (transport.Device, error) {
	if t.keeper == nil {
		return nil, fmt.Errorf("fuse: adopt device of volume %q: %w", volume, transport.ErrNotFound)
	}
	return t.devices.Make("fuse: adopt", volume, b, func() (transport.Device, error) { return t.adopt(ctx, volume, b) })
}

func (t *Transport) adopt(ctx context.Context, volume string, b transport.Backend) (_ *device, err error) {
	raw, fds, err := t.keeper.Get(ctx, keyPrefix+volume)
	if errors.Is(err, keeper.ErrNotFound) {
		return nil, transport.ErrNotFound
	}
	if err != nil {
		return nil, err
	}
	m, err := parseMeta(raw, len(fds))
	if err != nil {
		keeper.CloseAll(fds)
		return nil, err
	}
	name, _ := fileOf(m.Tag)
	d := newDevice(t, volume, newServer(name, b, m.ReadOnly))
	d.conn = conn{fuse: fds[0], mount: fds[1], id: m.Conn}
	d.loop = loopDev{m.Loop, m.Tag}
	if err := d.takeOver(ctx, m); err != nil {
		return nil, err
	}
	go d.watch()
	return d, nil
}

func parseMeta(raw []byte, fds int) (meta, error) {
	var m meta
	if err := json.Unmarshal(raw, &m); err != nil {
		return m, fmt.Errorf("keeper's entry: %w", err)
	}
	if _, ok := fileOf(m.Tag); !ok || m.Version != metaVersion || fds != 2 || m.Loop < 0 {
		return m, fmt.Errorf("keeper's entry of version %d with %d descriptors is not ours: %s", m.Version, fds, raw)
	}
	return m, nil
}

// Leftovers lists the volumes that the keeper has devices of and this process
// does not serve.
func (t *Transport) Leftovers(ctx context.Context) ([]string, error) {
	if t.keeper == nil {
		return nil, nil
	}
	keys, err := t.keeper.List(ctx)
	if err != nil {
		return nil, fmt.Errorf("fuse: leftovers: %w", err)
	}
	return t.devices.Unserved(keys, keyPrefix), nil
}
