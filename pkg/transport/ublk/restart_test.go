package ublk

import (
	"errors"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/snapmerge/snapmerge/pkg/transport"
	"github.com/snapmerge/snapmerge/test/devicetest"
)

func TestKillUnderLoad(t *testing.T) {
	noLeftovers(t)
	devicetest.KillUnderLoad(t, 16, starter(t, t.TempDir()))
}

// TestKillFull: all tags of the queues are with the server that is killed.
func TestKillFull(t *testing.T) {
	noLeftovers(t)
	devicetest.KillUnderLoad(t, maxQueues*depth+16, starter(t, t.TempDir()))
}

func TestKillFio(t *testing.T) {
	noLeftovers(t)
	devicetest.KillFio(t, starter(t, t.TempDir()))
}

func TestKillWithMount(t *testing.T) {
	noLeftovers(t)
	devicetest.KillWithMount(t, starter(t, t.TempDir()), "discard")
}

// TestAdoptFromTheLiving waits for a server that does not die.
func TestAdoptFromTheLiving(t *testing.T) {
	noLeftovers(t)
	dir := t.TempDir()
	image := devicetest.Image(t, 1<<20)
	s := starter(t, dir)(image)
	dev := s.Line("ready")
	b, err := devicetest.OpenFile(image)
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	if _, err := New(dir).Adopt(within(t, time.Second), "v", b); !errors.Is(err, unix.EBUSY) {
		t.Errorf("adopted from a process that lives: %v", err)
	}
	f := devicetest.Open(t, dev, os.O_RDWR)
	if _, err := f.ReadAt(devicetest.Aligned(t, blockSize), 0); err != nil {
		t.Error(err)
	}
	f.Close()
	s.Finish()
}

// TestHalfMade leaves a device as a process does that is killed while it makes
// one, and a record without a device.
func TestHalfMade(t *testing.T) {
	noLeftovers(t)
	for _, next := range []string{"adopt", "create"} {
		tr := New(t.TempDir())
		if err := tr.records.Put("half", 77); err != nil {
			t.Fatal(err)
		}
		if err := withControl(func(c *control) error {
			_, err := c.add(devInfo{queues: 1, depth: depth, maxIO: maxIO, flags: flagsNeeded, tag: 77})
			return err
		}); err != nil {
			t.Fatal(err)
		}
		if next == "adopt" {
			if _, err := tr.Adopt(t.Context(), "half", devicetest.NewMemory(4096)); !errors.Is(err, transport.ErrNotFound) {
				t.Errorf("adopt: %v", err)
			}
		}
		d := create(t, tr, "half", devicetest.NewMemory(4096), transport.Options{})
		closeDevice(t, d)
		if err := tr.records.Put("gone", 78); err != nil {
			t.Fatal(err)
		}
		if left, err := tr.Leftovers(t.Context()); len(left) != 0 || err != nil {
			t.Errorf("leftovers %v, %v", left, err)
		}
		if _, err := tr.Adopt(t.Context(), "gone", devicetest.NewMemory(4096)); !errors.Is(err, transport.ErrNotFound) {
			t.Errorf("adopt of a record without a device: %v", err)
		}
		if _, err := tr.records.Get("gone"); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("its record: %v", err)
		}
	}
}

// TestAdoptSmaller serves a device from a volume that could not be opened.
func TestAdoptSmaller(t *testing.T) {
	noLeftovers(t)
	dir := t.TempDir()
	s := starter(t, dir)(devicetest.Image(t, 1<<20))
	dev := s.Line("ready")
	s.Kill()
	m := devicetest.NewMemory(blockSize)
	m.FailWith(unix.EIO)
	d, err := New(dir).Adopt(within(t, patience), "v", m)
	if err != nil {
		t.Fatal(err)
	}
	f := devicetest.Open(t, dev, os.O_RDWR)
	buf := devicetest.Aligned(t, blockSize)
	for _, off := range []int64{0, 512 << 10} {
		if _, err := f.ReadAt(buf, off); !errors.Is(err, unix.EIO) {
			t.Errorf("read at %d: %v", off, err)
		}
	}
	f.Close()
	if err := d.Abort(); err != nil {
		t.Error(err)
	}
}
