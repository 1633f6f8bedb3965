package devicetest

import (
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"
)

// Lends is a Memory that lends what it is in: a file without a name.
type Lends struct {
	*Memory
	Lent, Done, Back atomic.Int64 // requests: those it was lent for, those that were carried out with it, and all that have ended

	fd atomic.Int32
}

// NewLends makes one of zeros, for as long as the test runs. Its device must be closed
// before.
func NewLends(t testing.TB, size int64) *Lends {
	t.Helper()
	fd, err := unix.MemfdCreate("lent", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Ftruncate(fd, size); err != nil {
		t.Fatal(err)
	}
	data, err := unix.Mmap(fd, 0, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = unix.Munmap(data)
		unix.Close(fd)
	})
	l := &Lends{Memory: &Memory{data: data}}
	l.fd.Store(int32(fd))
	return l
}

// Instead has it lend another descriptor from now on.
func (l *Lends) Instead(fd int) { l.fd.Store(int32(fd)) }

// Lend is that of transport.Lender.
func (l *Lends) Lend(int64, int64, bool) (fd int, back func(done bool), ok bool) {
	l.Lent.Add(1)
	return int(l.fd.Load()), func(done bool) {
		if done {
			l.Done.Add(1)
		}
		l.Back.Add(1)
	}, true
}
