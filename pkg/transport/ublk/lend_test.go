package ublk

import (
	"errors"
	"math/rand/v2"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/snapmerge/snapmerge/pkg/transport"
	"github.com/snapmerge/snapmerge/test/devicetest"
)

// randomLent does random I/O on a device whose backend lends its file, or what stands
// in for it.
func randomLent(t *testing.T, instead *os.File) *devicetest.Lends {
	t.Helper()
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	l := devicetest.NewLends(t, 8<<20)
	if instead != nil {
		l.Instead(int(instead.Fd()))
	}
	d := create(t, New(t.TempDir()), "lent", l, transport.Options{})
	f := devicetest.Open(t, d.Path(), os.O_RDWR)
	devicetest.RandomIO(t, f, l.Memory, devicetest.Aligned(t, 1<<20), rand.New(rand.NewPCG(seed, 1)), 400, true)
	if l.Lent.Load() == 0 || l.Back.Load() != l.Lent.Load() {
		t.Errorf("lent %d times, came back %d times", l.Lent.Load(), l.Back.Load())
	}
	return l
}

// TestLent: what is lent is read and written without the backend.
func TestLent(t *testing.T) {
	noLeftovers(t)
	l := randomLent(t, nil)
	if l.Done.Load() != l.Lent.Load() || l.Reads.Load()+l.Writes.Load() > 0 {
		t.Errorf("%d of %d were carried out; the backend has had %d reads and %d writes", l.Done.Load(), l.Lent.Load(), l.Reads.Load(), l.Writes.Load())
	}
}

// TestLentFails: what cannot be done with what was lent goes to the backend. The null
// device gives no byte, and takes none that is open for reading.
func TestLentFails(t *testing.T) {
	noLeftovers(t)
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { null.Close() })
	l := randomLent(t, null)
	if l.Done.Load() != 0 || l.Reads.Load() == 0 || l.Writes.Load() == 0 {
		t.Errorf("%d were carried out; the backend has had %d reads and %d writes", l.Done.Load(), l.Reads.Load(), l.Writes.Load())
	}
}

// TestAbortLent has what was lent not answer: who waits for it gets EIO, and nothing is
// forgotten that the kernel may still do.
func TestAbortLent(t *testing.T) {
	noLeftovers(t)
	from, to, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { from.Close(); to.Close() })
	l := devicetest.NewLends(t, 1<<20)
	tr := New(t.TempDir())
	d := create(t, tr, "hung", l, transport.Options{})
	before := l.Lent.Load() // by who looked for partitions
	l.Instead(int(from.Fd()))
	f := devicetest.Open(t, d.Path(), os.O_RDWR)
	buf := devicetest.Aligned(t, blockSize)
	read := make(chan error, 1)
	go func() {
		_, err := f.ReadAt(buf, 0)
		read <- err
		f.Close()
	}()
	eventually(t, "the read is lent a file", func() bool { return l.Lent.Load() > before })
	if err := d.Abort(); err != nil {
		t.Error(err)
	}
	if err := <-read; !errors.Is(err, unix.EIO) {
		t.Errorf("read gives %v", err)
	}
	if l.Back.Load() > before {
		t.Error("given back while the kernel reads it")
	}
	to.Close()
	eventually(t, "it is given back", func() bool { return l.Back.Load() == l.Lent.Load() })
	create(t, tr, "hung", devicetest.NewMemory(1<<20), transport.Options{})
}
