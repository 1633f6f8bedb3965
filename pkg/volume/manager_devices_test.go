package volume

import (
	"bytes"
	"context"
	"errors"
	"path"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/snapmerge/snapmerge/pkg/blockio"
	"github.com/snapmerge/snapmerge/pkg/blockio/crashfs"
	"github.com/snapmerge/snapmerge/pkg/transport"
)

// fakeTransport has devices that outlive a Manager, as with a keeper.
type fakeTransport struct {
	devices map[string]*fakeDevice
	fail    error // of Adopt
}

type fakeDevice struct {
	t       *fakeTransport
	volume  string
	b       transport.Backend
	busy    bool
	aborted bool
}

func (t *fakeTransport) Name() string { return "fake" }
func (t *fakeTransport) Probe() error { return nil }

func (t *fakeTransport) Create(_ context.Context, volume string, b transport.Backend, _ transport.Options) (transport.Device, error) {
	if t.devices[volume] != nil {
		return nil, errors.New("an earlier process has left its device")
	}
	t.devices[volume] = &fakeDevice{t: t, volume: volume, b: b}
	return t.devices[volume], nil
}

func (t *fakeTransport) Adopt(_ context.Context, volume string, b transport.Backend) (transport.Device, error) {
	d := t.devices[volume]
	switch {
	case d == nil:
		return nil, transport.ErrNotFound
	case t.fail != nil:
		return nil, t.fail
	}
	d.b = b
	return d, nil
}

func (t *fakeTransport) Discard([]string) error { return nil }

func (t *fakeTransport) Leftovers(context.Context) (ids []string, _ error) {
	for id := range t.devices {
		ids = append(ids, id)
	}
	slices.Sort(ids)
	return ids, nil
}

func (d *fakeDevice) Path() string            { return "/dev/fake-" + d.volume }
func (d *fakeDevice) Resize() error           { return nil }
func (d *fakeDevice) Failed() <-chan struct{} { return nil }

func (d *fakeDevice) Close(context.Context) error {
	if d.busy {
		return transport.ErrBusy
	}
	delete(d.t.devices, d.volume)
	return d.b.Flush()
}

func (d *fakeDevice) Transport() string { return d.t.Name() }

func (d *fakeDevice) Abort() error {
	d.aborted = true
	delete(d.t.devices, d.volume)
	return nil
}

// deviceNode is a Manager over a fake transport that can be started anew.
func deviceNode(t *testing.T) (start func() *Manager, stop func(), tr *fakeTransport, fs *crashfs.FS) {
	t.Helper()
	fs = crashfs.New("/n")
	tr = &fakeTransport{devices: map[string]*fakeDevice{}}
	var m *Manager
	stop = func() {
		if m != nil {
			if err := m.Close(); err != nil {
				t.Error(err)
			}
		}
		m = nil
	}
	t.Cleanup(stop)
	return func() *Manager {
		t.Helper()
		stop()
		cfg := managerConfig(fs)
		cfg.Transport = tr
		var err error
		if m, err = OpenManager(t.Context(), cfg); err != nil {
			t.Fatal(err)
		}
		return m
	}, stop, tr, fs
}

func attached(t *testing.T, m *Manager, id string) {
	t.Helper()
	if _, err := m.CreateVolume(t.Context(), VolumeSpec{ID: id, Size: nodeVolume}); err != nil {
		t.Fatal(err)
	}
	if _, err := m.Attach(t.Context(), id, transport.Options{}); err != nil {
		t.Fatal(err)
	}
}

// TestLeftoverDevice: a device that cannot be taken over at the start is not
// forgotten.
func TestLeftoverDevice(t *testing.T) {
	start, _, tr, _ := deviceNode(t)
	attached(t, start(), "v")
	no := errors.New("not now")
	tr.fail = no
	m := start()
	if st, err := m.Status("v"); err != nil || !st.DeviceDown {
		t.Errorf("%+v, %v", st, err)
	}
	if err := m.Detach(t.Context(), "v"); !errors.Is(err, no) {
		t.Errorf("detach: %v", err)
	}
	if err := m.DeleteVolume("v"); !errors.Is(err, ErrStaged) {
		t.Errorf("delete: %v", err)
	}
	if _, err := m.Attach(t.Context(), "v", transport.Options{}); !errors.Is(err, no) {
		t.Errorf("attach: %v", err)
	}
	tr.fail = nil
	tr.devices["v"].busy = true
	if err := m.Detach(t.Context(), "v"); !errors.Is(err, transport.ErrBusy) {
		t.Errorf("detach of a busy one: %v", err)
	}
	if st, err := m.Status("v"); err != nil || st.DeviceDown || st.Device == "" {
		t.Errorf("%+v, %v", st, err)
	}
	if _, err := tr.devices["v"].b.ReadAt(make([]byte, bs), 0); err != nil {
		t.Errorf("it is not served by its volume: %v", err)
	}
	tr.devices["v"].busy = false
	if err := errors.Join(m.Detach(t.Context(), "v"), m.DeleteVolume("v")); err != nil || len(tr.devices) > 0 {
		t.Error(err, tr.devices)
	}
}

// TestOrphanDevice: a device of a volume that is gone never becomes that of a
// new volume of the same id.
func TestOrphanDevice(t *testing.T) {
	start, _, tr, fs := deviceNode(t)
	attached(t, start(), "v")
	if err := fs.RemoveAll("/n/volumes/v"); err != nil {
		t.Fatal(err)
	}
	tr.fail = errors.New("not now")
	old := tr.devices["v"]
	m := start()
	tr.fail = nil
	attached(t, m, "v")
	if !old.aborted || tr.devices["v"] == old {
		t.Error("the new volume has the device of the old one")
	}
	if _, err := old.b.ReadAt(make([]byte, bs), 0); !errors.Is(err, syscall.EIO) {
		t.Errorf("who reads from the old device gets %v", err)
	}
}

// TestBrokenDevice: the device of a volume that cannot be opened answers errors;
// when it can be, there is a new device as soon as nobody uses that one.
func TestBrokenDevice(t *testing.T) {
	start, _, tr, fs := deviceNode(t)
	attached(t, start(), "v")
	if err := fs.Rename("/n/volumes/v/base.img", "/n/volumes/v/away"); err != nil {
		t.Fatal(err)
	}
	m := start()
	old := tr.devices["v"]
	if err := old.b.Flush(); !errors.Is(err, syscall.EIO) {
		t.Errorf("flush: %v", err)
	}
	if st, err := m.Status("v"); err != nil || st.Device == "" || st.Error == "" {
		t.Errorf("%+v, %v", st, err)
	}
	if err := m.DeleteVolume("v"); !errors.Is(err, ErrStaged) {
		t.Errorf("delete: %v", err)
	}
	if err := fs.Rename("/n/volumes/v/away", "/n/volumes/v/base.img"); err != nil {
		t.Fatal(err)
	}
	old.busy = true
	if _, err := m.Attach(t.Context(), "v", transport.Options{}); !errors.Is(err, transport.ErrBusy) {
		t.Errorf("attach while the old one is in use: %v", err)
	}
	old.busy = false
	if _, err := m.Attach(t.Context(), "v", transport.Options{}); err != nil {
		t.Fatal(err)
	}
	if d := tr.devices["v"]; d == old || d.b.Flush() != nil {
		t.Error("it still has the broken device")
	}
	if err := m.Detach(t.Context(), "v"); err != nil {
		t.Error(err)
	}
}

// noListFS fails the second listing of the snapshots: the one after the store was
// opened.
type noListFS struct {
	blockio.FS
	lists int
}

var errNoList = errors.New("no listing")

func (f *noListFS) ReadDir(name string) ([]string, error) {
	if path.Base(name) == snapshotsDir {
		if f.lists++; f.lists == 2 {
			return nil, errNoList
		}
	}
	return f.FS.ReadDir(name)
}

// TestOpenFailsBeforeAdopt: a Manager that cannot be opened leaves the devices to
// the next one.
func TestOpenFailsBeforeAdopt(t *testing.T) {
	start, stop, tr, fs := deviceNode(t)
	attached(t, start(), "v")
	stop()
	old := tr.devices["v"].b
	cfg := managerConfig(&noListFS{FS: fs})
	cfg.Transport = tr
	if _, err := OpenManager(t.Context(), cfg); !errors.Is(err, errNoList) {
		t.Fatalf("error %v", err)
	}
	if tr.devices["v"].b != old {
		t.Error("the device is served by a volume that is closed")
	}
	start()
	if err := tr.devices["v"].b.Flush(); err != nil {
		t.Errorf("the next one does not serve it: %v", err)
	}
}

// failFlush fails the next flush of the file that ends so.
func failFlush(fs *crashfs.FS, name string) {
	var failed atomic.Bool
	fs.OnStep(func(s crashfs.Step) error {
		if s.Op == crashfs.OpFlush && strings.HasSuffix(s.Name, name) && failed.CompareAndSwap(false, true) {
			return syscall.EIO
		}
		return nil
	})
}

// TestFailedFlushMended: a volume one flush of which has failed takes no writes as long as
// it has its device, and takes them again when it gets another. What was flushed before
// stays, a power cut or not.
func TestFailedFlushMended(t *testing.T) {
	for _, file := range []string{"/v/" + baseName, "/v/" + logName(1)} {
		start, _, tr, fs := deviceNode(t)
		m := start()
		attached(t, m, "v")
		first, err := m.Get("v")
		if err != nil {
			t.Fatal(err)
		}
		want := bytes.Repeat([]byte{1}, bs)
		write := func(off int64) error {
			_, err := tr.devices["v"].b.WriteAt(want, off)
			return errors.Join(err, tr.devices["v"].b.Flush())
		}
		if strings.HasSuffix(file, ".log") { // into which the cut has the block go
			if err := errors.Join(first.SetPaused(true), first.Cut("s", nil), write(0), first.EndCut("s")); err != nil {
				t.Fatal(err)
			}
		} else if err := write(0); err != nil {
			t.Fatal(err)
		}
		failFlush(fs, file)
		if _, err := first.WriteAt(want, 0); err != nil {
			t.Fatal(err)
		}
		if err := tr.devices["v"].b.Flush(); !errors.Is(err, syscall.EIO) {
			t.Fatalf("%s: flush: %v", file, err)
		}
		if _, err := m.Attach(t.Context(), "v", transport.Options{}); err != nil || write(bs) == nil {
			t.Errorf("%s: it takes writes with the same device (%v)", file, err)
		}
		if err := m.Abort("v"); err != nil {
			t.Fatal(err)
		}
		if _, err := m.Attach(t.Context(), "v", transport.Options{}); err != nil {
			t.Fatal(err)
		}
		if err := write(bs); err != nil {
			t.Errorf("%s: with another device: %v", file, err)
		}
		if err := first.Update(func(r *Record) { r.Name = "late" }); err == nil {
			t.Errorf("%s: who has the closed volume can change its record", file)
		}
		after, err := OpenManager(t.Context(), managerConfig(fs.Crash(crashfs.Nothing)))
		if err != nil {
			t.Fatal(err)
		}
		v, err := after.Get("v")
		if err != nil {
			t.Fatal(err)
		}
		if got, err := readAll(v); err != nil || !bytes.Equal(got[:2*bs], append(want, want...)) {
			t.Errorf("%s: what was flushed is lost (%v)", file, err)
		}
		if err := after.Close(); err != nil {
			t.Error(err)
		}
	}
}

// TestFailedFlushStays: a volume is not opened anew while a snapshot of it is encoded, and
// if it cannot be, whoever asks is told why until it can.
func TestFailedFlushStays(t *testing.T) {
	start, _, _, fs := deviceNode(t)
	m := start()
	first, err := m.CreateVolume(t.Context(), VolumeSpec{ID: "v", Size: nodeVolume})
	if err != nil {
		t.Fatal(err)
	}
	if err := first.Cut("s", nil); err != nil {
		t.Fatal(err)
	}
	first.fail(syscall.EIO)
	if v, err := m.Open(t.Context(), "v"); v != first || err != nil {
		t.Errorf("with a cut: another volume, or %v", err)
	}
	if err := errors.Join(first.EndCut("s"), fs.Rename("/n/volumes/v/base.img", "/n/volumes/v/away")); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if _, err := m.Open(t.Context(), "v"); !errors.Is(err, syscall.ENOENT) || errors.Is(err, ErrNotFound) {
			t.Errorf("without its base: %v", err)
		}
	}
	if st, err := m.Status("v"); err != nil || st.State != Failed || !strings.Contains(st.Error, "base.img") {
		t.Errorf("%+v, %v", st, err)
	}
	if err := fs.Rename("/n/volumes/v/away", "/n/volumes/v/base.img"); err != nil {
		t.Fatal(err)
	}
	v, err := m.Open(t.Context(), "v")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := v.WriteAt(make([]byte, bs), 0); err != nil {
		t.Error(err)
	}
}
