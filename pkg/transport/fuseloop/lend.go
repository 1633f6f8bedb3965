package fuseloop

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"

	"github.com/snapmerge/snapmerge/pkg/uring"
)

const (
	// maxLent is how many requests a reader has under way that the backend lends their
	// bytes for.
	maxLent = 32
	// maxLentIO is the most bytes of one; longer ones gain nothing, and take memory.
	maxLentIO = 16 << 10
)

// lending is the requests of a reader that its ring carries out (transport.Lender), so
// that the reader does not sleep at each.
type lending struct {
	ring  *uring.Ring
	mem   []byte
	slots [maxLent]slot
	idle  []int // of slots
	again []int // slots of requests that the ring could not carry out
	// broken says that the ring does not work any more, so that what is under way never
	// ends.
	broken bool
}

// slot is room for a request. Its number is the user data of the ring's entry.
type slot struct {
	frame // of maxLentIO bytes
	request
	back func(done bool)
}

// newLending maps the memory, which takes up room as it is used.
func newLending() (_ *lending, err error) {
	l := &lending{}
	if l.ring, err = uring.New(maxLent, uring.SetupSingleIssuer|uring.SetupCoopTaskrun); err != nil {
		return nil, err
	}
	size := pageSize + maxLentIO
	l.mem, err = unix.Mmap(-1, 0, maxLent*size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
	if err != nil {
		l.ring.Close()
		return nil, os.NewSyscallError("mmap", err)
	}
	for i := range l.slots {
		l.slots[i].mem = l.mem[i*size : (i+1)*size : (i+1)*size]
		l.idle = append(l.idle, i)
	}
	return l, nil
}

// free gives everything back, but for memory that the kernel may still write to.
func (l *lending) free() {
	l.ring.Close()
	if !l.broken {
		_ = unix.Munmap(l.mem)
	}
}

func (l *lending) full() bool { return len(l.idle) == 0 }

// underWay is how many requests of the reader are not answered.
func (r *reader) underWay() int {
	if r.lent == nil {
		return 0
	}
	return maxLent - len(r.lent.idle)
}

// lend has the ring carry out the request in msg, if the backend lends what it takes and
// there are others. A request that is alone is done sooner by a plain call, and needs no
// further reader, since the next one will not wait for it.
func (r *reader) lend(msg []byte) (lent, alone bool) {
	srv := r.set.srv
	q, err := parseRequest(msg)
	if err != nil || !srv.mayLend(&q) {
		return false, false
	}
	if srv.inBackend.Load() == 0 {
		return false, true
	}
	fd, back, ok := srv.lend(&q)
	if !ok {
		return false, false
	}
	if r.lent == nil && !r.beginLending() {
		srv.giveBack(back, false)
		return false, false
	}
	l := r.lent
	i := l.idle[len(l.idle)-1]
	l.idle = l.idle[:len(l.idle)-1]
	s := &l.slots[i]
	p := s.payload(int(q.length))
	e := l.ring.SQE()
	if q.op == opWrite {
		copy(p, q.data)
		q.data = p
		e.Write(fd, p, q.off)
	} else {
		e.Read(fd, p, q.off)
	}
	e.UserData = uint64(i)
	s.request, s.back = q, back
	return true, false
}

// beginLending tells whether there is a ring.
func (r *reader) beginLending() bool {
	l, err := newLending()
	if err == nil {
		if err = r.watch(l.ring.Fd(), unix.EPOLLIN); err == nil {
			r.lent = l
			return true
		}
		l.free()
	}
	if !r.set.srv.noRing.Swap(true) {
		klog.InfoS("No ring for requests: each takes a thread", "reason", err)
	}
	return false
}

// answer starts what was lent, waits for the end of so many, and answers all that have
// ended, if any have.
func (r *reader) answer(wait uint32) (any bool, err error) {
	if r.underWay() == 0 {
		return false, nil
	}
	if any, err = r.reap(wait); err != nil || len(r.lent.again) == 0 {
		return any, err
	}
	return true, r.drain()
}

// drain waits until nothing is under way, and has the backend carry out what the ring
// could not. An error is the first one; what is under way is waited for all the same.
func (r *reader) drain() (err error) {
	for r.underWay() > 0 && !r.lent.broken {
		var e error
		if r.underWay() == len(r.lent.again) {
			e = r.carryOutAgain()
		} else {
			_, e = r.reap(1)
		}
		if err == nil {
			err = e
		}
	}
	return err
}

// reap is answer, but for what the ring could not carry out.
func (r *reader) reap(wait uint32) (any bool, err error) {
	l := r.lent
	if l.ring.Pending() > 0 || wait > 0 {
		_, err := l.ring.Submit(wait)
		if err != nil && !uring.TryAgain(err) {
			l.broken = true
			return false, fmt.Errorf("io_uring_enter: %w", err)
		}
	}
	for {
		c, ok := l.ring.CQE()
		if !ok {
			return any, err
		}
		any = true
		i := int(c.UserData)
		s := &l.slots[i]
		done := int64(c.Res) == s.length
		r.set.srv.giveBack(s.back, done)
		if !done {
			l.again = append(l.again, i)
			continue
		}
		reply := s.replyWritten
		if s.op == opRead {
			reply = s.replyPayload
		}
		if e := r.set.writeReply(reply(s.unique, int(s.length)), &s.frame); err == nil {
			err = e
		}
		l.idle = append(l.idle, i)
	}
}

// carryOutAgain has the backend carry out what the ring could not.
func (r *reader) carryOutAgain() (err error) {
	l := r.lent
	for _, i := range l.again {
		s := &l.slots[i]
		carryOut := r.set.srv.write
		if s.op == opRead {
			carryOut = r.set.srv.read
		}
		if e := r.set.writeReply(carryOut(&s.request, &s.frame), &s.frame); err == nil {
			err = e
		}
		l.idle = append(l.idle, i)
	}
	l.again = l.again[:0]
	return err
}
