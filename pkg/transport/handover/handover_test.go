package handover

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/snapmerge/snapmerge/pkg/transport"
	"github.com/snapmerge/snapmerge/test/devicetest"
	"github.com/snapmerge/snapmerge/test/machine"
)

const size = 1 << 20

// node is a machine with the process on it.
type node struct {
	t     *testing.T
	dir   string
	dm    *fakeDM
	inner *fakeInner
	tr    *Transport
	b     *devicetest.Memory
}

func newNode(t *testing.T) *node {
	n := &node{t: t, dir: t.TempDir(), dm: newFakeDM(), inner: &fakeInner{devices: map[string]*fakeDevice{}}, b: devicetest.NewMemory(size)}
	n.restart()
	return n
}

func (n *node) restart() {
	n.dm.restart()
	n.tr = New(n.inner, n.dir, nil)
	n.tr.dm = n.dm
}

func (n *node) create() *Device {
	n.t.Helper()
	d, err := n.tr.Create(n.t.Context(), "v", n.b, transport.Options{})
	if err != nil {
		n.t.Fatal(err)
	}
	w, ok := d.(*Device)
	if !ok {
		n.t.Fatalf("%T", d)
	}
	n.dm.step, n.dm.log = 0, nil
	return w
}

func (n *node) adopt() *Device {
	n.t.Helper()
	d, err := n.tr.Adopt(n.t.Context(), "v", n.b)
	if err != nil {
		n.t.Fatal(err)
	}
	w, ok := d.(*Device)
	if !ok {
		n.t.Fatalf("%T", d)
	}
	return w
}

// atRest checks that requests go on, and that the device knows where they go.
func (n *node) atRest(d *Device, native bool) {
	n.t.Helper()
	tab := n.dm.table(n.t)
	if tab.suspended || tab.inactive || tab.sectors != size>>sectorShift {
		n.t.Errorf("%+v", tab.state)
	}
	if tab.native() != native || d.Native() != native {
		n.t.Errorf("the table is the base's: %t, the device says %t, want %t", tab.native(), d.Native(), native)
	}
}

func yes() error { return nil }

// swap is ToBase, or Back.
func swap(d *Device, toBase bool, at func()) error {
	if toBase {
		return d.ToBase("/base", func() error { at(); return nil })
	}
	return d.Back(context.Background(), at)
}

// TestOrder: the volume is asked between suspend and resume, and the kernel has the
// other table before.
func TestOrder(t *testing.T) {
	n := newNode(t)
	d := n.create()
	for _, toBase := range []bool{true, false, true, false} {
		n.dm.log = nil
		err := swap(d, toBase, func() {
			n.dm.log = append(n.dm.log, "ask")
			if tab := n.dm.table(t); !tab.suspended || !tab.inactive {
				t.Errorf("asked in state %+v", tab.state)
			}
		})
		if err != nil {
			t.Fatal(err)
		}
		n.atRest(d, toBase)
		if got := strings.Join(n.dm.log, " "); !strings.Contains(got, "load suspend ask resume") || strings.Contains(got, "loop") != toBase {
			t.Error(got)
		}
		if len(n.dm.loops) == 1 != toBase {
			t.Errorf("loop devices: %v", n.dm.loops)
		}
	}
	if err := d.ToBase("/base", func() error { return errFail }); !errors.Is(err, errFail) {
		t.Error(err)
	}
	n.atRest(d, false)
}

// TestFailure: after any step that fails, with or without effect, requests go on, and
// nobody takes a base for a transport.
func TestFailure(t *testing.T) {
	for _, toBase := range []bool{true, false} {
		for k := 1; ; k++ {
			done := false
			for _, late := range []bool{false, true} {
				n := newNode(t)
				d := n.create()
				if !toBase {
					if err := d.ToBase("/base", yes); err != nil {
						t.Fatal(err)
					}
				}
				n.dm.step, n.dm.log = 0, nil
				n.dm.failAt, n.dm.late = k, late
				err := swap(d, toBase, func() {})
				done = n.dm.step < k
				what := fmt.Sprintf("to base %t, step %d (late %t) of %v: %v", toBase, k, late, n.dm.log, err)
				n.dm.failAt = 0
				tab := n.dm.table(t)
				if tab.native() && !d.Native() {
					t.Errorf("%s: requests go to the base and nobody knows", what)
				}
				if err == nil && tab.native() != toBase {
					t.Errorf("%s: succeeds without effect", what)
				}
				if d.Native() == tab.native() && (tab.suspended || tab.inactive) {
					t.Errorf("%s: left %+v", what, tab.state)
				}
				// It works again when the machine does.
				if err := d.Back(t.Context(), func() {}); err != nil {
					t.Errorf("%s: %v", what, err)
				}
				n.atRest(d, false)
				if err := d.ToBase("/base", yes); err != nil {
					t.Errorf("%s: %v", what, err)
				}
				n.atRest(d, true)
			}
			if done {
				break
			}
		}
	}
}

// TestCrash kills the process at each step. The next one finds the table that it is,
// also if the other transport's device has died too and requests don't need it.
func TestCrash(t *testing.T) {
	for _, toBase := range []bool{true, false} {
		for _, keeper := range []bool{true, false} {
			for k := 1; ; k++ {
				n := newNode(t)
				d := n.create()
				if !toBase {
					if err := d.ToBase("/base", yes); err != nil {
						t.Fatal(err)
					}
				}
				n.dm.step, n.dm.log, n.dm.crashAt = 0, nil, k
				err := swap(d, toBase, func() {})
				what := fmt.Sprintf("to base %t, killed at step %d of %v", toBase, k, n.dm.log)
				native := n.dm.table(t).native()
				if (err == nil) != (n.dm.step < k) {
					t.Fatalf("%s: %v", what, err)
				}
				if !keeper {
					clear(n.inner.devices)
				}
				n.restart()
				left, lerr := n.tr.Leftovers(t.Context())
				if want := native || keeper; lerr != nil || slices.Contains(left, "v") != want {
					t.Errorf("%s: leftovers %v, %v", what, left, lerr)
				}
				if native || keeper {
					d = n.adopt()
					n.atRest(d, native)
					if err := d.Back(t.Context(), func() {}); err != nil {
						t.Errorf("%s: %v", what, err)
					}
					n.atRest(d, false)
				} else {
					if err := n.tr.Discard([]string{"v"}); err != nil || len(n.dm.devices) > 0 {
						t.Errorf("%s: %v, %v", what, n.dm.devices, err)
					}
				}
				if err == nil {
					break
				}
			}
		}
	}
}

// TestDeadTransport: while requests go to the base nobody needs the other device; to
// come back a new one is made.
func TestDeadTransport(t *testing.T) {
	n := newNode(t)
	d := n.create()
	if err := d.ToBase("/base", yes); err != nil {
		t.Fatal(err)
	}
	close(n.inner.devices["v"].failed)
	if err := d.Back(t.Context(), func() {}); err != nil {
		t.Fatal(err)
	}
	n.atRest(d, false)
	select {
	case <-d.Failed():
		t.Error("failed")
	default:
	}
	if n.inner.made != 2 {
		t.Errorf("%d devices", n.inner.made)
	}
	close(n.inner.devices["v"].failed)
	<-d.Failed()
}

// TestTableOfDeadDevice: nothing is left of a table whose device has died with the
// process, also if that was killed while the table was suspended; and if the table cannot
// be taken away now, it is not forgotten.
func TestTableOfDeadDevice(t *testing.T) {
	for _, suspended := range []bool{false, true} {
		n := newNode(t)
		d := n.create()
		if suspended {
			err := d.ToBase("/base", func() error { n.dm.crashAt = n.dm.step + 1; return nil })
			if tab := n.dm.table(t); !errors.Is(err, errCrash) || !tab.suspended {
				t.Fatalf("%v, %+v", err, tab.state)
			}
		}
		n.restart()
		clear(n.inner.devices)
		n.dm.blind = errFail // it may be the base's
		if _, err := n.tr.Adopt(t.Context(), "v", n.b); !errors.Is(err, errFail) || len(n.dm.devices) != 1 {
			t.Errorf("suspended %t: %v; %d tables", suspended, err, len(n.dm.devices))
		}
		if _, err := n.tr.Leftovers(t.Context()); !errors.Is(err, errFail) {
			t.Errorf("suspended %t: %v", suspended, err)
		}
		n.dm.blind = nil
		n.dm.failAt = n.dm.step + 2 // destroy, after state
		if _, err := n.tr.Adopt(t.Context(), "v", n.b); !errors.Is(err, errFail) || errors.Is(err, transport.ErrNotFound) {
			t.Errorf("suspended %t: %v of %v", suspended, err, n.dm.log)
		}
		if _, err := n.tr.Adopt(t.Context(), "v", n.b); !errors.Is(err, transport.ErrNotFound) {
			t.Errorf("suspended %t: %v", suspended, err)
		}
		if recs, err := n.tr.records.List(); err != nil || len(recs)+len(n.dm.devices) > 0 {
			t.Errorf("suspended %t: left %v %v, %v", suspended, recs, n.dm.devices, err)
		}
		n.atRest(n.create(), false)
	}
}

// TestCreateFails: without a table it is the bare device.
func TestCreateFails(t *testing.T) {
	for k := 1; ; k++ {
		n := newNode(t)
		n.dm.failAt = k
		d, err := n.tr.Create(t.Context(), "v", n.b, transport.Options{})
		if err != nil {
			t.Fatal(err)
		}
		if _, wrapped := d.(*Device); wrapped {
			if n.dm.step >= k {
				t.Errorf("step %d is not needed", k)
			}
			break
		}
		if len(n.dm.devices) > 0 {
			t.Errorf("step %d of %v: left %v", k, n.dm.log, n.dm.devices)
		}
		n.restart()
		if d, err := n.tr.Adopt(t.Context(), "v", n.b); err != nil || d.Path() != "/dev/inner1" {
			t.Errorf("step %d: adopted %v, %v", k, d, err)
		}
	}
	n := newNode(t)
	n.tr.usable = errFail
	if d, err := n.tr.Create(t.Context(), "v", n.b, transport.Options{}); err != nil || d.Path() != "/dev/inner1" {
		t.Errorf("%v, %v", d, err)
	}
}

// TestSysfsCannotTell: a device that cannot be looked for is not one that is gone.
func TestSysfsCannotTell(t *testing.T) {
	if inSysfs("no such name") {
		t.Error("found what there is not")
	}
	machine.WithoutDescriptors(t, func() {
		if !inSysfs("no such name") {
			t.Error("gone, though nobody could look")
		}
	})
}

func TestEnd(t *testing.T) {
	for _, native := range []bool{false, true} {
		for _, abort := range []bool{false, true} {
			n := newNode(t)
			d := n.create()
			if native {
				if err := d.ToBase("/base", yes); err != nil {
					t.Fatal(err)
				}
			}
			if abort {
				if err := d.Abort(); err != nil || n.inner.aborted != 1 {
					t.Errorf("%v, %d", err, n.inner.aborted)
				}
			} else {
				n.dm.table(t).open = true
				ctx, cancel := context.WithCancel(t.Context())
				cancel()
				if err := d.Close(ctx); err == nil {
					t.Error("closed in use")
				}
				n.atRest(d, native)
				n.dm.table(t).open = false
				if err := d.Close(t.Context()); err != nil {
					t.Error(err)
				}
			}
			if recs, err := n.tr.records.List(); err != nil || len(recs)+len(n.dm.devices)+len(n.inner.devices)+len(n.dm.loops) > 0 || d.Native() {
				t.Errorf("native %t, abort %t: left %v %v %v %v, %v", native, abort, recs, n.dm.devices, n.inner.devices, n.dm.loops, err)
			}
			n.create()
		}
	}
}

func TestResize(t *testing.T) {
	for _, native := range []bool{false, true} {
		n := newNode(t)
		d := n.create()
		if native {
			if err := d.ToBase("/base", yes); err != nil {
				t.Fatal(err)
			}
		}
		n.b.Grow(2 * size)
		n.dm.failAt = n.dm.step + 1 // load
		if err := d.Resize(); !errors.Is(err, errFail) {
			t.Error(err)
		}
		n.atRest(d, native)
		if err := d.Resize(); err != nil {
			t.Error(err)
		}
		if tab := n.dm.table(t); tab.sectors != 2*size>>sectorShift || tab.native() != native || d.Native() != native {
			t.Errorf("%+v", tab.state)
		}
	}
}

// TestNotBefore: only after a restart may requests wait for more than the volume.
func TestNotBefore(t *testing.T) {
	n := newNode(t)
	if at := n.create().NotBefore(); time.Now().Before(at) {
		t.Errorf("a new device is to wait until %v", at)
	}
	n.restart()
	if at := n.adopt().NotBefore(); time.Until(at) < 59*time.Minute {
		t.Errorf("one that was taken over is to wait until %v", at)
	}
}
