package volume

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/snapmerge/snapmerge/pkg/blockio/crashfs"
	"github.com/snapmerge/snapmerge/pkg/transport"
)

// swapDevice is a device that can be handed over. What it does outlives a process.
type swapDevice struct {
	transport.Device
	native bool
	fail   error     // of both swaps
	early  time.Time // NotBefore
	step   func()    // before and after a swap
	calls  int
}

func (d *swapDevice) Path() string { return "/dev/none" }

func (d *swapDevice) NotBefore() time.Time { return d.early }

func (d *swapDevice) Native() bool { return d.native }

func (d *swapDevice) ToBase(_ string, still func() error) error {
	d.calls++
	d.step()
	if err := errors.Join(still(), d.fail); err != nil {
		return err
	}
	d.native = true
	d.step()
	return nil
}

func (d *swapDevice) Back(_ context.Context, now func()) error {
	d.calls++
	d.step()
	if now(); d.fail != nil {
		return d.fail
	}
	d.native = false
	d.step()
	return nil
}

// handoverVolume is a volume of zeros that was never restored.
func handoverVolume(t *testing.T) (*crashfs.FS, *Volume) {
	t.Helper()
	fs := crashfs.New("/s")
	if err := errors.Join(Create(fs, "/s/v", Spec{ID: "v", Size: 8 * bs}), fs.SyncDir("/s"), fs.SyncDir("/")); err != nil {
		t.Fatal(err)
	}
	v, err := openVolume(fs)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { v.Close() })
	return fs, v
}

// checkHandover: a request may go past the volume only if that is recorded, and there
// is nothing above the base then.
func checkHandover(fs *crashfs.FS, native bool) error {
	rec, err := ReadRecord(fs, "/s/v")
	if err != nil {
		return err
	}
	if native && (rec.Native == "" || len(rec.Layers) > 0 || rec.Cut != nil) {
		return fmt.Errorf("requests go to the base, and the record says native %q, %d layers, cut %v", rec.Native, len(rec.Layers), rec.Cut)
	}
	return nil
}

// TestHandOverCrash goes through hand-overs and what ends them, with a crash of the
// process and one of the power before each step of disk and device. After one of the
// process the device does what it did.
func TestHandOverCrash(t *testing.T) {
	fs, v := handoverVolume(t)
	dev := &swapDevice{}
	rng := rand.New(rand.NewPCG(1, 1))
	act, crashes := "", 0
	crash := func() {
		if !dev.native && v.Record().Native == GoneNative && v.isNative.Load() {
			t.Errorf("%s: the status would say %s, and the device still asks the volume", act, Native)
		}
		for class, image := range fs.CrashImages(3, rng) {
			// The record that is durable is the one that any crash leaves, the process's
			// alone included.
			crashes++
			err := checkHandover(image, dev.native)
			if err == nil {
				err = restartedAfterCrash(image, dev.native)
			}
			if err != nil {
				t.Fatalf("%s: device native %t, %s: %v", act, dev.native, class, err)
			}
		}
	}
	dev.step = crash
	fs.OnStep(func(crashfs.Step) error { crash(); return nil })
	defer fs.OnStep(nil)
	step := func() error {
		_, err := v.Step(t.Context())
		return err
	}
	for _, a := range []struct {
		name   string
		do     func() error
		native bool
	}{
		{"attach", func() error { v.setDevice(dev); return nil }, false},
		{"hand over", step, true},
		{"again", step, true},
		{"cut", func() error { return v.Cut("s", nil) }, false},
		{"not yet", step, false},
		{"write to the log", func() error { _, err := v.WriteAt(bytes.Repeat([]byte{1}, bs), 0); return err }, false},
		{"end of the cut", func() error { return v.EndCut("s") }, false},
		{"fold", step, false},
		{"hand over again", step, true},
		{"expand", func() error { return v.Expand(9 * bs) }, false},
		{"and again", step, true},
		{"detach", func() error { dev.native = false; v.setDevice(nil); return nil }, false},
		{"nothing to hand over", step, false},
	} {
		act = a.name
		if err := a.do(); err != nil {
			t.Fatalf("%s: %v", a.name, err)
		}
		want := NativeState("")
		if a.native {
			want = GoneNative
		}
		if dev.native != a.native || v.Record().Native != want || (v.Status().State == Native) != a.native {
			t.Fatalf("%s: device native %t, record %q, state %s", a.name, dev.native, v.Record().Native, v.Status().State)
		}
	}
	t.Logf("%d crashes", crashes)
}

// restartedAfterCrash is the next process: it finds out what the device does, and can
// make a cut.
func restartedAfterCrash(fs *crashfs.FS, native bool) error {
	v, err := openVolume(fs)
	if err != nil {
		return err
	}
	defer v.Close()
	found := v.Record().Native
	d := &swapDevice{native: native}
	d.step = func() {
		if e := checkHandover(fs, d.native); e != nil && err == nil {
			err = e
		}
	}
	if found != "" {
		if e := v.Cut("early", nil); !errors.Is(e, ErrNative) {
			return fmt.Errorf("cut before it is known where requests go: %v", e)
		}
	}
	v.setDevice(d)
	if want := native && found == GoneNative; d.native != want || (v.Record().Native == GoneNative) != want {
		return fmt.Errorf("found %q and a device that is native %t; then it was %q and %t", found, native, v.Record().Native, d.native)
	}
	if e := v.Cut("late", nil); e != nil && !errors.Is(e, ErrCutInFlight) {
		return e
	}
	if d.native || v.Record().Native != "" || len(v.Record().Layers) == 0 {
		return fmt.Errorf("cut with a device that is native %t, record %q", d.native, v.Record().Native)
	}
	return err
}

// TestHandOverFails: the volume works on by its transport, or by its base if only that
// goes on.
func TestHandOverFails(t *testing.T) {
	fs, v := handoverVolume(t)
	no := errors.New("no")
	dev := &swapDevice{fail: no, step: func() {}}
	v.setDevice(dev)
	for i := range 2 { // it is tried again when there is a reason to
		if more, err := v.Step(t.Context()); more || err != nil {
			t.Errorf("%t, %v", more, err)
		}
		if dev.native || v.Record().Native != "" || dev.calls != i+1 || v.Status().State != Unstaged {
			t.Errorf("native %t, record %q, %d calls, %+v", dev.native, v.Record().Native, dev.calls, v.Status())
		}
	}
	// The record cannot be written: nothing is swapped.
	calls := dev.calls
	fs.OnStep(func(crashfs.Step) error { return no })
	_, _ = v.Step(t.Context())
	fs.OnStep(nil)
	if dev.calls != calls {
		t.Error("swapped without a record")
	}
}

func TestComeBackFails(t *testing.T) {
	_, v := handoverVolume(t)
	no := errors.New("no")
	dev := &swapDevice{step: func() {}}
	v.setDevice(dev)
	if _, err := v.Step(t.Context()); err != nil || !dev.native {
		t.Fatal(err)
	}
	dev.fail = no
	for name, do := range map[string]func() error{
		"cut":    func() error { return v.Cut("s", nil) },
		"expand": func() error { return v.Expand(9 * bs) },
	} {
		if err := do(); !errors.Is(err, no) {
			t.Errorf("%s: %v", name, err)
		}
		if r := v.Record(); !dev.native || r.Native != Returning || len(r.Layers) > 0 || r.Cut != nil || v.Size() != 8*bs {
			t.Errorf("%s: %+v", name, r)
		}
	}
	dev.fail = nil
	if err := v.Cut("s", nil); err != nil || dev.native {
		t.Errorf("%v, native %t", err, dev.native)
	}
}

// TestComeBackFlushes: what went to the base is flushed with the next flush.
func TestComeBackFlushes(t *testing.T) {
	fs, v := handoverVolume(t)
	dev := &swapDevice{step: func() {}}
	v.setDevice(dev)
	_, err := v.Step(t.Context())
	if err := errors.Join(err, v.Flush()); err != nil || !dev.native {
		t.Fatal(err)
	}
	f, err := fs.Open("/s/v/base.img", 0)
	if err != nil {
		t.Fatal(err)
	}
	want := bytes.Repeat([]byte{7}, bs)
	if _, err := f.WriteAt(want, bs); err != nil { // the guest
		t.Fatal(err)
	}
	if err := v.Cut("s", nil); err != nil {
		t.Fatal(err)
	}
	if err := v.Flush(); err != nil {
		t.Fatal(err)
	}
	for class, image := range fs.CrashImages(8, rand.New(rand.NewPCG(2, 2))) {
		g, err := image.Open("/s/v/base.img", 0)
		if err != nil {
			t.Fatal(err)
		}
		got := make([]byte, bs)
		if _, err := g.ReadAt(got, bs); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: a flushed write is lost (%v)", class, err)
		}
		g.Close()
	}
	f.Close()
}

// TestNativeRecord: records that cannot be.
func TestNativeRecord(t *testing.T) {
	_, v := handoverVolume(t)
	ok := *v.Record()
	for name, change := range map[string]func(r *Record){
		"unknown state": func(r *Record) { r.Native = "perhaps" },
		"with a layer": func(r *Record) {
			r.Native, r.NextLayer, r.Layers = GoneNative, 2, []LayerRecord{{ID: 1, File: "layer-001.log", Log: &LogRecord{}}}
		},
	} {
		r := ok
		if change(&r); r.check() == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	if err := v.markNative(GoneNative); err != nil || v.Record().Format != nativeFormat {
		t.Errorf("%v, format %d", err, v.Record().Format)
	}
	if err := v.markNative(""); err != nil || v.Record().Format != recordFormat {
		t.Errorf("%v, format %d", err, v.Record().Format)
	}
}

// TestHandOverNotBefore: the hand-over waits as long as the device asks for.
func TestHandOverNotBefore(t *testing.T) {
	_, v := handoverVolume(t)
	dev := &swapDevice{step: func() {}, early: time.Now().Add(time.Hour)}
	v.setDevice(dev)
	for _, want := range []bool{false, true} {
		if _, err := v.Step(t.Context()); err != nil || dev.native != want || (v.Record().Native == GoneNative) != want {
			t.Errorf("native %t, record %q, %v, want %t", dev.native, v.Record().Native, err, want)
		}
		dev.early = time.Now()
	}
	dev.early = time.Now().Add(50 * time.Millisecond)
	if err := v.Cut("s", nil); err != nil {
		t.Fatal(err)
	}
	if err := v.EndCut("s"); err != nil {
		t.Fatal(err)
	}
	v.Start()
	for end := time.Now().Add(30 * time.Second); v.Status().State != Native; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("never handed over: %+v", v.Status())
		}
	}
	if time.Now().Before(dev.early) {
		t.Error("handed over too early")
	}
}
