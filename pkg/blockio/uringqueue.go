package blockio

import (
	"runtime"
	"slices"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/snapmerge/snapmerge/pkg/uring"
)

const (
	// maxDepth bounds the memory of a queue.
	maxDepth = 1024
	// uringBytes and uringVectors bound a run, so that a long one does not keep
	// the kernel from working on several at a time. Measured: a run of below 1 MiB
	// costs more CPU time than preadv, and one of 4 MiB less.
	uringBytes   = 4 << 20
	uringVectors = 256
)

// uringQueue keeps up to depth runs in flight on a ring of its own. Runs that the
// ring cannot finish (interrupted ones, ones that a short transfer left
// unaligned), and everything after the ring itself has failed, are done by plain
// calls.
//
// Memory of a batch may be anything: it is pinned for as long as the kernel works
// on it.
//
// Files are not registered with the ring: it would keep them open, and with them
// their lock and their file system, until some time after it was closed, and what
// it saves is lost in the noise.
type uringQueue struct {
	ring  *uring.Ring // nil once it has failed
	plain syncQueue   // for what has nothing to gain from a ring, and all once it has failed
	depth int
	clip  clip

	// Slot s is a run in flight: the index in plan.runs is slots[s], the vectors
	// lie at iov[s*uringVectors], the entry's user data is s.
	slots []int
	free  []int // slots not in use
	iov   []unix.Iovec
	fixed [][]byte // buffers registered with the ring, by their index

	// Of the batch in progress:
	plan  plan
	pin   runtime.Pinner
	file  *osFile
	write bool
	next  int   // the first run that was not started
	again []int // runs to go on with after a short transfer
	err   error // the first; nothing is started after it
}

func newURingQueue(depth int) (*uringQueue, error) {
	depth = min(depth, maxDepth)
	ring, err := uring.New(uint32(depth), uring.SetupCoopTaskrun)
	if err != nil { // kernels before 5.19 don't know the flag
		ring, err = uring.New(uint32(depth), 0)
	}
	if err != nil {
		return nil, err
	}
	q := &uringQueue{
		ring: ring, depth: depth,
		slots: make([]int, depth), iov: make([]unix.Iovec, depth*uringVectors),
	}
	for s := range depth {
		q.free = append(q.free, s)
	}
	return q, nil
}

// Kind is Sync once the ring has failed.
func (q *uringQueue) Kind() Kind {
	if q.ring == nil {
		return Sync
	}
	return URing
}

func (q *uringQueue) Close() error {
	if q.ring == nil {
		return nil
	}
	ring := q.ring
	q.ring = nil
	return ring.Close()
}

// Register spares the kernel to look up and pin the pages for each transfer. It
// may be refused (RLIMIT_MEMLOCK of a process without CAP_IPC_LOCK, or a cgroup's
// limit), which changes nothing but speed.
func (q *uringQueue) Register(arenas ...*Arena) {
	var buffers [][]byte
	for _, a := range arenas {
		buffers = append(buffers, a.Bytes())
	}
	if q.ring != nil && len(buffers) > 0 && q.ring.RegisterBuffers(buffers) == nil {
		q.fixed = buffers
	}
}

// fixedIndex is the registered buffer that p lies in, or -1.
func (q *uringQueue) fixedIndex(p []byte) int {
	at := uintptr(unsafe.Pointer(unsafe.SliceData(p)))
	return slices.IndexFunc(q.fixed, func(b []byte) bool {
		start := uintptr(unsafe.Pointer(unsafe.SliceData(b)))
		return at >= start && at+uintptr(len(p)) <= start+uintptr(len(b))
	})
}

func (q *uringQueue) Read(d Device, batch []Request) error { return q.run(d, batch, false) }

func (q *uringQueue) Write(d Device, batch []Request) error { return q.run(d, batch, true) }

func (q *uringQueue) run(d Device, batch []Request, write bool) error {
	f, ok := unwrap(d)
	// A buffered write is a copy within memory: there is nothing to overlap, and
	// where the file system cannot do it without waiting (ext4) every entry costs
	// a kernel thread, twice the time of a plain call.
	if !ok || q.ring == nil || write && f.align == 1 {
		return q.plain.run(d, batch, write)
	}
	defer q.plan.reset()
	if err := q.plan.build(batch, f.align, uringBytes, uringVectors); err != nil {
		return f.fail("transfer", err)
	}
	if len(q.plan.runs) < 2 {
		// There is nothing to overlap with: one plain call does it. Both plans are
		// empty between batches.
		q.plan, q.plain.plan = q.plain.plan, q.plan
		return q.plain.do(d, f, write)
	}
	if err := q.runs(f, write); err != nil {
		return err
	}
	return eachRequest(d, q.plan.odd, write)
}

// runs does the plan's runs. What it leaves to plain calls joins the odd
// requests.
func (q *uringQueue) runs(f *osFile, write bool) error {
	fd, err := f.hold()
	if err != nil {
		return err
	}
	defer f.release()
	if write {
		f.content.RLock()
		defer f.content.RUnlock()
	}
	// The kernel finishes a transfer in the context of the thread that submitted
	// it, so the same thread must wait. Where all runs have room in the ring one call
	// does both, and no signal ends it, lest another thread waits for one that is busy
	// with something else. Locking would make Go hand the processor back and forth.
	if len(q.plan.runs) > q.depth {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
	}
	q.pin.Pin(&q.iov[0])
	for _, v := range q.plan.vectors {
		q.pin.Pin(&v[0])
	}
	defer q.pin.Unpin()
	q.file, q.write, q.next, q.again, q.err = f, write, 0, q.again[:0], nil
	q.loop(fd)
	q.file = nil
	return q.err
}

// loop keeps the ring full and returns when nothing is in flight.
func (q *uringQueue) loop(fd int) {
	for idle := 0; ; {
		for len(q.free) > 0 && q.start(fd) {
		}
		inFlight := q.depth - len(q.free)
		if inFlight == 0 {
			return
		}
		_, err := q.ring.SubmitUninterrupted(uint32(q.waitFor(inFlight)))
		switch n := q.reap(); {
		case n > 0:
			idle = 0
		case err == nil || err == unix.EINTR:
		case uring.TryAgain(err) && idle < 1000: // short of memory, for a second at most
			idle++
			time.Sleep(time.Millisecond)
		default:
			q.abandon()
			return
		}
	}
}

// waitFor is how many completions are worth waking up for: all if nothing can be
// started when they come.
func (q *uringQueue) waitFor(inFlight int) int {
	if q.err != nil || len(q.again) == 0 && q.next == len(q.plan.runs) {
		return inFlight
	}
	return (inFlight + 3) / 4
}

// start prepares an entry for the next run, if there is one; there must be a
// free slot.
func (q *uringQueue) start(fd int) bool {
	var i int
	switch {
	case q.err != nil:
		return false
	case len(q.again) > 0:
		i = q.again[len(q.again)-1]
		q.again = q.again[:len(q.again)-1]
	case q.next < len(q.plan.runs):
		i = q.next
		q.next++
	default:
		return false
	}
	s := q.free[len(q.free)-1]
	q.free = q.free[:len(q.free)-1]
	q.slots[s] = i

	r := &q.plan.runs[i]
	v := q.clip.ask(q.plan.iovecs(q.iov[s*uringVectors:], r), q.file.align)
	e := q.ring.SQE() // never nil: at most depth entries are prepared
	e.UserData = uint64(s)
	first := q.plan.vectors[r.first][:v[0].Len]
	fixed := -1
	if len(v) == 1 {
		fixed = q.fixedIndex(first)
	}
	switch {
	case fixed >= 0 && q.write:
		e.WriteFixed(fd, first, r.off, fixed)
	case fixed >= 0:
		e.ReadFixed(fd, first, r.off, fixed)
	case len(v) == 1 && q.write:
		e.Write(fd, first, r.off)
	case len(v) == 1:
		e.Read(fd, first, r.off)
	case q.write:
		e.Writev(fd, v, r.off)
	default:
		e.Readv(fd, v, r.off)
	}
	return true
}

// reap handles the completions that are there.
func (q *uringQueue) reap() (n int) {
	for {
		c, ok := q.ring.CQE()
		if !ok {
			return n
		}
		n++
		s := int(c.UserData)
		q.free = append(q.free, s)
		clear(q.iov[s*uringVectors:][:q.plan.runs[q.slots[s]].count])
		q.finish(q.slots[s], int(c.Res))
	}
}

// finish judges the result of run i: bytes moved, or minus errno.
func (q *uringQueue) finish(i, res int) {
	r := &q.plan.runs[i]
	errno := unix.Errno(0)
	if res < 0 {
		errno = unix.Errno(-res)
	}
	n := q.clip.report(res)
	switch {
	case errno == unix.EINTR || errno == unix.EAGAIN:
		q.plan.leave(r)
	case errno != 0:
		q.fail(r, errno)
	case n == 0:
		q.fail(r, endError(q.write))
	case n < r.bytes:
		q.plan.advance(r, n)
		if n%q.file.align != 0 {
			q.plan.leave(r)
		} else {
			q.again = append(q.again, i)
		}
	}
}

func (q *uringQueue) fail(r *run, err error) {
	if q.err == nil {
		q.err = q.file.failAt(opName(q.write), r.off, err)
	}
}

// abandon gives the ring up: it waits for what the kernel has in hand, which
// completes in shared memory without our calling, and leaves all the rest to
// plain calls.
func (q *uringQueue) abandon() {
	for pending := q.ring.Pending(); q.depth-len(q.free) > pending; {
		if q.reap() == 0 {
			time.Sleep(time.Millisecond)
		}
	}
	_ = q.ring.Close() // entries that were not submitted never will be
	q.ring = nil
	unused := make([]bool, q.depth)
	for _, s := range q.free {
		unused[s] = true
	}
	for s, i := range q.slots {
		if !unused[s] {
			q.plan.leave(&q.plan.runs[i])
		}
	}
	for _, i := range q.again {
		q.plan.leave(&q.plan.runs[i])
	}
	for i := q.next; i < len(q.plan.runs); i++ {
		q.plan.leave(&q.plan.runs[i])
	}
}
