package fuseloop

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"
)

const (
	// minReaders wait for requests of an idle volume; maxReaders, at the most
	// mostReaders, serve a busy one. Each is a thread, and one request.
	minReaders  = 2
	mostReaders = 16

	// idleAfter is how long a reader without requests keeps its frame, and itself
	// if there are more than minReaders.
	idleAfter = 2 * time.Second
)

// maxReaders is what keeps a disk busy, or twice the processors. With more of them each
// waits for its turn where processors are scarce, most of all at locks: on 2 of them 16
// readers get half of the writes done that 8 do.
var maxReaders = int32(min(max(8, 2*runtime.NumCPU()), mostReaders))

// errConnEnded says that the connection is over, whoever ended it.
var errConnEnded = errors.New("FUSE connection ended")

// extra counts the readers of all connections above minReaders, of which there are
// maxExtra at the most: that bounds the memory of frames, to 32 MiB, or 4 MiB a CPU.
var (
	extra    atomic.Int32
	maxExtra = int32(max(32, 4*runtime.NumCPU()))
)

// readerSet is the readers of one connection.
type readerSet struct {
	fuse int
	srv  *server
	fail func(error) // called when a reader ends for another reason than errConnEnded

	wg      sync.WaitGroup
	total   atomic.Int32 // readers that there are
	waiting atomic.Int32 // readers that wait for a request
	short   atomic.Bool  // a reader could not be added, and the log says so
}

func (s *readerSet) start() {
	s.total.Store(minReaders)
	for range minReaders {
		s.wg.Go(s.read)
	}
}

// grow adds a reader if all are busy.
func (s *readerSet) grow() {
	n := s.total.Load()
	if s.waiting.Load() > 0 || n < minReaders || n >= maxReaders { // below: the connection is ending
		return
	}
	if extra.Add(1) > maxExtra || !s.total.CompareAndSwap(n, n+1) {
		extra.Add(-1)
		return
	}
	s.wg.Go(s.read)
}

// shrink tells the calling reader whether it is one too many.
func (s *readerSet) shrink() bool {
	for {
		n := s.total.Load()
		if n <= minReaders {
			return false
		}
		if s.total.CompareAndSwap(n, n-1) {
			extra.Add(-1)
			return true
		}
	}
}

// read is one reader: it serves requests until the connection ends or it is not
// needed any more.
func (s *readerSet) read() {
	// The kernel wakes one waiting thread per request; moving between threads
	// would cost more than all else here.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	err := s.serve()
	if err == nil {
		return // shrink has counted it out
	}
	if s.total.Add(-1) >= minReaders {
		extra.Add(-1)
	}
	if !errors.Is(err, errConnEnded) {
		s.fail(err)
	}
}

func (s *readerSet) serve() error {
	r := &reader{set: s}
	defer r.rest()
	if err := r.prepare(); err != nil {
		if !s.shrink() {
			return err
		}
		// Out of descriptors or memory, which is no reason to end what others serve.
		if !s.short.Swap(true) {
			klog.ErrorS(err, "Cannot have another FUSE reader")
		}
		return nil
	}
	defer unix.Close(r.epoll)
	err := r.serve()
	if e := r.drain(); err == nil {
		err = e
	}
	return err
}

// reader is one thread, and all that belongs to it.
type reader struct {
	set   *readerSet
	epoll int
	f     *frame   // nil while it is idle
	lent  *lending // nil until something is lent, and while it is idle
}

// prepare makes what the reader waits with.
func (r *reader) prepare() (err error) {
	if r.epoll, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err != nil {
		return os.NewSyscallError("epoll_create1", err)
	}
	// EPOLLEXCLUSIVE: a request wakes one waiting reader, not all.
	if err := r.watch(r.set.fuse, unix.EPOLLIN|unix.EPOLLEXCLUSIVE); err != nil {
		unix.Close(r.epoll)
		return err
	}
	return nil
}

func (r *reader) watch(fd int, events uint32) error {
	return os.NewSyscallError("epoll_ctl", unix.EpollCtl(r.epoll, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: events}))
}

// rest gives back what a reader without requests does not need.
func (r *reader) rest() {
	if r.f != nil {
		r.f.free()
		r.f = nil
	}
	if r.lent != nil {
		r.lent.free()
		r.lent = nil
	}
}

// serve serves requests until there is an error, or nil: this reader is one too many.
// What is lent may be under way then.
func (r *reader) serve() error {
	timeout := int(idleAfter.Milliseconds())
	for {
		ready, err := r.wait(timeout)
		if err != nil {
			return err
		}
		if !ready && r.underWay() == 0 {
			r.rest()
			if r.set.shrink() {
				return nil
			}
			timeout = -1
			continue
		}
		timeout = int(idleAfter.Milliseconds())
		if r.f == nil {
			if r.f, err = newFrame(); err != nil {
				// Somebody else's memory may come free; the request waits.
				klog.ErrorS(err, "No memory for a request")
				time.Sleep(100 * time.Millisecond)
				continue
			}
		}
		// While there are requests there is nothing to wait for.
		for more := true; more; {
			if more, err = r.serveSome(); err != nil {
				return err
			}
		}
	}
}

// wait waits until there may be a request, or the end of one, or the timeout, in
// milliseconds or -1, is over.
func (r *reader) wait(timeout int) (ready bool, err error) {
	r.set.waiting.Add(1)
	defer r.set.waiting.Add(-1)
	var events [1]unix.EpollEvent
	for {
		n, err := unix.EpollWait(r.epoll, events[:], timeout)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return false, os.NewSyscallError("epoll_wait", err)
		}
		return n > 0, nil
	}
}

// serveSome serves a request, or lends what several take, and answers those for which
// that has been done. It tells whether there may be more to do at once.
func (r *reader) serveSome() (more bool, err error) {
	for r.lent == nil || !r.lent.full() {
		n, err := unix.Read(r.set.fuse, r.f.request())
		switch err {
		case nil:
		case unix.EAGAIN, unix.EINTR, unix.ENOENT:
			// Another reader was faster, or the request was aborted while read.
			return r.answer(0)
		case unix.ENODEV, unix.ECONNABORTED, unix.ENOTCONN:
			return false, errConnEnded
		default:
			return false, fmt.Errorf("read from /dev/fuse: %w", err)
		}
		msg := r.f.request()[:n]
		lent, alone := r.lend(msg)
		if lent {
			continue
		}
		if !alone {
			r.set.grow()
		}
		if err := r.drain(); err != nil { // who is at a request cannot answer others
			return false, err
		}
		if reply := r.set.srv.handle(msg, r.f); reply != nil {
			err = r.set.writeReply(reply, r.f)
		}
		return true, err
	}
	r.set.grow()
	return r.answer(1)
}

func (s *readerSet) writeReply(reply []byte, f *frame) error {
	for {
		_, err := unix.Write(s.fuse, reply)
		switch err {
		case nil, unix.ENOENT: // ENOENT: the request was aborted meanwhile
			return nil
		case unix.EINTR, unix.EAGAIN:
		case unix.ENODEV, unix.ECONNABORTED, unix.ENOTCONN, unix.EPERM:
			return errConnEnded
		default:
			// The guest must get an answer; the plainest one is the last try.
			unique := native.Uint64(reply[8:])
			klog.ErrorS(err, "The kernel did not take a reply", "bytes", len(reply))
			if len(reply) == outHeaderSize {
				return fmt.Errorf("write to /dev/fuse: %w", err)
			}
			reply = f.replyError(unique, unix.EIO)
		}
	}
}
