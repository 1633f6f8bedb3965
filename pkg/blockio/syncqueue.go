package blockio

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// syncQueue moves runs one after the other with preadv and pwritev.
type syncQueue struct {
	plan plan
	iov  []unix.Iovec
	clip clip
}

func (q *syncQueue) Kind() Kind { return Sync }

// Register does nothing: plain calls have nothing to gain from it.
func (q *syncQueue) Register(...*Arena) {}

func (q *syncQueue) Close() error { return nil }

func (q *syncQueue) Read(d Device, batch []Request) error { return q.run(d, batch, false) }

func (q *syncQueue) Write(d Device, batch []Request) error { return q.run(d, batch, true) }

func (q *syncQueue) run(d Device, batch []Request, write bool) error {
	f, ok := unwrap(d)
	if !ok {
		return eachRequest(d, batch, write)
	}
	if err := q.plan.build(batch, f.align, maxTransfer, maxVectors); err != nil {
		q.plan.reset()
		return f.fail("transfer", err)
	}
	return q.do(d, f, write)
}

// do does the plan, whose runs have at most maxVectors vectors, and empties it.
func (q *syncQueue) do(d Device, f *osFile, write bool) error {
	defer q.plan.reset()
	if err := q.runs(f, write); err != nil {
		return err
	}
	return eachRequest(d, q.plan.odd, write)
}

// runs does the plan's runs. What a short transfer leaves unaligned joins the
// odd requests.
func (q *syncQueue) runs(f *osFile, write bool) error {
	fd, err := f.hold()
	if err != nil {
		return err
	}
	defer f.release()
	for i := range q.plan.runs {
		r := &q.plan.runs[i]
		for {
			n, err := q.transfer(f, fd, r, write)
			if err != nil {
				return f.failAt(opName(write), r.off, err)
			}
			if n == r.bytes {
				break
			}
			q.plan.advance(r, n)
			if n%f.align != 0 {
				q.plan.leave(r)
				break
			}
		}
	}
	return nil
}

// transfer does one system call, which may move less than the run but not
// nothing.
func (q *syncQueue) transfer(f *osFile, fd int, r *run, write bool) (int, error) {
	if q.iov == nil {
		q.iov = make([]unix.Iovec, maxVectors)
	}
	v := q.clip.ask(q.plan.iovecs(q.iov, r), f.align)
	defer clear(q.iov[:r.count])
	trap := uintptr(unix.SYS_PREADV)
	if write {
		trap = unix.SYS_PWRITEV
		f.content.RLock()
		defer f.content.RUnlock()
	}
	for {
		// On 64 bit the first word of the offset is all of it.
		n, _, errno := unix.Syscall6(trap, uintptr(fd), uintptr(unsafe.Pointer(&v[0])), uintptr(len(v)),
			uintptr(r.off), 0, 0)
		switch {
		case errno == unix.EINTR:
		case errno != 0:
			return 0, errno
		case n == 0:
			return 0, endError(write)
		default:
			return q.clip.report(int(n)), nil
		}
	}
}
