package ublk

import (
	"errors"
	"os"
	"os/exec"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/snapmerge/snapmerge/pkg/transport"
	"github.com/snapmerge/snapmerge/test/devicetest"
)

// TestCloseBusy expects a device that is open or mounted to stay in service.
func TestCloseBusy(t *testing.T) {
	noLeftovers(t)
	m := devicetest.NewMemory(16 << 20)
	tr := New(t.TempDir())
	d := create(t, tr, "busy", m, transport.Options{})
	f := devicetest.Open(t, d.Path(), os.O_RDWR)
	stillServes := func(what string) {
		t.Helper()
		if err := d.Close(within(t, patience)); !errors.Is(err, transport.ErrBusy) {
			t.Fatalf("%s: close gives %v", what, err)
		}
		if _, err := f.ReadAt(devicetest.Aligned(t, blockSize), 0); err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
	stillServes("open")
	if out, err := exec.Command("mkfs.ext4", "-q", d.Path()).CombinedOutput(); err != nil {
		t.Skipf("mkfs.ext4: %v: %s", err, out)
	}
	dir := t.TempDir()
	if err := unix.Mount(d.Path(), dir, "ext4", 0, ""); err != nil {
		t.Fatal(err)
	}
	stillServes("mounted")
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	if err := d.Close(within(t, patience)); !errors.Is(err, transport.ErrBusy) {
		t.Errorf("mounted alone: close gives %v", err)
	}
	if err := unix.Unmount(dir, 0); err != nil {
		t.Fatal(err)
	}
	flushes := m.Flushes.Load()
	closeDevice(t, d)
	if m.Flushes.Load() == flushes {
		t.Error("close did not flush the backend")
	}
	closeDevice(t, d)
	if _, err := os.Stat(d.Path()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("node is still there: %v", err)
	}
	// Its number and its record are free.
	closeDevice(t, create(t, tr, "busy", m, transport.Options{}))
}

// TestCloseWritesDirtyPages leaves dirty pages in the cache of the device.
func TestCloseWritesDirtyPages(t *testing.T) {
	noLeftovers(t)
	m := devicetest.NewMemory(1 << 20)
	d := create(t, New(t.TempDir()), "dirty", m, transport.Options{})
	f, err := os.OpenFile(d.Path(), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt([]byte("dirty"), 5*blockSize); err != nil {
		t.Fatal(err)
	}
	f.Close()
	closeDevice(t, d)
	if string(m.Content()[5*blockSize:5*blockSize+5]) != "dirty" {
		t.Error("lost")
	}
}

// TestAbortHung has a backend that does not return: what waits for it gets EIO,
// and so does who has the device mounted or open.
func TestAbortHung(t *testing.T) {
	noLeftovers(t)
	m := devicetest.NewMemory(1 << 20)
	tr := New(t.TempDir())
	d := create(t, tr, "hung", m, transport.Options{})
	release := m.Hang()
	defer release()
	errs := make(chan error, 3)
	for i := range 3 {
		f := devicetest.Open(t, d.Path(), os.O_RDWR)
		buf := devicetest.Aligned(t, blockSize)
		go func() {
			_, err := f.WriteAt(buf, int64(i)*blockSize)
			errs <- err
			f.Close()
		}()
	}
	eventually(t, "the writes arrive", func() bool { return m.Writes.Load() == 3 })
	begin := time.Now()
	if err := d.Abort(); err != nil {
		t.Error(err)
	}
	took := time.Since(begin)
	for range 3 {
		if err := <-errs; !errors.Is(err, unix.EIO) {
			t.Errorf("write gives %v", err)
		}
	}
	if took > 45*time.Second { // seconds, with what a slow machine adds
		t.Errorf("abort took %v", took)
	}
	t.Logf("abort took %v", took)
	select {
	case <-d.Failed():
		t.Error("an aborted device has failed")
	default:
	}
	if err := d.Abort(); err != nil {
		t.Errorf("twice: %v", err)
	}
	release()
	create(t, tr, "hung", m, transport.Options{})
}

// TestStoppedByOthers removes the device behind the transport's back. Its number goes to
// the next one, which is not to be taken away in its place.
func TestStoppedByOthers(t *testing.T) {
	noLeftovers(t)
	tr := New(t.TempDir())
	d := create(t, tr, "stopped", devicetest.NewMemory(1<<20), transport.Options{})
	if err := withControl(func(c *control) error { return errors.Join(c.stop(d.id), c.remove(d.id)) }); err != nil {
		t.Fatal(err)
	}
	select {
	case <-d.Failed():
	case <-time.After(patience):
		t.Error("nobody has noticed")
	}
	next := create(t, tr, "next", devicetest.NewMemory(1<<20), transport.Options{})
	if next.id != d.id {
		t.Errorf("the next device is %s, want %s", next.Path(), d.Path())
	}
	if err := d.Abort(); err != nil {
		t.Error(err)
	}
	f := devicetest.Open(t, next.Path(), os.O_RDWR)
	if _, err := f.ReadAt(devicetest.Aligned(t, blockSize), 0); err != nil {
		t.Errorf("the next device: %v", err)
	}
	f.Close()
	create(t, tr, "stopped", devicetest.NewMemory(1<<20), transport.Options{})
}
