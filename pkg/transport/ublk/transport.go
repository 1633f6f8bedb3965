package ublk

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"runtime"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"

	"github.com/snapmerge/snapmerge/pkg/transport"
)

const (
	// maxQueues bounds the threads of a device; the kernel has no use for more
	// queues than processors.
	maxQueues = 4
	// depth is the most requests in flight of a queue.
	depth = 32
	// pollRecovery is how often to ask whether the kernel is through with a dead
	// server; it has no event for it.
	pollRecovery = 5 * time.Millisecond
)

// Transport is the transport "ublk". It implements transport.Transport.
type Transport struct {
	records transport.Records
	devices transport.Registry

	mu       sync.Mutex
	features uint64 // UBLK_F_*; 0: not asked yet
}

var _ transport.Transport = (*Transport)(nil)

// New makes the transport. Files in dir, which is made when it is needed, say
// which device is whose; dir must be the same for the next process and no other.
func New(dir string) *Transport {
	return &Transport{records: transport.Records{Dir: dir}}
}

// Name is "ublk".
func (t *Transport) Name() string { return "ublk" }

// Create makes a device. The size of the backend must be a multiple of 4096.
func (t *Transport) Create(ctx context.Context, volume string, b transport.Backend, o transport.Options) (transport.Device, error) {
	return t.devices.Make("ublk: create", volume, b, func() (transport.Device, error) { return t.create(ctx, volume, b, o) })
}

func (t *Transport) create(ctx context.Context, volume string, b transport.Backend, o transport.Options) (_ *device, err error) {
	c, err := t.control()
	if err != nil {
		return nil, err
	}
	defer c.close()
	old, found, err := t.find(c, volume)
	if err != nil {
		return nil, err
	}
	if found {
		if old.state != stateDead {
			return nil, transport.ErrLeftover
		}
		t.remove(volume, old.id, old.tag, abortEnd)
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	tag := transport.NewTag()
	if err := t.records.Put(volume, tag); err != nil {
		return nil, err
	}
	info, err := c.add(devInfo{queues: uint16(min(runtime.NumCPU(), maxQueues)), depth: depth, maxIO: maxIO, flags: flagsNeeded, tag: tag})
	if err != nil {
		return nil, errors.Join(err, t.records.Drop(volume))
	}
	d := t.newDevice(volume, info, params{readOnly: o.ReadOnly, size: b.Size()}, b)
	if err := c.setParams(d.id, d.p); err != nil {
		t.remove(volume, d.id, d.tag, abortEnd)
		return nil, err
	}
	if err := d.prepare(info); err != nil {
		t.remove(volume, d.id, d.tag, abortEnd)
		return nil, err
	}
	if err := d.bringUp(c.start); err != nil {
		return nil, err
	}
	if err := d.tune(); err != nil {
		klog.InfoS("If the node plugin is killed while a queue is full, its requests may wait for 30 s", "volume", volume, "device", d.Path(), "err", err)
	}
	return d, nil
}

// Discard removes devices of the volumes that the kernel has given up.
func (t *Transport) Discard(volumes []string) error {
	c, err := t.control()
	if err != nil {
		return err
	}
	defer c.close()
	var errs []error
	for _, v := range volumes {
		old, found, err := t.find(c, v)
		if err == nil && found && old.state == stateDead {
			t.remove(v, old.id, old.tag, abortEnd)
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// bringUp serves a prepared device and has the kernel begin with it. If it fails
// the device is taken away.
func (d *device) bringUp(begin func(id uint32) error) error {
	err := d.serve()
	if err == nil {
		err = begin(d.id)
	}
	if err == nil {
		err = d.inService()
	}
	if err != nil {
		d.giveUp()
	}
	return err
}

func (t *Transport) newDevice(volume string, info devInfo, p params, b transport.Backend) *device {
	d := &device{t: t, volume: volume, id: info.id, tag: info.tag, p: p, b: b, threadsDone: make(chan struct{})}
	d.life = transport.NewLifecycle(func() { klog.InfoS("Device has died", "volume", volume, "device", d.Path()) })
	d.size.Store(p.size)
	return d
}

// Adopt serves on where an earlier process was killed. It waits, within ctx,
// until that process is gone. A backend that is smaller than the device is served
// all the same: requests beyond its end fail.
func (t *Transport) Adopt(ctx context.Context, volume string, b transport.Backend) (transport.Device, error) {
	return t.devices.Make("ublk: adopt", volume, b, func() (transport.Device, error) { return t.adopt(ctx, volume, b) })
}

func (t *Transport) adopt(ctx context.Context, volume string, b transport.Backend) (_ *device, err error) {
	c, err := t.control()
	if err != nil {
		return nil, err
	}
	defer c.close()
	info, found, err := t.find(c, volume)
	if err != nil {
		return nil, err
	}
	if !found {
		return nil, transport.ErrNotFound
	}
	if info.state == stateDead { // it was never started, or is stopped
		t.remove(volume, info.id, info.tag, abortEnd)
		return nil, transport.ErrNotFound
	}
	if err := beginRecovery(ctx, c, info.id); err != nil {
		return nil, err
	}
	p, err := c.params(info.id)
	if err != nil {
		return nil, err
	}
	d := t.newDevice(volume, info, p, b)
	if err := d.prepare(info); err != nil {
		return nil, err // the next one may adopt it
	}
	if err := d.bringUp(c.endRecovery); err != nil {
		return nil, err
	}
	if size := b.Size(); size != p.size {
		// The guest's requests matter more than this.
		if err := d.Resize(); err != nil {
			klog.ErrorS(err, "Adopted a device whose size is not the volume's", "volume", volume, "device", d.Path(), "bytes", p.size)
		}
	}
	return d, nil
}

// beginRecovery waits until the kernel is through with the dead server.
func beginRecovery(ctx context.Context, c *control, id uint32) error {
	for {
		err := c.startRecovery(id)
		if !errors.Is(err, unix.EBUSY) {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("an earlier process still serves the device: %w", err)
		case <-time.After(pollRecovery):
		}
	}
}

// find returns the device of the volume, if there is one. A record without a
// device is dropped.
func (t *Transport) find(c *control, volume string) (devInfo, bool, error) {
	tag, err := t.records.Get(volume)
	if errors.Is(err, fs.ErrNotExist) {
		return devInfo{}, false, nil
	}
	if err != nil {
		return devInfo{}, false, err
	}
	devices, err := devicesByTag(c)
	if err != nil {
		return devInfo{}, false, err
	}
	info, ok := devices[tag]
	if !ok {
		err = t.records.Drop(volume)
	}
	return info, ok, err
}

// Leftovers lists the volumes that have devices which this process does not
// serve.
func (t *Transport) Leftovers(context.Context) ([]string, error) {
	volumes, err := t.leftovers()
	if err != nil {
		err = fmt.Errorf("ublk: leftovers: %w", err)
	}
	return volumes, err
}

func (t *Transport) leftovers() ([]string, error) {
	recs, badFiles := t.records.List()
	if len(recs) == 0 {
		return nil, badFiles
	}
	c, err := t.control()
	if errors.Is(err, fs.ErrNotExist) { // no driver, so no devices
		return nil, badFiles
	}
	if err != nil {
		return nil, errors.Join(badFiles, err)
	}
	defer c.close()
	devices, err := devicesByTag(c)
	if err != nil {
		return nil, errors.Join(badFiles, err)
	}
	var volumes []string
	for _, r := range recs {
		if _, exists := devices[r.Tag]; exists && !t.devices.Has(r.Volume) {
			volumes = append(volumes, r.Volume)
		}
	}
	return volumes, badFiles
}

// control opens the control device, and checks once what the driver can do.
func (t *Transport) control() (*control, error) {
	c, err := openControl()
	if err != nil {
		return nil, err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.features == 0 {
		have, err := c.features()
		if err == nil && have&flagsNeeded != flagsNeeded {
			err = fmt.Errorf("the driver has the features %#x, needed are %#x (kernel 6.4)", have, uint64(flagsNeeded))
		}
		if err != nil {
			c.close()
			return nil, err
		}
		t.features = have
	}
	return c, nil
}

// knows tells whether the driver knows the flag. It was asked by control.
func (t *Transport) knows(flag uint64) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.features&flag != 0
}
