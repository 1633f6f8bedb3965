package fuseloop

import (
	"errors"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/snapmerge/snapmerge/pkg/transport"
	"github.com/snapmerge/snapmerge/test/devicetest"
)

// loadLent has a verifying load at a device whose backend lends its file, or what stands
// in for it, until that was lent often.
func loadLent(t *testing.T, instead *os.File) *devicetest.Lends {
	t.Helper()
	const workers, often = 8, 50
	l := devicetest.NewLends(t, workers*2<<20)
	if instead != nil {
		l.Instead(int(instead.Fd()))
	}
	d := create(t, New(nil), "lent", l, transport.Options{})
	load := devicetest.StartLoad(t, d.Path(), workers, 1)
	eventually(t, "it is lent", func() bool { return t.Failed() || l.Lent.Load() > often })
	ops, _ := load.Finish()
	load.Check(t, d.Path())
	t.Logf("%d requests of which %d were lent their bytes", ops, l.Lent.Load())
	if l.Back.Load() != l.Lent.Load() || d.srv.inBackend.Load() != 0 {
		t.Errorf("lent %d times, came back %d times; %d under way", l.Lent.Load(), l.Back.Load(), d.srv.inBackend.Load())
	}
	return l
}

// TestLent: what is lent is read and written by rings.
func TestLent(t *testing.T) {
	noLeftovers(t, "lent")
	if l := loadLent(t, nil); l.Done.Load() != l.Lent.Load() {
		t.Errorf("%d of %d were carried out", l.Done.Load(), l.Lent.Load())
	}
}

// TestLentFails: what cannot be done with what was lent goes to the backend. The null
// device gives no byte, and takes none that is open for reading.
func TestLentFails(t *testing.T) {
	noLeftovers(t, "lent")
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { null.Close() })
	if l := loadLent(t, null); l.Done.Load() != 0 {
		t.Errorf("%d were carried out", l.Done.Load())
	}
}

// TestAbortLent has neither the backend answer nor what it lent: who waits gets EIO, and
// nothing is forgotten that the kernel may still do.
func TestAbortLent(t *testing.T) {
	noLeftovers(t, "hung")
	from, to, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { from.Close(); to.Close() })
	l := devicetest.NewLends(t, 1<<20)
	d := create(t, New(nil), "hung", l, transport.Options{})
	f := openGuest(t, d.Path(), os.O_RDWR)
	errs := make(chan error, 2)
	read := func() {
		buf := aligned(t, blockSize)
		go func() {
			_, err := f.ReadAt(buf, 0)
			errs <- err
		}()
	}
	release := l.Hang()
	t.Cleanup(release)
	before := l.Lent.Load()
	l.Instead(int(from.Fd()))
	read()
	eventually(t, "the backend hangs", func() bool { return d.srv.inBackend.Load() == 1 })
	read()
	eventually(t, "the next one is lent a file", func() bool { return l.Lent.Load() > before })
	if err := d.Abort(); err != nil {
		t.Error(err)
	}
	for range cap(errs) {
		if err := <-errs; !errors.Is(err, unix.EIO) {
			t.Errorf("read gives %v", err)
		}
	}
	if l.Back.Load() > before {
		t.Error("given back while the kernel reads it")
	}
	f.Close()
	to.Close()
	release()
	eventually(t, "it is given back", func() bool { return l.Back.Load() == l.Lent.Load() && d.srv.inBackend.Load() == 0 })
}

// TestNoRing: without io_uring each request takes a reader, as ever.
func TestNoRing(t *testing.T) {
	noLeftovers(t, "none")
	const workers = 4
	l := devicetest.NewLends(t, workers*2<<20)
	d := create(t, New(nil), "none", l, transport.Options{})
	d.srv.noRing.Store(true)
	before := l.Lent.Load()
	load := devicetest.StartLoad(t, d.Path(), workers, 1)
	eventually(t, "some load", func() bool { return t.Failed() || load.Requests() > 200 })
	load.Finish()
	load.Check(t, d.Path())
	if l.Lent.Load() > before {
		t.Error("something was lent")
	}
}
