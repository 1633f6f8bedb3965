package handover

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"k8s.io/klog/v2"

	"github.com/snapmerge/snapmerge/pkg/transport"
)

const (
	sectorShift = 9
	// abortEnd bounds each wait for the kernel when a device is taken away by force.
	abortEnd = 10 * time.Second
)

// errAborted says that the device is being taken away.
var errAborted = errors.New("the device is being taken away")

// Device is a device of another transport under a table that can be swapped.
type Device struct {
	t      *Transport
	volume string
	name   string // of the device-mapper device
	path   string
	b      transport.Backend

	// turn, of capacity 1, is held over everything that changes the table. A swap
	// waits for requests in flight, so who has turn may hold it until Abort fails them.
	turn   chan struct{}
	number string // MAJOR:MINOR in the table; turn must be held
	size   int64  // of the table in bytes; turn must be held
	gone   bool   // the device-mapper device is; turn must be held

	// notBefore is when no request is left that waits for more than the volume.
	notBefore time.Time

	inner   atomic.Pointer[transport.Device]
	native  atomic.Bool // the table is the base's, or may be
	aborted atomic.Bool

	failOnce, doneOnce sync.Once
	failed, done       chan struct{}
}

// served is the device of the other transport.
func (d *Device) served() transport.Device { return *d.inner.Load() }

// Path is the device-mapper device's node.
func (d *Device) Path() string { return d.path }

// Transport is the name of the other transport.
func (d *Device) Transport() string { return d.served().Transport() }

// Native tells whether requests go to the base, past the volume; true also if that
// cannot be told.
func (d *Device) Native() bool { return d.native.Load() }

// Failed is closed when the other transport's device has died and requests go there.
func (d *Device) Failed() <-chan struct{} { return d.failed }

func (d *Device) fail() { d.failOnce.Do(func() { close(d.failed) }) }

// watch notices when the other transport's device dies. While requests go to the base
// that is no harm: Back makes another one.
func (d *Device) watch(inner transport.Device) {
	select {
	case <-inner.Failed():
		if !d.Native() && d.served() == inner {
			d.fail()
		}
	case <-d.done:
	}
}

func (d *Device) lock(ctx context.Context) error {
	select {
	case d.turn <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (d *Device) unlock() { <-d.turn }

// failedTo says what could not be done.
func (d *Device) failedTo(what string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s of volume %q (%s): %w", what, d.volume, d.path, err)
}

// resender is a device of a transport whose driver sends requests that the last
// process has not answered again only after a while.
type resender interface {
	Resend() time.Duration // at most, from the adoption on
}

// NotBefore is until when ToBase may hold all requests back for long, because some
// wait for more than the volume.
func (d *Device) NotBefore() time.Time { return d.notBefore }

// ToBase has requests go to the base, a file, from one moment on. still is called at
// that moment, while none is in flight; its error ends the attempt. After an error
// requests go where they went, unless Native tells otherwise.
func (d *Device) ToBase(file string, still func() error) error {
	d.turn <- struct{}{}
	defer d.unlock()
	if d.Native() {
		return nil
	}
	return d.failedTo("hand-over", d.toBase(file, still))
}

// toBase: turn must be held.
func (d *Device) toBase(file string, still func() error) error {
	if _, err := d.recover(); err != nil {
		return err
	}
	number, release, err := d.t.dm.loop(file, d.name, d.served().Path())
	if err != nil {
		return err
	}
	defer release()
	return d.swap(number, func() error {
		if d.aborted.Load() {
			return errAborted
		}
		return still()
	})
}

// Back has requests go to the other transport's device again, and so to the volume.
// now is called while none is in flight. After an error Native tells where they go.
func (d *Device) Back(ctx context.Context, now func()) error {
	if err := d.lock(ctx); err != nil {
		return err
	}
	defer d.unlock()
	if !d.Native() {
		return nil
	}
	return d.failedTo("end of the hand-over", d.back(ctx, now))
}

// back: turn must be held.
func (d *Device) back(ctx context.Context, now func()) error {
	if _, err := d.recover(); err != nil {
		return err
	}
	select {
	case <-d.served().Failed():
		if err := d.served().Abort(); err != nil {
			return err
		}
		inner, err := d.t.replace(ctx, d.volume, d.b)
		if err != nil {
			return err
		}
		d.inner.Store(&inner)
		go d.watch(inner)
	default:
	}
	number, err := d.t.dm.number(d.served().Path())
	if err != nil {
		return err
	}
	return d.swap(number, func() error { now(); return nil })
}

func (d *Device) target(number string) target {
	return target{number: number, sectors: d.size >> sectorShift}
}

// swap makes the device of that number the active table. while is called when no
// request is in flight; an error of it ends the swap. turn must be held.
func (d *Device) swap(number string, while func() error) error {
	err := d.t.dm.load(d.name, d.target(number))
	begin := time.Now()
	if err == nil {
		err = d.t.dm.suspend(d.name)
	}
	drained := time.Now()
	if err == nil {
		err = while()
	}
	if err == nil {
		err = d.t.dm.resume(d.name)
	}
	resumed := time.Now()
	// Nobody need know what a failed step has done: the table in service tells. Until
	// it has, the worst is assumed.
	d.native.Store(true)
	st, rerr := d.recover()
	if rerr != nil {
		return errors.Join(err, rerr)
	}
	if st.target == d.target(number) {
		to := "transport"
		if d.Native() {
			to = "base"
		}
		// held is how long new requests waited, drain what of it was for those in flight.
		klog.V(2).InfoS("Swapped the table of a device", "volume", d.volume, "device", d.path, "to", to,
			"drain", drained.Sub(begin), "held", resumed.Sub(begin))
		return nil
	}
	return err
}

// recover lets requests go on with the table in service, whatever a swap was at that
// came to no end, and notes which one it is. turn must be held.
func (d *Device) recover() (state, error) {
	st, err := d.t.dm.state(d.name)
	if err != nil {
		return st, err
	}
	if st.inactive {
		if err := d.t.dm.clear(d.name); err != nil {
			return st, err // resumed, it would take the table that was loaded
		}
	}
	if st.suspended {
		if err := d.t.dm.resume(d.name); err != nil {
			return st, err
		}
	}
	native, err := d.t.dm.isLoop(st.number, d.name)
	if err != nil || !native {
		number, err := d.t.dm.number(d.served().Path())
		if err != nil {
			return st, err
		}
		native = st.number != number
	}
	d.number = st.number
	d.native.Store(native)
	select {
	case <-d.served().Failed():
		if !d.Native() {
			d.fail()
		}
	default:
	}
	return st, nil
}

// Resize tells the kernel that the backend has grown. The base must have, too.
func (d *Device) Resize() error {
	d.turn <- struct{}{}
	defer d.unlock()
	if err := d.served().Resize(); err != nil {
		return err
	}
	old := d.size
	if d.size = d.b.Size(); d.size == old {
		return nil
	}
	err := d.swap(d.number, func() error { return nil })
	if err != nil {
		d.size = old
	}
	return d.failedTo("resize", err)
}

// Close takes the device away, unless it is in use, and then the other transport's.
func (d *Device) Close(ctx context.Context) error {
	if err := d.lock(ctx); err != nil {
		return d.failedTo("close of the device", err)
	}
	defer d.unlock()
	if !d.gone {
		err := transport.WaitUnused(ctx, d.path, func(bool) (bool, error) {
			err := d.t.dm.remove(d.name)
			return errors.Is(err, errInUse), ignore(ignore(err, errInUse), errNoDevice)
		})
		if err != nil {
			return d.failedTo("close of the device", err)
		}
		d.gone = true
		d.native.Store(false)
	}
	if err := d.served().Close(ctx); err != nil {
		d.fail() // nobody can use it any more; what is left of it can be aborted
		return err
	}
	return d.end()
}

// end forgets a device that is gone.
func (d *Device) end() error {
	d.doneOnce.Do(func() { close(d.done) })
	return d.t.forget(d.volume)
}

// Abort takes the device away whether it is in use or not.
func (d *Device) Abort() error {
	d.aborted.Store(true)
	var errs []error
	early := !d.Native()
	if early { // a swap may be waiting for what is in flight there
		errs = append(errs, d.served().Abort())
	}
	done := make(chan error, 1)
	go func() {
		d.turn <- struct{}{}
		defer d.unlock()
		var err error
		if !d.gone {
			err = d.t.dm.destroy(d.name)
		}
		if err == nil {
			d.gone = true
			d.native.Store(false)
		}
		done <- err
	}()
	select {
	case err := <-done:
		errs = append(errs, err)
	case <-time.After(abortEnd):
		errs = append(errs, errors.New("the kernel does not let the device go"))
	}
	if !early {
		errs = append(errs, d.served().Abort())
	}
	if err := errors.Join(errs...); err != nil {
		return d.failedTo("abort of the device", err)
	}
	if err := d.end(); err != nil {
		klog.ErrorS(err, "A record of a device that is gone stays behind", "volume", d.volume)
	}
	return nil
}
