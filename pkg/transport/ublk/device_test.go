package ublk

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/snapmerge/snapmerge/pkg/transport"
	"github.com/snapmerge/snapmerge/test/devicetest"
)

// TestRandomIO works on two devices at once and compares with a model.
func TestRandomIO(t *testing.T) {
	noLeftovers(t)
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	tr := New(t.TempDir())
	var wg sync.WaitGroup
	defer wg.Wait()
	for i := range 2 {
		m := devicetest.NewMemory(8 << 20)
		d := create(t, tr, fmt.Sprint("random-", i), m, transport.Options{})
		f := devicetest.Open(t, d.Path(), os.O_RDWR)
		buf := devicetest.Aligned(t, 1<<20)
		wg.Go(func() { devicetest.RandomIO(t, f, m, buf, rand.New(rand.NewPCG(seed, uint64(i))), 400, true) })
	}
	wg.Wait()
}

// TestBusyLoad has more requests in flight than a queue is deep.
func TestBusyLoad(t *testing.T) {
	noLeftovers(t)
	d := create(t, New(t.TempDir()), "busy", devicetest.NewMemory(80<<20), transport.Options{})
	l := devicetest.StartLoad(t, d.Path(), 40, 1)
	time.Sleep(time.Second) // some load
	ops, longest := l.Finish()
	t.Logf("%d requests, the slowest took %v", ops, longest)
}

func TestDeviceShape(t *testing.T) {
	noLeftovers(t)
	d := create(t, New(t.TempDir()), "shape", devicetest.NewMemory(1<<20), transport.Options{})
	for file, want := range map[string]string{
		"size":                         "2048",
		"ro":                           "0",
		"queue/logical_block_size":     "4096",
		"queue/physical_block_size":    "4096",
		"queue/discard_granularity":    "4096",
		"queue/discard_max_bytes":      fmt.Sprint(maxZero),
		"queue/write_zeroes_max_bytes": fmt.Sprint(maxZero),
		"queue/max_hw_sectors_kb":      fmt.Sprint(maxIO >> 10),
		"queue/write_cache":            "write back",
		"queue/fua":                    "1",
		"queue/nr_requests":            fmt.Sprint(depth - 1),
		"queue/io_timeout":             "1000",
	} {
		b, err := os.ReadFile(filepath.Join(d.sysfs(), file))
		if got := strings.TrimSpace(string(b)); err != nil || got != want {
			t.Errorf("%s is %q, want %q (%v)", file, got, want, err)
		}
	}
	t.Logf("%d queues", len(d.queues))
}

func TestErrorsReachTheGuest(t *testing.T) {
	noLeftovers(t)
	m := devicetest.NewMemory(1 << 20)
	d := create(t, New(t.TempDir()), "errors", m, transport.Options{})
	f := devicetest.Open(t, d.Path(), os.O_RDWR)
	buf := devicetest.Aligned(t, blockSize)
	for _, tt := range []struct{ give, want error }{
		{unix.ENOSPC, unix.ENOSPC},
		{fmt.Errorf("write log: %w", unix.ENOSPC), unix.ENOSPC},
		{unix.EIO, unix.EIO},
		{errors.New("no errno at all"), unix.EIO},
		{unix.EOPNOTSUPP, unix.EIO},
		{unix.ENODEV, unix.EIO},
		{unix.EAGAIN, unix.EIO},
	} {
		m.FailWith(tt.give)
		if _, err := f.WriteAt(buf, 0); !errors.Is(err, tt.want) {
			t.Errorf("backend's %v: write gives %v, want %v", tt.give, err, tt.want)
		}
		if _, err := f.ReadAt(buf, 0); !errors.Is(err, tt.want) {
			t.Errorf("backend's %v: read gives %v, want %v", tt.give, err, tt.want)
		}
		if err := f.Sync(); err == nil {
			t.Errorf("backend's %v: flush succeeds", tt.give)
		}
		if err := devicetest.RangeIoctl(f, devicetest.Discard, 0, blockSize); err == nil {
			t.Errorf("backend's %v: discard succeeds", tt.give)
		}
		m.FailWith(nil)
		// No error may have taught the kernel not to ask any more.
		flushes, zeros := m.Flushes.Load(), m.Zeros.Load()
		if err := errors.Join(f.Sync(), devicetest.RangeIoctl(f, devicetest.Discard, 0, blockSize)); err != nil {
			t.Errorf("after %v: %v", tt.give, err)
		}
		if m.Flushes.Load() == flushes || m.Zeros.Load() == zeros {
			t.Errorf("after %v flush or discard do not arrive any more", tt.give)
		}
	}
}

func TestReadOnly(t *testing.T) {
	noLeftovers(t)
	m := devicetest.NewMemory(1 << 20)
	if _, err := m.WriteAt([]byte("hello"), blockSize); err != nil {
		t.Fatal(err)
	}
	writes := m.Writes.Load()
	d := create(t, New(t.TempDir()), "ro", m, transport.Options{ReadOnly: true})
	f := devicetest.Open(t, d.Path(), os.O_RDONLY)
	buf := devicetest.Aligned(t, blockSize)
	if _, err := f.ReadAt(buf, blockSize); err != nil || string(buf[:5]) != "hello" {
		t.Errorf("read %q, %v", buf[:5], err)
	}
	if w, err := os.OpenFile(d.Path(), os.O_RDWR|unix.O_DIRECT, 0); err == nil {
		if _, err := w.WriteAt(buf, 0); err == nil {
			t.Error("write to a read-only device succeeds")
		}
		w.Close()
	}
	if b, err := os.ReadFile(d.sysfs() + "/ro"); err != nil || string(b) != "1\n" {
		t.Errorf("ro is %q, %v", b, err)
	}
	if m.Writes.Load() != writes {
		t.Error("the backend was written")
	}
	f.Close()
}

// TestResize expects the size to follow where the kernel can do it, and a clear
// error where it cannot.
func TestResize(t *testing.T) {
	noLeftovers(t)
	m := devicetest.NewMemory(1 << 20)
	tr := New(t.TempDir())
	d := create(t, tr, "resize", m, transport.Options{})
	if err := d.Resize(); err != nil {
		t.Errorf("same size: %v", err)
	}
	m.Grow(2 << 20)
	err := d.Resize()
	b, _ := os.ReadFile(d.sysfs() + "/size")
	sectors := strings.TrimSpace(string(b))
	if !tr.knows(flagUpdateSize) {
		if !errors.Is(err, transport.ErrNoResize) || sectors != "2048" {
			t.Errorf("%v, %s sectors", err, sectors)
		}
		closeDevice(t, d)
		d = create(t, tr, "resize", m, transport.Options{})
		if b, err := os.ReadFile(d.sysfs() + "/size"); string(b) != "4096\n" {
			t.Errorf("made again, it has %q sectors, %v", b, err)
		}
	} else if err != nil || sectors != "4096" {
		t.Errorf("%v, %s sectors", err, sectors)
	}
	closeDevice(t, d)
	if err := d.Resize(); err == nil {
		t.Error("resize of a closed device succeeds")
	}
}

func TestCreateRefuses(t *testing.T) {
	noLeftovers(t)
	dir := t.TempDir()
	tr := New(dir)
	create(t, tr, "a", devicetest.NewMemory(1<<20), transport.Options{})
	for _, tt := range []struct {
		name, volume string
		size         int64
		tr           *Transport
		want         string
	}{
		{"no size", "b", 0, tr, "not a multiple"},
		{"half a block", "b", 4096 + 512, tr, "not a multiple"},
		{"no id", "", 4096, tr, "empty volume id"},
		{"twice", "a", 4096, tr, "already"},
		{"left by another process", "a", 4096, New(dir), "must be adopted"},
	} {
		if _, err := tt.tr.Create(t.Context(), tt.volume, devicetest.NewMemory(tt.size), transport.Options{}); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v", tt.name, err)
		}
	}
	over, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := tr.Create(over, "b", devicetest.NewMemory(4096), transport.Options{}); !errors.Is(err, context.Canceled) {
		t.Errorf("ended context: %v", err)
	}
	if _, err := tr.Adopt(t.Context(), "c", devicetest.NewMemory(4096)); !errors.Is(err, transport.ErrNotFound) {
		t.Errorf("adopt of nothing: %v", err)
	}
	if left, err := tr.Leftovers(t.Context()); len(left) != 0 || err != nil {
		t.Errorf("leftovers: %v, %v", left, err)
	}
	if left, err := New(dir).Leftovers(t.Context()); len(left) != 1 || left[0] != "a" || err != nil {
		t.Errorf("leftovers for another process: %v, %v", left, err)
	}
}

func TestProbe(t *testing.T) {
	noLeftovers(t)
	tr := New(t.TempDir())
	if err := tr.Probe(); err != nil {
		t.Fatal(err)
	}
	if err := tr.SurvivesRestart(); (err == nil) != tr.knows(flagUpdateSize) {
		t.Errorf("survives a restart: %v", err)
	}
	n, err := tr.MaxVolumes()
	if err != nil || n < 1 {
		t.Errorf("at most %d volumes, %v", n, err)
	}
	t.Logf("features %#x, at most %d volumes", tr.features, n)
}
