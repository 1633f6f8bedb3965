package volume

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"testing"

	"github.com/snapmerge/snapmerge/pkg/blockio/crashfs"
	"github.com/snapmerge/snapmerge/pkg/transport"
)

// throughTransport is a fakeTransport whose devices pass through where they may.
type throughTransport struct {
	*fakeTransport
	create  error // of Create, once it has asked
	discard error
	fs      *crashfs.FS
}

// throughDevice has its state as long as the device is in service.
type throughDevice struct {
	*fakeDevice
	base string // "": it does not pass through
}

func (d *throughDevice) Native() bool { return d.base != "" }

func (t *throughTransport) Create(ctx context.Context, volume string, b transport.Backend, o transport.Options) (transport.Device, error) {
	base := ""
	if o.Base != nil {
		// No crash may find the device at work before the record says so.
		if file, err := o.Base(); err == nil {
			base = file
			if rec, err := ReadRecord(t.fs, "/n/volumes/"+volume); err != nil || rec.Native != GoneNative {
				return nil, errors.Join(errors.New("the base was given without a record"), err)
			}
		}
		if t.create != nil {
			return nil, t.create
		}
	}
	d, err := t.fakeTransport.Create(ctx, volume, b, o)
	if err != nil {
		return nil, err
	}
	return &throughDevice{d.(*fakeDevice), base}, nil
}

func (t *throughTransport) Adopt(ctx context.Context, volume string, b transport.Backend) (transport.Device, error) {
	d, err := t.fakeTransport.Adopt(ctx, volume, b)
	if err != nil {
		return nil, err
	}
	return &throughDevice{d.(*fakeDevice), "/n/volumes/" + volume + "/" + baseName}, nil
}

func (t *throughTransport) Discard([]string) error { return t.discard }

// throughNode is deviceNode with devices that pass through.
func throughNode(t *testing.T) (start func() *Manager, tr *throughTransport) {
	t.Helper()
	fs := crashfs.New("/n")
	tr = &throughTransport{fakeTransport: &fakeTransport{devices: map[string]*fakeDevice{}}, fs: fs}
	var m *Manager
	stop := func() {
		if m != nil {
			if err := m.Close(); err != nil {
				t.Error(err)
			}
		}
	}
	t.Cleanup(stop)
	return func() *Manager {
		t.Helper()
		stop()
		m = nil
		cfg := managerConfig(fs)
		cfg.Transport = tr
		var err error
		if m, err = OpenManager(t.Context(), cfg); err != nil {
			t.Fatal(err)
		}
		return m
	}, tr
}

// throughVolume makes a volume and attaches it so that it passes through.
func throughVolume(t *testing.T, m *Manager) *Volume {
	t.Helper()
	v, err := m.CreateVolume(t.Context(), VolumeSpec{ID: "v", Size: nodeVolume})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := m.Attach(t.Context(), "v", transport.Options{Base: v.Passthrough}); err != nil {
		t.Fatal(err)
	}
	return v
}

func wantNative(t *testing.T, m *Manager, native bool) {
	t.Helper()
	v, err := m.Get("v")
	if err != nil {
		t.Fatal(err)
	}
	want := NativeState("")
	if native {
		want = GoneNative
	}
	if s := v.Status(); v.Record().Native != want || (s.State == Native) != native {
		t.Errorf("record %q, state %s; want native %t", v.Record().Native, s.State, native)
	}
}

// TestPassthroughLife: a volume that passes through takes no snapshot until it is
// detached, and does not pass through again while there is anything above its base.
func TestPassthroughLife(t *testing.T) {
	start, tr := throughNode(t)
	m := start()
	v := throughVolume(t, m)
	wantNative(t, m, true)
	tr.fs.OnStep(func(at crashfs.Step) error {
		t.Errorf("%v for a snapshot that is refused", at)
		return nil
	})
	if _, err := m.CreateSnapshot(SnapshotSpec{ID: "s", Volume: "v"}); !errors.Is(err, ErrOffline) {
		t.Errorf("snapshot: %v", err)
	}
	tr.fs.OnStep(nil)
	if err := v.Cut("s", nil); !errors.Is(err, ErrOffline) {
		t.Errorf("cut: %v", err)
	}
	if all, err := m.Snapshots(); err != nil || len(all) > 0 {
		t.Errorf("a snapshot was begun: %v, %v", all, err)
	}
	if size, err := m.Expand("v", 2*nodeVolume); err != nil || size != 2*nodeVolume {
		t.Errorf("expanded to %d, %v", size, err)
	}
	wantNative(t, m, true)
	m = start() // the next process takes the device over
	wantNative(t, m, true)
	if _, err := m.CreateSnapshot(SnapshotSpec{ID: "s", Volume: "v"}); !errors.Is(err, ErrOffline) {
		t.Errorf("snapshot after a restart: %v", err)
	}
	if err := m.Detach(t.Context(), "v"); err != nil {
		t.Fatal(err)
	}
	wantNative(t, m, false)
	v, err := m.Get("v")
	if err == nil {
		err = v.SetPaused(true) // so that the layer stays
	}
	if err != nil {
		t.Fatal(err)
	}
	if _, err := m.CreateSnapshot(SnapshotSpec{ID: "s", Volume: "v"}); err != nil {
		t.Fatal(err)
	}
	if _, err := m.Attach(t.Context(), "v", transport.Options{Base: v.Passthrough}); err != nil {
		t.Fatal(err)
	}
	wantNative(t, m, false)
	if d := tr.devices["v"]; d == nil {
		t.Error("no device")
	}
}

// TestPassthroughFlush: what went past the volume is durable when its flush returns.
func TestPassthroughFlush(t *testing.T) {
	start, tr := throughNode(t)
	v := throughVolume(t, start())
	f, err := tr.fs.Open("/n/volumes/v/"+baseName, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for i := range byte(3) {
		want := bytes.Repeat([]byte{i + 1}, bs)
		if _, err := f.WriteAt(want, bs); err != nil { // the guest
			t.Fatal(err)
		}
		if err := v.Flush(); err != nil {
			t.Fatal(err)
		}
		for class, image := range tr.fs.CrashImages(8, rand.New(rand.NewPCG(2, uint64(i)))) {
			g, err := image.Open("/n/volumes/v/"+baseName, 0)
			if err != nil {
				t.Fatal(err)
			}
			got := make([]byte, bs)
			if _, err := g.ReadAt(got, bs); err != nil || !bytes.Equal(got, want) {
				t.Errorf("write %d, %s: a flushed write is lost (%v)", i, class, err)
			}
			g.Close()
		}
	}
}

// TestPassthroughUncertain: as long as something may be left of a device that passed
// through, the volume takes no layer.
func TestPassthroughUncertain(t *testing.T) {
	no := errors.New("no")
	layerless := func(t *testing.T, m *Manager) {
		t.Helper()
		if _, err := m.CreateSnapshot(SnapshotSpec{ID: "s", Volume: "v"}); !errors.Is(err, ErrNative) {
			t.Errorf("snapshot: %v", err)
		}
	}
	snapshot := func(t *testing.T, m *Manager) {
		t.Helper()
		wantNative(t, m, false)
		if _, err := m.CreateSnapshot(SnapshotSpec{ID: "s", Volume: "v"}); err != nil {
			t.Errorf("snapshot: %v", err)
		}
	}
	t.Run("device gone at the start", func(t *testing.T) {
		start, tr := throughNode(t)
		throughVolume(t, start())
		delete(tr.devices, "v")
		tr.discard = no
		layerless(t, start())
		tr.discard = nil
		snapshot(t, start())
	})
	t.Run("not made", func(t *testing.T) {
		start, tr := throughNode(t)
		m := start()
		v, err := m.CreateVolume(t.Context(), VolumeSpec{ID: "v", Size: nodeVolume})
		if err != nil {
			t.Fatal(err)
		}
		attach := func() error {
			_, err := m.Attach(t.Context(), "v", transport.Options{Base: v.Passthrough})
			return err
		}
		// A volume that was staged before knows that it has no device.
		if err := errors.Join(attach(), m.Detach(t.Context(), "v")); err != nil {
			t.Fatal(err)
		}
		tr.create, tr.discard = no, no
		if err := attach(); !errors.Is(err, no) {
			t.Fatal(err)
		}
		layerless(t, m)
		tr.discard = nil
		if err := attach(); !errors.Is(err, no) {
			t.Fatal(err)
		}
		snapshot(t, m)
	})
	t.Run("gone while it is taken over", func(t *testing.T) {
		start, tr := throughNode(t)
		throughVolume(t, start())
		tr.fail = transport.ErrNotFound
		tr.discard = no
		layerless(t, start())
		tr.discard = nil
		m := start()
		snapshot(t, m)
	})
	t.Run("not taken over yet", func(t *testing.T) {
		start, tr := throughNode(t)
		throughVolume(t, start())
		tr.fail = no
		layerless(t, start())
	})
}

// TestPassthroughRefused: the record is as it was if the base is not given.
func TestPassthroughRefused(t *testing.T) {
	fs, v := handoverVolume(t)
	if err := v.Cut("s", nil); err != nil {
		t.Fatal(err)
	}
	if file, err := v.Passthrough(); err == nil {
		t.Errorf("gave %s of a volume with a layer", file)
	}
	if rec, err := ReadRecord(fs, "/s/v"); err != nil || rec.Native != "" {
		t.Errorf("%+v, %v", rec, err)
	}
	fs, v = handoverVolume(t)
	no := errors.New("no")
	fs.OnStep(func(crashfs.Step) error { return no })
	if file, err := v.Passthrough(); err == nil {
		t.Errorf("gave %s without a record", file)
	}
	fs.OnStep(nil)
}
