package handover

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"sync"
	"time"

	"k8s.io/klog/v2"

	"github.com/snapmerge/snapmerge/pkg/transport"
)

// NamePrefix is what the names of device-mapper devices of this package begin with.
const NamePrefix = "snapmerge-native-"

// Transport makes the devices of another transport and puts them under tables that
// can be swapped, as far as that works: read-only devices, and those of a machine
// without device-mapper, are the other transport's own.
type Transport struct {
	transport.Transport
	records transport.Records
	dm      mapper
	usable  error // why no more devices are put under tables

	mu      sync.Mutex
	serving map[string]struct{} // volumes whose tables this process has
}

// New wraps a transport. dir is where it keeps which device is whose; it is made with
// the first. usable, if not nil, is why new devices are not put under tables; those
// of an earlier process are taken over all the same.
func New(inner transport.Transport, dir string, usable error) *Transport {
	return &Transport{Transport: inner, records: transport.Records{Dir: dir}, dm: kernel{}, usable: usable, serving: map[string]struct{}{}}
}

func nameOf(tag uint64) string { return fmt.Sprintf("%s%016x", NamePrefix, tag) }

// Create makes a device. If only the table cannot be made, it is the bare device of
// the other transport.
func (t *Transport) Create(ctx context.Context, volume string, b transport.Backend, o transport.Options) (transport.Device, error) {
	if t.usable == nil {
		o.Base = nil // a table does better: it can be swapped back
	}
	inner, err := t.Transport.Create(ctx, volume, b, o)
	if err != nil || t.usable != nil || o.ReadOnly {
		return inner, err
	}
	d, err := t.wrap(volume, inner, b)
	if err != nil {
		klog.ErrorS(err, "Volume cannot be handed over to its base when it is merged", "volume", volume, "device", inner.Path())
		return inner, nil
	}
	return d, nil
}

// wrap makes the table of a new device.
func (t *Transport) wrap(volume string, inner transport.Device, b transport.Backend) (_ *Device, err error) {
	tag := transport.NewTag()
	if err := t.records.Put(volume, tag); err != nil {
		return nil, err
	}
	d := t.newDevice(volume, nameOf(tag), inner, b)
	d.size = b.Size()
	defer func() {
		if err != nil {
			err = errors.Join(err, ignore(t.dm.remove(d.name), errNoDevice), t.records.Drop(volume))
		}
	}()
	if d.number, err = t.dm.number(inner.Path()); err != nil {
		return nil, err
	}
	if err := t.dm.create(d.name); err != nil {
		return nil, err
	}
	if err := t.dm.load(d.name, d.target(d.number)); err != nil {
		return nil, err
	}
	if err := t.dm.resume(d.name); err != nil {
		return nil, err
	}
	st, err := t.dm.state(d.name)
	if err != nil {
		return nil, err
	}
	d.path = st.path
	t.serve(d)
	return d, nil
}

func (t *Transport) newDevice(volume, name string, inner transport.Device, b transport.Backend) *Device {
	d := &Device{t: t, volume: volume, name: name, b: b, turn: make(chan struct{}, 1), failed: make(chan struct{}), done: make(chan struct{})}
	d.inner.Store(&inner)
	return d
}

// serve notes a device that is in service.
func (t *Transport) serve(d *Device) {
	t.mu.Lock()
	t.serving[d.volume] = struct{}{}
	t.mu.Unlock()
	go d.watch(d.served())
}

func (t *Transport) forget(volume string) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.serving, volume)
	return t.records.Drop(volume)
}

// find returns the name and the state of the volume's device-mapper device, or
// transport.ErrNotFound if there is none in service.
func (t *Transport) find(volume string) (name string, st state, err error) {
	tag, err := t.records.Get(volume)
	if errors.Is(err, fs.ErrNotExist) {
		return "", st, transport.ErrNotFound
	}
	if err != nil {
		return "", st, err
	}
	name = nameOf(tag)
	st, err = t.dm.state(name)
	switch {
	case errors.Is(err, errNoDevice):
		return name, st, errors.Join(transport.ErrNotFound, t.records.Drop(volume)) // the machine has been started anew
	case err == nil && !st.active: // half made
		err = errors.Join(transport.ErrNotFound, t.dm.remove(name), t.records.Drop(volume))
	}
	return name, st, err
}

// Adopt takes over the device of an earlier process with the table that it has. One
// whose requests go to the base needs no device of the other transport for that; if it
// has none any more, it gets a new one. Any other table is of no use without that device,
// and goes too.
func (t *Transport) Adopt(ctx context.Context, volume string, b transport.Backend) (transport.Device, error) {
	name, st, err := t.find(volume)
	if errors.Is(err, transport.ErrNotFound) {
		return t.Transport.Adopt(ctx, volume, b)
	}
	if err != nil {
		return nil, fmt.Errorf("table of volume %q: %w", volume, err)
	}
	inner, err := t.Transport.Adopt(ctx, volume, b)
	if errors.Is(err, transport.ErrNotFound) {
		native, lerr := t.dm.isLoop(st.number, name)
		switch {
		case lerr != nil:
			return nil, fmt.Errorf("table of volume %q: %w", volume, lerr)
		case native:
			inner, err = t.replace(ctx, volume, b)
		default:
			// A swap may have left it suspended: then its users would wait for ever. And the
			// record has room for one table, so the next would have this one forgotten.
			if derr := t.dm.destroy(name); derr != nil {
				return nil, fmt.Errorf("table of volume %q: %w", volume, derr)
			}
			err = errors.Join(err, t.records.Drop(volume))
		}
	}
	if err != nil {
		return nil, err
	}
	d := t.newDevice(volume, name, inner, b)
	d.path, d.size = st.path, st.sectors<<sectorShift
	if r, ok := inner.(resender); ok {
		d.notBefore = time.Now().Add(r.Resend())
	}
	d.native.Store(true) // until it is known
	// From here on requests are answered, so that a suspension ends.
	if _, err := d.recover(); err != nil {
		// Whoever gets the device can try again: each swap begins with that.
		klog.ErrorS(err, "Table of a device of an earlier process", "volume", volume, "device", d.path)
	}
	t.serve(d)
	return d, nil
}

// replace makes a device of the other transport in place of one that has died.
func (t *Transport) replace(ctx context.Context, volume string, b transport.Backend) (transport.Device, error) {
	if err := t.Transport.Discard([]string{volume}); err != nil {
		klog.ErrorS(err, "A dead device may be left", "volume", volume)
	}
	return t.Transport.Create(ctx, volume, b, transport.Options{})
}

// Leftovers lists the other transport's, and those that need none: their requests go
// to the base.
func (t *Transport) Leftovers(ctx context.Context) ([]string, error) {
	volumes, err := t.Transport.Leftovers(ctx)
	recs, rerr := t.records.List()
	errs := []error{err, rerr}
	for _, r := range recs {
		if t.has(r.Volume) || slices.Contains(volumes, r.Volume) {
			continue
		}
		native := false
		name, st, err := t.find(r.Volume)
		if err == nil {
			native, err = t.dm.isLoop(st.number, name)
		}
		switch {
		case errors.Is(err, transport.ErrNotFound):
		case err != nil:
			errs = append(errs, fmt.Errorf("table of volume %q: %w", r.Volume, err))
		case native:
			volumes = append(volumes, r.Volume)
		}
	}
	return volumes, errors.Join(errs...)
}

func (t *Transport) has(volume string) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	_, ok := t.serving[volume]
	return ok
}

// Discard takes tables over dead devices away, and the devices.
func (t *Transport) Discard(volumes []string) error {
	var errs []error
	for _, v := range volumes {
		name, _, err := t.find(v)
		if err == nil {
			err = errors.Join(t.dm.destroy(name), t.records.Drop(v))
		}
		if err != nil && !errors.Is(err, transport.ErrNotFound) {
			errs = append(errs, fmt.Errorf("table of volume %q: %w", v, err))
		}
	}
	return errors.Join(append(errs, t.Transport.Discard(volumes))...)
}

// ignore is err unless that is what.
func ignore(err, what error) error {
	if errors.Is(err, what) {
		return nil
	}
	return err
}
