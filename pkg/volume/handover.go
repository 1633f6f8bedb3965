package volume

import (
	"context"
	"errors"
	"math"
	"time"

	"github.com/snapmerge/snapmerge/pkg/transport"
)

// NativeState is whether requests of the guest go to the base past the volume, as far
// as that is recorded.
//
//	""           they come here
//	"native"     they go to the base, or are about to
//	"returning"  they are about to come here again, or do already
//
// It is durable before the step that it names and, at the end, after it. So whatever a
// crash comes between: without a mark no request goes past the volume, and with one
// there is no layer that they could pass by. Which of the two they do with a mark, the
// device tells; see Volume.setDevice.
type NativeState string

// The states beside "".
const (
	GoneNative NativeState = "native"
	Returning  NativeState = "returning"
)

// ErrNative says that it is not known whether requests go to the base past the volume.
var ErrNative = errors.New("the volume was handed over to its base, and its device was not taken over yet")

// ErrOffline says that reads and writes go to the base past the volume for as long as
// it has its device.
var ErrOffline = errors.New("no snapshot while the volume is in use: its StorageClass says snapshots: offline, " +
	"and its reads and writes go straight to its base (FUSE passthrough); it can be made when the volume is unstaged")

// nativeDevice is a device whose reads and writes can go to the base without the
// volume.
type nativeDevice interface {
	transport.Device
	// Native tells whether they do, or may.
	Native() bool
}

// handoverDevice is one with which that can change while it is in service. See
// pkg/transport/handover.
type handoverDevice interface {
	nativeDevice
	// ToBase has them go to the base, a file, unless still fails at the moment at which
	// none is in flight.
	ToBase(file string, still func() error) error
	// NotBefore is until when that would better wait, lest all requests wait for some.
	NotBefore() time.Time
	// Back has them come to the volume again; now is called while none is in flight.
	Back(ctx context.Context, now func()) error
}

// backLimit is how long the end of a hand-over may wait for its turn.
const backLimit = 30 * time.Second

// errNotNow ends a hand-over that came too late.
var errNotNow = errors.New("there is a layer again")

// setDevice tells the volume its device, nil for none, and makes the record agree with
// what the device does. What an earlier process was about to end is ended.
func (v *Volume) setDevice(dev transport.Device) {
	v.changing.Lock()
	defer v.changing.Unlock()
	v.device, _ = dev.(nativeDevice)
	v.deviceKnown = true
	v.noteNative()
	if v.Record().Native != GoneNative || !v.native() {
		if err := v.comeBack(); err != nil {
			v.cfg.Log.Error(err, "Volume stays handed over to its base", "volume", v.ID())
		}
	}
	v.work.wake.ring()
}

// native tells whether requests go to the base, or may. changing must be held.
func (v *Volume) native() bool { return v.device != nil && v.device.Native() }

// noteNative lets status and counters go by what native says. changing must be held.
func (v *Volume) noteNative() {
	native := v.native()
	v.isNative.Store(native)
	if !native {
		v.bypass.follow("", false)
		return
	}
	_, all := v.device.(handoverDevice) // else flushes and discards come here
	v.bypass.follow(v.device.Path(), all)
}

// comeBack makes sure that all requests come here. changing must be held, and not be
// released before a layer is added.
func (v *Volume) comeBack() error {
	defer v.noteNative()
	if v.Record().Native == "" && !v.native() {
		return nil
	}
	if !v.deviceKnown {
		return ErrNative
	}
	if err := v.offline(); err != nil {
		return err
	}
	// What went to the base was not flushed here.
	v.baseDirty.Store(true)
	if v.native() {
		if err := v.markNative(Returning); err != nil {
			return err
		}
		ctx, cancel := context.WithTimeout(v.work.ctx, backLimit)
		defer cancel()
		if err := v.device.(handoverDevice).Back(ctx, func() { v.baseDirty.Store(true) }); err != nil {
			return err
		}
	}
	return v.markNative("")
}

// offline is ErrOffline if requests cannot come here again. changing must be held.
func (v *Volume) offline() error {
	if _, ok := v.device.(handoverDevice); !ok && v.native() {
		return ErrOffline
	}
	return nil
}

// checkOnline is why there can be no snapshot as long as the volume has its device, or
// nil.
func (v *Volume) checkOnline() error {
	v.changing.Lock()
	defer v.changing.Unlock()
	return v.offline()
}

// Passthrough records that reads and writes of a device that is being made go to the
// base past the volume, and returns the base, a file. It fails if there is anything
// else than the base. The volume gets no layer until it is told its device, or that
// it has none. It is the Base of transport.Options.
func (v *Volume) Passthrough() (file string, err error) {
	v.changing.Lock()
	defer v.changing.Unlock()
	// Only bases of our own making: see package handover.
	if !v.plain() || v.Record().Base != baseName {
		return "", errors.New("the volume is not its base alone")
	}
	if err := v.markNative(GoneNative); err != nil {
		return "", err
	}
	v.device, v.deviceKnown = nil, false
	v.noteNative()
	return v.path(baseName), nil
}

func (v *Volume) markNative(s NativeState) error {
	if v.Record().Native == s {
		return nil
	}
	was := v.Record().Native
	if was == "" {
		v.aheadBase.BeginWrite(0, math.MaxInt64) // whoever writes does not tell us
	}
	err := v.update(func(r *Record) { r.Native = s })
	if err == nil && s == "" || err != nil && was == "" {
		v.aheadBase.EndWrite(0, math.MaxInt64)
	}
	return err
}

// plain tells whether the volume is its base and nothing else. changing must be held.
func (v *Volume) plain() bool {
	rec := v.Record()
	return len(v.stack.Load().layers) == 0 && len(rec.Layers) == 0 && rec.Cut == nil && !rec.ReadOnly && v.failed() == nil
}

// handOver has requests go straight to the base if there is nothing above it. If that
// is impossible they go on coming here.
func (v *Volume) handOver() {
	v.changing.Lock()
	defer v.changing.Unlock()
	// Only bases of our own making: see package handover.
	dev, ok := v.device.(handoverDevice)
	if !ok || v.native() || !v.plain() || v.Record().Base != baseName {
		return
	}
	if wait := time.Until(dev.NotBefore()); wait > 0 {
		time.AfterFunc(wait, v.work.wake.ring)
		return
	}
	defer v.noteNative()
	err := v.markNative(GoneNative)
	if err == nil {
		err = dev.ToBase(v.path(baseName), func() error {
			if !v.plain() {
				return errNotNow
			}
			return nil
		})
		if err != nil {
			err = errors.Join(err, v.comeBack())
		}
	}
	if err != nil {
		v.cfg.Log.Error(err, "Volume cannot be handed over to its base, its device stays that of the transport", "volume", v.ID())
	}
}
