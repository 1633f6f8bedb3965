package fuseloop

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/snapmerge/snapmerge/pkg/transport"
)

func TestBusyOpen(t *testing.T) {
	noLeftovers(t, "busy")
	m := newMemBackend(1 << 20)
	d := create(t, New(nil), "busy", m, transport.Options{})
	f := openGuest(t, d.Path(), os.O_RDWR)
	buf := aligned(t, blockSize)
	for range 3 {
		closeBusy(t, d)
		if _, err := f.WriteAt(buf, 0); err != nil {
			t.Fatalf("does not go on: %v", err)
		}
	}
	// The last user going away must not take the device with it now.
	f.Close()
	f = openGuest(t, d.Path(), os.O_RDWR)
	if _, err := f.ReadAt(buf, 0); err != nil {
		t.Errorf("the device is gone: %v", err)
	}
	// A user who leaves in time, as udev does, is no obstacle.
	go func() {
		time.Sleep(5 * pollLoop)
		f.Close()
	}()
	closeDevice(t, d)
	select {
	case <-d.Failed():
		t.Error("an orderly end counts as a failure")
	default:
	}
	if m.flushes.Load() == 0 {
		t.Error("closed without a flush")
	}
	closeDevice(t, d) // again is no error
}

// TestCloseLosesNothing closes the device while a user with dirty pages is
// leaving: what he wrote must be in the backend, though he never synced.
func TestCloseLosesNothing(t *testing.T) {
	noLeftovers(t, "leaving")
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	data := make([]byte, 64<<10)
	for round := range 60 {
		m := newMemBackend(int64(len(data)))
		d := create(t, New(nil), "leaving", m, transport.Options{})
		w, err := os.OpenFile(d.Path(), os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		for i := range data {
			data[i] = byte(rng.Uint32())
		}
		if _, err := w.Write(data); err != nil {
			t.Fatal(err)
		}
		closed := make(chan error, 1)
		go func() { closed <- d.Close(within(t, patience)) }()
		for end := time.Now().Add(time.Duration(rng.IntN(int(2 * pollLoop)))); time.Now().Before(end); {
		}
		w.Close()
		if err := <-closed; err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(m.content(0, m.Size()), data) {
			t.Fatalf("round %d: not all of it has arrived", round)
		}
	}
}

func TestBusyMounted(t *testing.T) {
	noLeftovers(t, "mounted")
	d := create(t, New(nil), "mounted", newMemBackend(16<<20), transport.Options{})
	mkfsExt4(t, d.Path())
	dir := t.TempDir()
	if err := unix.Mount(d.Path(), dir, "ext4", 0, ""); err != nil {
		t.Fatal(err)
	}
	text := []byte(strings.Repeat("some text ", 10000))
	err := os.WriteFile(filepath.Join(dir, "file"), text, 0o600)
	if err == nil {
		closeBusy(t, d)
		err = os.WriteFile(filepath.Join(dir, "file2"), text, 0o600)
	}
	if uerr := unix.Unmount(dir, 0); uerr != nil {
		t.Fatal(uerr)
	}
	if err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("e2fsck", "-fn", d.Path()).CombinedOutput(); err != nil {
		t.Errorf("e2fsck: %v: %s", err, out)
	}
}

// TestAbortHung aborts a device whose backend does not return.
func TestAbortHung(t *testing.T) {
	noLeftovers(t, "hung")
	m := newMemBackend(1 << 20)
	d := create(t, New(nil), "hung", m, transport.Options{})
	f := openGuest(t, d.Path(), os.O_RDWR)
	hang := make(chan struct{})
	m.hang.Store(hang)
	var wg sync.WaitGroup
	for range 2 * maxReaders {
		buf := aligned(t, blockSize)
		wg.Go(func() {
			if _, err := f.ReadAt(buf, 0); !errors.Is(err, unix.EIO) {
				t.Errorf("guest of a hung backend gets %v", err)
			}
		})
	}
	eventually(t, "all readers hang", func() bool { return d.srv.inBackend.Load() == int64(maxReaders) })
	begin := time.Now()
	if err := d.Abort(); err != nil {
		t.Error(err)
	}
	t.Logf("abort took %v", time.Since(begin))
	if took := time.Since(begin); took > 2*abortEnd+slack {
		t.Errorf("abort took %v", took)
	}
	wg.Wait()
	if _, err := f.WriteAt(aligned(t, blockSize), 0); err == nil {
		t.Error("write to an aborted device succeeds")
	}
	f.Close()
	eventually(t, "the last user takes the device with it", func() bool {
		stale, err := staleLoops("hung")
		return err == nil && len(stale) == 0
	})
	closeDevice(t, d) // no error after Abort
	// The same volume can be served again though readers are still stuck.
	again := create(t, d.t, "hung", newMemBackend(1<<20), transport.Options{})
	closeDevice(t, again)
	close(hang)
}

func TestAbortIsNoFailure(t *testing.T) {
	noLeftovers(t, "aborted")
	d := create(t, New(nil), "aborted", newMemBackend(1<<20), transport.Options{})
	if err := d.Abort(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the end is noticed", d.life.Ended)
	select {
	case <-d.Failed():
		t.Error("an abort of ours counts as a failure")
	default:
	}
	if err := d.Abort(); err != nil {
		t.Errorf("second abort: %v", err)
	}
}

// TestCloseHung: Close of a device whose backend does not return ends with its
// context, and Abort finishes it.
func TestCloseHung(t *testing.T) {
	noLeftovers(t, "closehung")
	m := newMemBackend(1 << 20)
	d := create(t, New(nil), "closehung", m, transport.Options{})
	hang := make(chan struct{})
	m.hang.Store(hang)
	defer close(hang)
	// The device is detached, but the last flush does not return. Until then it may
	// be busy with somebody who looks at new devices, as udev does.
	err := d.Close(within(t, 100*time.Millisecond))
	for end := time.Now().Add(slack); errors.Is(err, transport.ErrBusy) && time.Now().Before(end); {
		err = d.Close(within(t, 100*time.Millisecond))
	}
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("close: %v", err)
	}
	if err := d.Abort(); err != nil {
		t.Error(err)
	}
	closeDevice(t, d)
}

func TestCloseReportsFailedFlush(t *testing.T) {
	noLeftovers(t, "lastflush")
	m := newMemBackend(1 << 20)
	d, err := New(nil).Create(within(t, patience), "lastflush", m, transport.Options{})
	if err != nil {
		t.Fatal(err)
	}
	m.failWith(unix.ENOSPC)
	if err := d.Close(within(t, patience)); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("close: %v", err)
	}
}

// TestFailed ends devices behind our back.
func TestFailed(t *testing.T) {
	noLeftovers(t, "failed")
	for name, kill := range map[string]func(*device) error{
		"fusectl abort": func(d *device) error { return abortConn(d.conn.id) },
		"losetup -d": func(d *device) error {
			return exec.Command("losetup", "-d", d.Path()).Run()
		},
	} {
		t.Run(name, func(t *testing.T) {
			d := create(t, New(nil), "failed", newMemBackend(1<<20), transport.Options{})
			if err := kill(d); err != nil {
				t.Fatal(err)
			}
			select {
			case <-d.Failed():
			case <-time.After(patience):
				t.Error("not noticed")
			}
			closeDevice(t, d)
		})
	}
}
