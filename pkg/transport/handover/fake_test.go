package handover

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/snapmerge/snapmerge/pkg/transport"
)

var (
	errFail  = errors.New("the step fails")
	errCrash = errors.New("the process is dead")
)

// fakeDM is the machine: device-mapper and loop devices that outlive a process. One
// step of it can fail, before or after it has had its effect, or be the last of the
// process.
type fakeDM struct {
	devices map[string]*fakeTable
	loops   map[string]string // tags by number
	held    string            // loop device that the process has open
	loopNo  int

	step    int
	failAt  int // this step fails; 0: none
	late    bool
	crashAt int   // this step and all that follow do not happen; 0: none
	blind   error // of isLoop
	log     []string
}

type fakeTable struct {
	state
	loaded *target
	open   bool
}

func newFakeDM() *fakeDM {
	return &fakeDM{devices: map[string]*fakeTable{}, loops: map[string]string{}}
}

// do is a step.
func (f *fakeDM) do(what string, effect func() error) error {
	f.step++
	f.log = append(f.log, what)
	switch {
	case f.crashAt != 0 && f.step >= f.crashAt:
		return errCrash
	case f.step == f.failAt && !f.late:
		return errFail
	}
	err := effect()
	f.sweep()
	if f.step == f.failAt {
		return errFail
	}
	return err
}

// sweep has loop devices go that nobody has open.
func (f *fakeDM) sweep() {
	for number := range f.loops {
		used := number == f.held
		for _, d := range f.devices {
			used = used || d.active && d.number == number || d.loaded != nil && d.loaded.number == number
		}
		if !used {
			delete(f.loops, number)
		}
	}
}

// restart is the end of the process.
func (f *fakeDM) restart() {
	f.held, f.failAt, f.crashAt, f.step, f.log = "", 0, 0, 0, nil
	f.sweep()
}

func (f *fakeDM) on(what, name string, effect func(d *fakeTable) error) error {
	return f.do(what, func() error {
		d := f.devices[name]
		if d == nil {
			return errNoDevice
		}
		return effect(d)
	})
}

func (f *fakeDM) create(name string) error {
	return f.do("create", func() error {
		f.devices[name] = &fakeTable{state: state{path: "/dev/fake-" + name}}
		return nil
	})
}

func (f *fakeDM) load(name string, t target) error {
	return f.on("load", name, func(d *fakeTable) error {
		d.loaded, d.inactive = &t, true
		return nil
	})
}

func (f *fakeDM) clear(name string) error {
	return f.on("clear", name, func(d *fakeTable) error {
		d.loaded, d.inactive = nil, false
		return nil
	})
}

func (f *fakeDM) suspend(name string) error {
	return f.on("suspend", name, func(d *fakeTable) error {
		d.suspended = true
		return nil
	})
}

func (f *fakeDM) resume(name string) error {
	return f.on("resume", name, func(d *fakeTable) error {
		if d.loaded != nil {
			d.target, d.active = *d.loaded, true
		}
		d.loaded, d.inactive, d.suspended = nil, false, false
		return nil
	})
}

func (f *fakeDM) state(name string) (st state, err error) {
	err = f.on("state", name, func(d *fakeTable) error {
		st = d.state
		return nil
	})
	return st, err
}

func (f *fakeDM) remove(name string) error {
	return f.on("remove", name, func(d *fakeTable) error {
		if d.open {
			return errInUse
		}
		delete(f.devices, name)
		return nil
	})
}

func (f *fakeDM) destroy(name string) error {
	return f.do("destroy", func() error {
		delete(f.devices, name)
		return nil
	})
}

func (f *fakeDM) number(path string) (number string, err error) {
	return "43:" + path[len("/dev/inner"):], f.do("number", func() error { return nil })
}

func (f *fakeDM) loop(_, tag, _ string) (number string, release func(), err error) {
	err = f.do("loop", func() error {
		f.loopNo++
		number = fmt.Sprint("7:", f.loopNo)
		f.loops[number], f.held = tag, number
		return nil
	})
	return number, func() { f.held = ""; f.sweep() }, err
}

func (f *fakeDM) isLoop(number, tag string) (bool, error) { return f.loops[number] == tag, f.blind }

// table is the only device there is.
func (f *fakeDM) table(t *testing.T) *fakeTable {
	t.Helper()
	if len(f.devices) != 1 {
		t.Fatalf("there are %d devices", len(f.devices))
	}
	for _, d := range f.devices {
		return d
	}
	return nil
}

// native tells whether requests really go to the base.
func (f *fakeTable) native() bool { return f.number[:2] == "7:" }

// fakeInner is a transport whose devices outlive a process, or not.
type fakeInner struct {
	transport.Transport
	devices map[string]*fakeDevice
	made    int
	aborted int
}

type fakeDevice struct {
	t      *fakeInner
	volume string
	path   string
	failed chan struct{}
}

func (t *fakeInner) Create(_ context.Context, volume string, _ transport.Backend, _ transport.Options) (transport.Device, error) {
	if t.devices[volume] != nil {
		return nil, errors.New("there is one")
	}
	t.made++
	d := &fakeDevice{t, volume, fmt.Sprint("/dev/inner", t.made), make(chan struct{})}
	t.devices[volume] = d
	return d, nil
}

func (t *fakeInner) Adopt(_ context.Context, volume string, _ transport.Backend) (transport.Device, error) {
	if d := t.devices[volume]; d != nil {
		return d, nil
	}
	return nil, transport.ErrNotFound
}

func (t *fakeInner) Leftovers(context.Context) (volumes []string, _ error) {
	for v := range t.devices {
		volumes = append(volumes, v)
	}
	return volumes, nil
}

func (t *fakeInner) Discard([]string) error { return nil }

func (d *fakeDevice) Path() string            { return d.path }
func (d *fakeDevice) Resend() time.Duration   { return time.Hour }
func (d *fakeDevice) Transport() string       { return "fake" }
func (d *fakeDevice) Resize() error           { return nil }
func (d *fakeDevice) Failed() <-chan struct{} { return d.failed }

func (d *fakeDevice) Close(context.Context) error {
	delete(d.t.devices, d.volume)
	return nil
}

func (d *fakeDevice) Abort() error {
	d.t.aborted++
	delete(d.t.devices, d.volume)
	return nil
}
