package fuseloop

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"time"

	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"
)

const (
	// readers is how many requests of a volume are in service at a time.
	readers = 4

	// idleAfter is how long a reader without requests keeps its frame.
	idleAfter = 2 * time.Second
)

// errConnEnded says that the connection is over, whoever ended it.
var errConnEnded = errors.New("FUSE connection ended")

// readRequests is one reader: it serves requests of the connection until that
// ends. The error is never nil.
func readRequests(fuse int, s *server) error {
	// The kernel wakes one waiting thread per request; moving between threads
	// would cost more than all else here.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	ep, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return os.NewSyscallError("epoll_create1", err)
	}
	defer unix.Close(ep)
	// EPOLLEXCLUSIVE: a request wakes one idle reader, not all.
	event := unix.EpollEvent{Events: unix.EPOLLIN | unix.EPOLLEXCLUSIVE}
	if err := unix.EpollCtl(ep, unix.EPOLL_CTL_ADD, fuse, &event); err != nil {
		return os.NewSyscallError("epoll_ctl", err)
	}
	var f *frame
	defer func() {
		if f != nil {
			f.free()
		}
	}()
	events := make([]unix.EpollEvent, 1)
	for {
		timeout := -1
		if f != nil {
			timeout = int(idleAfter.Milliseconds())
		}
		n, err := unix.EpollWait(ep, events, timeout)
		if err != nil {
			if err == unix.EINTR {
				continue
			}
			return os.NewSyscallError("epoll_wait", err)
		}
		if n == 0 {
			f.free()
			f = nil
			continue
		}
		if f == nil {
			if f, err = newFrame(); err != nil {
				// Somebody else's memory may come free; the request waits.
				klog.ErrorS(err, "No memory for a request")
				time.Sleep(100 * time.Millisecond)
				continue
			}
		}
		if err := serveOne(fuse, s, f); err != nil {
			return err
		}
	}
}

// serveOne serves a request if there is one.
func serveOne(fuse int, s *server, f *frame) error {
	buf := f.request()
	n, err := unix.Read(fuse, buf)
	switch err {
	case nil:
	case unix.EAGAIN, unix.EINTR, unix.ENOENT:
		// Another reader was faster, or the request was aborted while read.
		return nil
	case unix.ENODEV, unix.ECONNABORTED, unix.ENOTCONN:
		return errConnEnded
	default:
		return fmt.Errorf("read from /dev/fuse: %w", err)
	}
	reply := s.handle(buf[:n], f)
	if reply == nil {
		return nil
	}
	return writeReply(fuse, reply, f)
}

func writeReply(fuse int, reply []byte, f *frame) error {
	for {
		_, err := unix.Write(fuse, reply)
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
