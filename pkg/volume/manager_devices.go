package volume

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/snapmerge/snapmerge/pkg/transport"
)

// Attach puts the volume's device into service, if it is not yet, and returns
// its path. One that is there but was made otherwise is replaced; in use, it
// gives transport.ErrBusy.
func (m *Manager) Attach(ctx context.Context, id string, o transport.Options) (string, error) {
	e, err := m.hold(id)
	if err != nil {
		return "", err
	}
	defer e.mu.Unlock()
	// What was wrong with it may have been mended by hand.
	v, err := m.opened(ctx, e)
	if err != nil {
		return "", err
	}
	if err := m.retake(ctx, e); err != nil {
		return "", err
	}
	m.mu.Lock()
	dev, broken := e.dev, e.broken
	m.mu.Unlock()
	if dev != nil {
		select {
		case <-dev.Failed():
			err = m.dropDevice(e, dev)
		default:
			ro, known := deviceReadOnly(dev)
			if !broken && (!known || ro == o.ReadOnly) {
				return dev.Path(), nil
			}
			// It was made for something else by a process that was ended before it
			// noted that, or would go on failing though the volume can be opened now.
			err = m.closeDevice(ctx, e, dev)
		}
		if err != nil {
			return "", err
		}
	}
	dev, err = m.cfg.Transport.Create(ctx, id, v, o)
	if err != nil {
		if v.Record().Native != "" { // it was to be so
			m.noDevice(v)
		}
		return "", err
	}
	m.setDevice(e, dev, false)
	return dev.Path(), nil
}

// deviceReadOnly tells whether a device in service refuses writes, if the kernel
// says so.
func deviceReadOnly(dev transport.Device) (ro, known bool) {
	b, err := os.ReadFile(filepath.Join("/sys/class/block", filepath.Base(dev.Path()), "ro"))
	return strings.TrimSpace(string(b)) == "1", err == nil
}

// noDevice tells a volume that it has no device, if nothing is left of one by which
// requests could go past the volume.
func (m *Manager) noDevice(v *Volume) {
	if v.Record().Native != "" {
		if err := m.cfg.Transport.Discard([]string{v.ID()}); err != nil {
			m.cfg.Log.Error(err, "Requests may go past the volume by what is left of its device", "volume", v.ID())
			return
		}
	}
	v.setDevice(nil)
}

// setDevice notes the device of e, nil for none. broken: its backend is.
func (m *Manager) setDevice(e *entry, dev transport.Device, broken bool) {
	m.mu.Lock()
	e.dev, e.broken = dev, broken
	if dev != nil {
		e.devErr = nil
	}
	v := e.v
	m.mu.Unlock()
	if v != nil {
		v.setDevice(dev)
	}
}

// dropDevice takes away a device that is dead or to be aborted. e.mu is held.
func (m *Manager) dropDevice(e *entry, dev transport.Device) error {
	if err := dev.Abort(); err != nil {
		return fmt.Errorf("volume %s: abort of its device: %w", e.id, err)
	}
	m.setDevice(e, nil, false)
	return nil
}

// closeDevice takes a device that works out of service, unless it is in use.
// e.mu is held.
func (m *Manager) closeDevice(ctx context.Context, e *entry, dev transport.Device) error {
	err := dev.Close(ctx)
	if err != nil && e.broken && !errors.Is(err, transport.ErrBusy) {
		err = dev.Abort() // its last flush has failed, as everything on it does
	}
	if err != nil {
		return fmt.Errorf("volume %s: %w", e.id, err)
	}
	m.setDevice(e, nil, false)
	return nil
}

// Detach takes the volume's device out of service; without one it does nothing.
// A device in use gives transport.ErrBusy.
func (m *Manager) Detach(ctx context.Context, id string) error {
	e, err := m.hold(id)
	if err != nil {
		return err
	}
	defer e.mu.Unlock()
	if err := m.retake(ctx, e); err != nil {
		return err
	}
	m.mu.Lock()
	v, dev := e.v, e.dev
	e.devErr = nil
	m.mu.Unlock()
	if dev == nil {
		return nil
	}
	select {
	case <-dev.Failed():
		return m.dropDevice(e, dev)
	default:
	}
	if err := m.closeDevice(ctx, e, dev); err != nil {
		return err
	}
	if v != nil {
		return v.Flush()
	}
	return nil
}

// Abort takes the volume's device away whether it is in use or not: what is in
// flight fails, and so does all I/O of who has it mounted. Without a device it
// does nothing.
func (m *Manager) Abort(id string) error {
	e, err := m.hold(id)
	if err != nil {
		return err
	}
	defer e.mu.Unlock()
	m.mu.Lock()
	dev := e.dev
	m.mu.Unlock()
	if dev == nil {
		return nil
	}
	return m.dropDevice(e, dev)
}

// Device is the path of the volume's device, or "".
func (m *Manager) Device(id string) string {
	m.mu.Lock()
	defer m.mu.Unlock()
	if e := m.volumes[id]; e != nil && e.dev != nil {
		return e.dev.Path()
	}
	return ""
}

// adopt takes over the devices that an earlier process left. Guests may be
// waiting for them, so nothing else comes first.
func (m *Manager) adopt(ctx context.Context) {
	if m.cfg.Transport == nil {
		return
	}
	left, err := m.cfg.Transport.Leftovers(ctx)
	if err != nil {
		m.cfg.Log.Error(err, "Devices of an earlier process cannot be found")
	}
	found := map[string]bool{}
	for _, id := range left {
		found[id] = true
		_ = m.adoptDevice(ctx, id) // it is logged, and noted
	}
	var rest []string
	for _, e := range m.entries() {
		if found[e.id] {
			continue
		}
		rest = append(rest, e.id)
		if e.v == nil {
			continue
		}
		if err == nil {
			m.noDevice(e.v)
		}
		if e.v.Record().Stage == nil {
			continue
		}
		// Staged, and the device is gone: the node was started anew, or the
		// keeper died too. Staging it again mends that.
		m.cfg.Log.Info("Device of a staged volume is gone", "volume", e.id)
		m.mu.Lock()
		e.devErr = errors.New("device is gone, the volume has to be staged again")
		m.mu.Unlock()
	}
	if err := m.cfg.Transport.Discard(rest); err != nil {
		m.cfg.Log.Error(err, "Dead devices may be left")
	}
}

// retake takes over the device of an earlier process if that was not possible
// before: it may be in use. e.mu is held.
func (m *Manager) retake(ctx context.Context, e *entry) error {
	m.mu.Lock()
	_, left := m.leftovers[e.id]
	m.mu.Unlock()
	if !left {
		return nil
	}
	return m.adoptDevice(ctx, e.id)
}

// adoptDevice takes over the device that an earlier process has left for the
// volume, and takes it down if the volume is gone. If it fails, the device is
// among the leftovers. Either e.mu is held or e is not shared yet.
func (m *Manager) adoptDevice(ctx context.Context, id string) error {
	m.mu.Lock()
	e, orphan := m.volumes[id], m.leftovers[id]
	var v *Volume
	if e != nil {
		v = e.v
	}
	m.mu.Unlock()
	orphan = orphan || e == nil
	var b transport.Backend = broken{}
	if v != nil && !orphan {
		b = v
	}
	dev, err := m.cfg.Transport.Adopt(ctx, id, b)
	if err != nil {
		m.adoptFailures.Add(1)
		m.cfg.Log.Error(err, "Device of an earlier process cannot be taken over", "volume", id)
		gone := errors.Is(err, transport.ErrNotFound)
		if gone && v != nil && !orphan {
			m.noDevice(v)
		}
		m.mu.Lock()
		defer m.mu.Unlock()
		if e != nil {
			e.devErr = err
		}
		if gone {
			delete(m.leftovers, id)
			return nil
		}
		m.leftovers[id] = orphan
		return fmt.Errorf("volume %s: the device of an earlier process cannot be taken over: %w", id, err)
	}
	m.mu.Lock()
	delete(m.leftovers, id)
	m.mu.Unlock()
	if orphan {
		m.cfg.Log.Info("Device of a volume that is gone is taken down", "volume", id, "device", dev.Path())
		if err := dev.Abort(); err != nil {
			m.cfg.Log.Error(err, "Device of a volume that is gone", "volume", id)
		}
		return nil
	}
	m.setDevice(e, dev, v == nil)
	m.adopted.Add(1)
	m.cfg.Log.Info("Device taken over", "volume", id, "device", dev.Path(), "works", v != nil)
	return nil
}

// closeFailed closes v, the volume of e, if it takes no writes any more and nobody uses
// it, and tells whether it did. What its disk holds may be good: only the open files can
// no longer be trusted. e.mu is held.
func (m *Manager) closeFailed(e *entry, v *Volume) bool {
	why := v.failed()
	m.mu.Lock()
	_, left := m.leftovers[e.id]
	used := e.dev != nil || left
	m.mu.Unlock()
	// A cut is there as long as a snapshot is encoded. With Native set requests may go to
	// the base past the volume.
	if rec := v.Record(); why == nil || used || rec.Cut != nil || rec.Native != "" {
		return false
	}
	if err := v.dropCached(); err != nil {
		m.cfg.Log.Error(err, "Volume takes no writes and cannot be opened anew", "volume", e.id)
		return false
	}
	m.cfg.Log.Info("Volume is opened anew, as it takes no writes any more", "volume", e.id)
	m.mu.Lock()
	e.v, e.err = nil, fmt.Errorf("it is opened anew: %w", why)
	m.mu.Unlock()
	if err := v.discard(); err != nil {
		m.cfg.Log.Error(err, "Close of a volume that takes no writes", "volume", e.id)
	}
	return true
}

// broken serves a device whose volume cannot be opened: every request fails, so
// that the guest sees an error rather than waiting for ever. How long the device
// is nobody may know any more; transports adopt one that is longer than its
// backend.
type broken struct{}

func (broken) ReadAt([]byte, int64) (int, error)  { return 0, syscall.EIO }
func (broken) WriteAt([]byte, int64) (int, error) { return 0, syscall.EIO }
func (broken) Flush() error                       { return syscall.EIO }
func (broken) Zero(int64, int64) error            { return syscall.EIO }
func (broken) Size() int64                        { return bs }
