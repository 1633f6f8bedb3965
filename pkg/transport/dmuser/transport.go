package dmuser

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"

	"github.com/snapmerge/snapmerge/pkg/keeper"
	"github.com/snapmerge/snapmerge/pkg/transport"
)

const (
	// keyPrefix is that of our keys in the keeper; the volume id follows.
	keyPrefix = "dm-user/"
	// namePrefix is that of our devices; a hash of the volume and random digits
	// follow.
	namePrefix = "snapmerge-"

	// channels is how many requests of a device are carried out at a time. Those
	// and the two others are all the descriptors that a keeper takes under a key.
	channels = 6
	// pollLock is how often to ask whether an earlier process is gone.
	pollLock = 5 * time.Millisecond
)

// Transport is the transport "dm-user". It implements transport.Transport.
type Transport struct {
	keeper  *keeper.Client // nil: devices die with this process
	within  string         // see Within
	mapping mapping
	devices transport.Registry
}

var _ transport.Transport = (*Transport)(nil)

// New makes the transport. k is the keeper that holds the devices over a restart
// of this process, or nil.
func New(k *keeper.Client) *Transport { return &Transport{keeper: k, mapping: kernel{}} }

// Within has the transport know only devices that were made within the same
// directory, which is where the volumes are kept: see transport.Unique.
func (t *Transport) Within(dir string) *Transport {
	t.within = dir
	return t
}

// Name is "dm-user".
func (t *Transport) Name() string { return "dm-user" }

// meta is what the keeper keeps beside the descriptors, which are one that nobody
// reads, the memory of the channels, and the channels.
type meta struct {
	Version  int    `json:"version"` // metaVersion
	Name     string `json:"name"`    // of the device
	ReadOnly bool   `json:"readOnly"`
}

const metaVersion = 1

// prefix is how the names of a volume's devices begin.
func (t *Transport) prefix(volume string) string {
	h := sha256.Sum256([]byte(transport.Unique(t.within, volume)))
	return namePrefix + hex.EncodeToString(h[:8]) + "-"
}

// Create makes a device. The size of the backend must be a multiple of 4096.
func (t *Transport) Create(ctx context.Context, volume string, b transport.Backend, o transport.Options) (transport.Device, error) {
	return t.devices.Make("dm-user: create", volume, b, func() (transport.Device, error) { return t.create(ctx, volume, b, o) })
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
	if err := t.discard([]string{volume}); err != nil {
		return nil, err
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	var digits [6]byte
	_, _ = rand.Read(digits[:]) // never fails
	d := t.newDevice(volume, meta{metaVersion, t.prefix(volume) + hex.EncodeToString(digits[:]), o.ReadOnly}, b)
	if err := t.mapping.make(d.meta.Name, b.Size(), o.ReadOnly); err != nil {
		return nil, err
	}
	d.size = b.Size()
	err = d.open()
	if err == nil {
		err = d.deposit(ctx)
	}
	if err != nil {
		d.closeControls()
		d.withdraw(abortEnd) // the keeper may have taken what it did not confirm in time
		return nil, errors.Join(err, t.mapping.destroy(d.meta.Name))
	}
	d.serve()
	if d.path, err = t.mapping.activate(d.meta.Name); err != nil {
		return nil, errors.Join(err, d.Abort())
	}
	return d, nil
}

// Adopt serves on where an earlier process was killed. It waits, within ctx, until
// that process is gone. A backend that is smaller than the device is served all
// the same: requests beyond its end fail.
func (t *Transport) Adopt(ctx context.Context, volume string, b transport.Backend) (transport.Device, error) {
	if t.keeper == nil {
		return nil, fmt.Errorf("dm-user: adopt device of volume %q: %w", volume, transport.ErrNotFound)
	}
	return t.devices.Make("dm-user: adopt", volume, b, func() (transport.Device, error) { return t.adopt(ctx, volume, b) })
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
	d := t.newDevice(volume, m, b)
	if d.path, d.size, err = t.mapping.find(m.Name); err != nil {
		keeper.CloseAll(fds)
		if errors.Is(err, transport.ErrNotFound) { // it was never activated, or is gone
			err = errors.Join(err, t.keeper.Drop(ctx, keyPrefix+volume), t.mapping.destroy(m.Name))
		}
		return nil, err
	}
	if err := d.take(ctx, fds); err != nil {
		keeper.CloseAll(fds)
		return nil, err
	}
	// From now on this process has them to give a new keeper.
	if err := d.deposit(ctx); err != nil {
		d.closeControls()
		return nil, err // the keeper has them still
	}
	d.serve()
	if size := b.Size(); size != d.size {
		// The guest's requests matter more than this.
		klog.ErrorS(transport.ErrNoResize, "Adopted a device whose size is not the volume's", "volume", volume, "device", d.path, "bytes", d.size, "volumeBytes", size)
	}
	return d, nil
}

func parseMeta(raw []byte, fds int) (meta, error) {
	var m meta
	if err := json.Unmarshal(raw, &m); err != nil {
		return m, fmt.Errorf("keeper's entry: %w", err)
	}
	if m.Version != metaVersion || fds != 2+channels || !strings.HasPrefix(m.Name, namePrefix) {
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
		return nil, fmt.Errorf("dm-user: leftovers: %w", err)
	}
	return t.devices.Unserved(keys, keyPrefix), nil
}

// Discard takes devices of the volumes away that nobody serves.
func (t *Transport) Discard(volumes []string) error {
	if err := t.discard(volumes); err != nil {
		return fmt.Errorf("dm-user: discard dead devices: %w", err)
	}
	return nil
}

func (t *Transport) discard(volumes []string) error {
	if len(volumes) == 0 {
		return nil
	}
	names, err := t.mapping.list()
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ENODEV) { // no device-mapper, so no devices
		return nil
	}
	if err != nil {
		return err
	}
	var errs []error
	for _, name := range names {
		if !slices.ContainsFunc(volumes, func(v string) bool { return strings.HasPrefix(name, t.prefix(v)) }) {
			continue
		}
		if err := t.mapping.destroy(name); err != nil {
			errs = append(errs, err)
			continue
		}
		klog.InfoS("Took a dead device of an earlier process away", "device", name)
	}
	return errors.Join(errs...)
}
