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
	// minReaders wait for requests of an idle volume; maxReaders serve a busy one.
	// Each is a thread, and one request.
	minReaders = 2
	maxReaders = 16

	// idleAfter is how long a reader without requests keeps its frame, and itself
	// if there are more than minReaders.
	idleAfter = 2 * time.Second
)

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
	ep, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return os.NewSyscallError("epoll_create1", err)
	}
	defer unix.Close(ep)
	// EPOLLEXCLUSIVE: a request wakes one waiting reader, not all.
	event := unix.EpollEvent{Events: unix.EPOLLIN | unix.EPOLLEXCLUSIVE}
	if err := unix.EpollCtl(ep, unix.EPOLL_CTL_ADD, s.fuse, &event); err != nil {
		return os.NewSyscallError("epoll_ctl", err)
	}
	var f *frame
	defer func() {
		if f != nil {
			f.free()
		}
	}()
	timeout := int(idleAfter.Milliseconds())
	for {
		ready, err := s.wait(ep, timeout)
		if err != nil {
			return err
		}
		if !ready {
			if f != nil {
				f.free()
				f = nil
			}
			if s.shrink() {
				return nil
			}
			timeout = -1
			continue
		}
		timeout = int(idleAfter.Milliseconds())
		if f == nil {
			if f, err = newFrame(); err != nil {
				// Somebody else's memory may come free; the request waits.
				klog.ErrorS(err, "No memory for a request")
				time.Sleep(100 * time.Millisecond)
				continue
			}
		}
		// While there are requests there is nothing to wait for.
		for more := true; more; {
			if more, err = s.serveOne(f); err != nil {
				return err
			}
		}
	}
}

// wait waits until there may be a request or the timeout, in milliseconds or -1,
// is over.
func (s *readerSet) wait(ep, timeout int) (ready bool, err error) {
	s.waiting.Add(1)
	defer s.waiting.Add(-1)
	var events [1]unix.EpollEvent
	for {
		n, err := unix.EpollWait(ep, events[:], timeout)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return false, os.NewSyscallError("epoll_wait", err)
		}
		return n > 0, nil
	}
}

// serveOne serves a request if there is one.
func (s *readerSet) serveOne(f *frame) (served bool, err error) {
	buf := f.request()
	n, err := unix.Read(s.fuse, buf)
	switch err {
	case nil:
	case unix.EAGAIN, unix.EINTR, unix.ENOENT:
		// Another reader was faster, or the request was aborted while read.
		return false, nil
	case unix.ENODEV, unix.ECONNABORTED, unix.ENOTCONN:
		return false, errConnEnded
	default:
		return false, fmt.Errorf("read from /dev/fuse: %w", err)
	}
	s.grow()
	reply := s.srv.handle(buf[:n], f)
	if reply == nil {
		return true, nil
	}
	return true, s.writeReply(reply, f)
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
