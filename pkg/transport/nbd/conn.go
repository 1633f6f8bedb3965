package nbd

import (
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"sync"

	"golang.org/x/sync/semaphore"
	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"

	"github.com/snapmerge/snapmerge/pkg/transport"
)

const (
	// maxTransfer is the largest read or write of the driver, in bytes.
	maxTransfer = 32 << 20
	// usualTransfer is the largest one unless somebody has changed max_sectors_kb.
	usualTransfer = 128 << 10
	// maxInFlight bounds the memory of a device's requests, in bytes. What is beyond
	// it waits in the sockets.
	maxInFlight = 64 << 20
	// maxZero is how much is zeroed by one call of the backend, in bytes.
	maxZero = 256 << 20
)

// server carries out the requests of a device.
type server struct {
	backend  transport.Backend
	readOnly bool

	ranges  ranges
	memory  *semaphore.Weighted // maxInFlight
	buffers buffers
	workers sync.WaitGroup // requests under way
}

func newServer(b transport.Backend, readOnly bool) *server {
	return &server{backend: b, readOnly: readOnly, memory: semaphore.NewWeighted(maxInFlight)}
}

// buffers are page-aligned and usualTransfer long.
type buffers struct {
	mu   sync.Mutex
	free [][]byte
}

// get returns a buffer of n bytes.
func (b *buffers) get(n int64) ([]byte, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if last := len(b.free) - 1; last >= 0 && n <= usualTransfer {
		p := b.free[last]
		b.free = b.free[:last]
		return p[:n], nil
	}
	p, err := unix.Mmap(-1, 0, int(max(n, usualTransfer)), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, os.NewSyscallError("mmap", err)
	}
	return p[:n], nil
}

// put takes a buffer back.
func (b *buffers) put(p []byte) {
	if p == nil {
		return
	}
	p = p[:cap(p)]
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(p) == usualTransfer {
		b.free = append(b.free, p)
		return
	}
	_ = unix.Munmap(p)
}

// drain frees the buffers that nobody uses.
func (b *buffers) drain() {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, p := range b.free {
		_ = unix.Munmap(p)
	}
	b.free = nil
}

// conn is a connection.
type conn struct {
	s  *server
	c  *net.UnixConn
	mu sync.Mutex // held while a reply is written
}

// serve serves a connection until it ends: errDisconnect, or what ended it. When
// ctx ends, what waits for memory is given up.
func (s *server) serve(ctx context.Context, socket *net.UnixConn) error {
	c := &conn{s: s, c: socket}
	var head [requestSize]byte
	for {
		if _, err := io.ReadFull(socket, head[:]); err != nil {
			return err
		}
		r, err := decodeRequest(head[:])
		if err != nil {
			return err
		}
		if err := c.receive(ctx, r); err != nil {
			return err
		}
	}
}

// receive reads the rest of a request and starts it.
func (c *conn) receive(ctx context.Context, r request) error {
	var p []byte
	size := int64(0)
	if r.Op == transport.OpRead || r.Op == transport.OpWrite {
		size = max(r.N, 4096)
		if err := c.s.memory.Acquire(ctx, size); err != nil {
			return err
		}
		var err error
		if p, err = c.s.buffers.get(r.N); err == nil && r.Op == transport.OpWrite {
			_, err = io.ReadFull(c.c, p)
		}
		if err != nil {
			c.s.buffers.put(p)
			c.s.memory.Release(size)
			return err
		}
	}
	var at *place
	if r.Op == transport.OpWrite || r.Op == transport.OpZero {
		at = c.s.ranges.take(r.Off, r.N)
	}
	c.s.workers.Go(func() {
		c.carryOut(r, p, at)
		c.s.buffers.put(p)
		c.s.memory.Release(size)
	})
	return nil
}

// carryOut carries a request out and answers it. at is the place of a change.
func (c *conn) carryOut(r request, p []byte, at *place) {
	var err error
	if at != nil {
		// The place was taken before, so what the driver sends again comes behind it.
		if !c.stands() {
			c.s.ranges.leave(at)
			return
		}
		c.s.ranges.wait(at)
	}
	switch {
	case r.bad:
		err = unix.EINVAL
	case r.Op == transport.OpZero:
		err = c.s.zero(r.Request)
	default:
		err = transport.Serve(c.s.backend, c.s.readOnly, r.Request, p)
	}
	if at != nil {
		c.s.ranges.leave(at)
	}
	c.reply(r, p, err)
}

// zero carries out a request that may be of 4 GiB.
func (s *server) zero(r transport.Request) error {
	for r.N > 0 {
		part := r
		if part.N > maxZero {
			part.N, part.FUA = maxZero, false
		}
		if err := transport.Serve(s.backend, s.readOnly, part, nil); err != nil {
			return err
		}
		r.Off += part.N
		r.N -= part.N
	}
	return nil
}

// stands tells whether the driver has not given the connection up.
func (c *conn) stands() bool {
	raw, err := c.c.SyscallConn()
	if err != nil {
		return false
	}
	stands := false
	err = raw.Control(func(fd uintptr) {
		p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLRDHUP}}
		_, err := unix.Poll(p, 0)
		for err == unix.EINTR { // Go's scheduler interrupts threads by signals
			_, err = unix.Poll(p, 0)
		}
		stands = err == nil && p[0].Revents&(unix.POLLRDHUP|unix.POLLHUP|unix.POLLERR) == 0
	})
	return err == nil && stands
}

// reply answers. If it cannot the connection is dead, and the driver sends the
// request again.
func (c *conn) reply(r request, p []byte, err error) {
	var head [replySize]byte
	errno := uint32(0)
	if err != nil {
		klog.ErrorS(err, "A request of NBD has failed", "op", r.Op.String(), "offset", r.Off, "bytes", r.N)
		errno = uint32(transport.Errno(err))
	}
	putReply(head[:], r.cookie, errno)
	msg := net.Buffers{head[:]}
	if r.Op == transport.OpRead && err == nil {
		msg = append(msg, p)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, err := msg.WriteTo(c.c); err != nil {
		_ = c.c.Close() // half a reply must not be followed by another
	}
}

// pair makes a connection: our end, and the driver's.
func pair() (ours *net.UnixConn, theirs *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, os.NewSyscallError("socketpair", err)
	}
	for _, fd := range fds {
		// Room for some requests; less than that is slower.
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, 1<<20)
	}
	theirs = os.NewFile(uintptr(fds[1]), "nbd")
	f := os.NewFile(uintptr(fds[0]), "nbd")
	defer f.Close()
	c, err := net.FileConn(f)
	if err != nil {
		theirs.Close()
		return nil, nil, err
	}
	u, ok := c.(*net.UnixConn)
	if !ok {
		c.Close()
		theirs.Close()
		return nil, nil, fmt.Errorf("%T is no unix socket", c)
	}
	return u, theirs, nil
}

// taken tells whether somebody has the other end of a connection whose theirs
// this process has closed.
func taken(c *net.UnixConn) bool { return (&conn{c: c}).stands() }
