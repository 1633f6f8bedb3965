package dmusermock

import (
	"encoding/binary"
	"errors"
	"fmt"
	"sync"

	"golang.org/x/sys/unix"
)

// Opcodes of linux/fuse.h that a CUSE device gets.
const (
	opOpen      = 14
	opRead      = 15
	opWrite     = 16
	opRelease   = 18
	opFsync     = 20
	opFlush     = 25
	opInterrupt = 36
	opCuseInit  = 4096
)

// maxTransfer bounds a read or write of the device, in bytes.
const maxTransfer = 128 << 10

// Server is a target behind a CUSE character device.
type Server struct {
	target *Target
	fd     int

	mu       sync.Mutex
	next     uint64
	channels map[uint64]*Channel // by file handle
	reads    map[uint64]*Channel // blocked reads, by request
}

// Serve puts a target behind the character device /dev/NAME, until Stop.
func Serve(name string, t *Target) (*Server, error) {
	fd, err := unix.Open("/dev/cuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open /dev/cuse: %w", err)
	}
	s := &Server{target: t, fd: fd, channels: map[uint64]*Channel{}, reads: map[uint64]*Channel{}}
	ready := make(chan error, 1)
	go s.run(name, ready)
	if err := <-ready; err != nil {
		return nil, err
	}
	return s, nil
}

// Stop takes the device away; its openers get errors.
func (s *Server) Stop() { unix.Close(s.fd) }

var native = binary.NativeEndian

func (s *Server) run(name string, ready chan<- error) {
	buf := make([]byte, maxTransfer+8192)
	for {
		n, err := unix.Read(s.fd, buf)
		switch {
		case err == unix.EINTR, err == unix.ENOENT, err == unix.EAGAIN:
			continue
		case err != nil:
			if !errors.Is(err, unix.ENODEV) {
				select {
				case ready <- err:
				default:
				}
			}
			return
		}
		s.handle(name, append([]byte(nil), buf[:n]...), ready)
	}
}

// reply answers; errno 0 is success.
func (s *Server) reply(unique uint64, errno unix.Errno, body []byte) {
	msg := make([]byte, 16+len(body))
	native.PutUint32(msg, uint32(len(msg)))
	native.PutUint32(msg[4:], uint32(-int32(errno)))
	native.PutUint64(msg[8:], unique)
	copy(msg[16:], body)
	_, _ = unix.Write(s.fd, msg) // the request may be gone
}

// handle carries a request out; those that may wait in goroutines of their own.
// The kernel has one thread of a daemon wait for one request, so nothing gets out
// of order.
func (s *Server) handle(name string, msg []byte, ready chan<- error) {
	op, unique, body := native.Uint32(msg[4:]), native.Uint64(msg[8:]), msg[40:]
	switch op {
	case opCuseInit:
		// cuse_init_out: major, minor, unused, flags, max_read, max_write, then the name.
		out := make([]byte, 72)
		native.PutUint32(out, 7)
		native.PutUint32(out[4:], native.Uint32(body[4:]))
		native.PutUint32(out[16:], maxTransfer)
		native.PutUint32(out[20:], maxTransfer)
		s.reply(unique, 0, append(out, "DEVNAME="+name+"\x00"...))
		ready <- nil
	case opOpen:
		c, err := s.target.Open()
		if err != nil {
			s.reply(unique, err.(unix.Errno), nil)
			return
		}
		s.mu.Lock()
		s.next++
		s.channels[s.next] = c
		out := make([]byte, 16)
		native.PutUint64(out, s.next)
		s.mu.Unlock()
		s.reply(unique, 0, out)
	case opRead:
		c := s.channel(body)
		size := native.Uint32(body[16:])
		s.mu.Lock()
		s.reads[unique] = c
		s.mu.Unlock()
		go func() {
			p := make([]byte, size)
			n, err := c.Read(p)
			s.mu.Lock()
			delete(s.reads, unique)
			s.mu.Unlock()
			s.reply(unique, errno(err), p[:n])
		}()
	case opWrite:
		c := s.channel(body)
		n, err := c.Write(body[40 : 40+native.Uint32(body[16:])])
		out := make([]byte, 8)
		native.PutUint32(out, uint32(n))
		s.reply(unique, errno(err), out)
	case opRelease:
		c := s.channel(body)
		s.mu.Lock()
		delete(s.channels, native.Uint64(body))
		s.mu.Unlock()
		_ = c.Close()
		s.reply(unique, 0, nil)
	case opFlush, opFsync:
		s.reply(unique, 0, nil)
	case opInterrupt:
		s.mu.Lock()
		c := s.reads[native.Uint64(body)]
		s.mu.Unlock()
		if c != nil {
			c.Interrupt()
		}
	default:
		s.reply(unique, unix.ENOSYS, nil)
	}
}

func (s *Server) channel(body []byte) *Channel {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.channels[native.Uint64(body)]
}

func errno(err error) unix.Errno {
	e, _ := err.(unix.Errno)
	return e
}
