package fuseloop

import (
	"errors"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"

	"github.com/snapmerge/snapmerge/pkg/transport"
)

const (
	blockSize  = 4096 // of the device, in bytes
	sectorSize = 512  // what offsets and lengths must be multiples of

	protoMajor    = 7
	protoMinor    = 40 // the newest that we know
	protoMinorMin = 31

	// maxBackground is the most requests that the kernel has under way; a loop
	// device has a queue of 128.
	maxBackground = 128

	// foreverSeconds is how long the kernel may believe names and attributes.
	foreverSeconds = 1 << 32
)

// Feature bits of INIT; from bit 32 on they lie in flags2.
const (
	featAsyncRead   = 1 << 0
	featBigWrites   = 1 << 5
	featAsyncDIO    = 1 << 15
	featMaxPages    = 1 << 22
	featInitExt     = 1 << 30
	featPassthrough = 1 << 37
	featHasResend   = 1 << 39

	featWanted = featAsyncRead | featBigWrites | featAsyncDIO | featMaxPages | featInitExt | featHasResend
)

// server answers the requests of one connection. It knows nothing of
// descriptors; handle may be called concurrently.
type server struct {
	name     string // of the file
	backend  transport.Backend
	lender   transport.Lender // the backend, if it is one
	readOnly bool
	want     uint64       // features to ask for
	size     atomic.Int64 // of the file, in bytes
	// backing is the kernel's number of the file that is read and written in place of
	// ours; 0: there is none.
	backing atomic.Int32

	features atomic.Uint64 // as agreed by INIT
	initOnce sync.Once
	inited   chan struct{} // closed when INIT has been answered
	initErr  error         // valid once inited is closed

	opens        atomic.Int64  // times the file is open
	attached     atomic.Bool   // the loop device has the file, or had it
	releasedOnce sync.Once     //
	released     chan struct{} // closed when the loop device has let go of the file
	inBackend    atomic.Int64  // calls of the backend under way, and what it has lent
	noRing       atomic.Bool   // readers cannot have what it lends, for want of io_uring
}

func newServer(name string, b transport.Backend, readOnly bool) *server {
	s := &server{
		name: name, backend: b, readOnly: readOnly, want: featWanted,
		inited:   make(chan struct{}),
		released: make(chan struct{}),
	}
	s.lender, _ = b.(transport.Lender)
	s.size.Store(b.Size())
	return s
}

// handle carries out the request in msg, which lies in f, and returns the reply,
// which lies there too; nil if there is to be none.
func (s *server) handle(msg []byte, f *frame) []byte {
	r, err := parseRequest(msg)
	if errors.Is(err, errNoHeader) {
		klog.ErrorS(err, "Dropped a message of the kernel", "bytes", len(msg))
		return nil
	}
	if err != nil {
		klog.ErrorS(err, "Refused a request of the kernel")
		return f.replyError(r.unique, unix.EINVAL)
	}
	switch r.op {
	case opForget, opBatchForget, opInterrupt:
		// Nodes live for ever, and no request of ours can be cut short.
		return nil
	case opRead:
		return s.read(&r, f)
	case opWrite:
		return s.write(&r, f)
	case opFsync:
		return f.replyError(r.unique, s.call(s.backend.Flush))
	case opFallocate:
		return f.replyError(r.unique, s.fallocate(&r))
	case opInit:
		return s.init(&r, f)
	case opLookup:
		if r.node != rootNode || string(r.name) != s.name {
			return f.replyError(r.unique, unix.ENOENT)
		}
		return s.replyEntry(&r, f)
	case opGetattr:
		return s.replyAttr(&r, f)
	case opSetattr:
		// Only Resize does this, to tell the kernel the size that we have already.
		if r.flags&setattrSize != 0 && (r.node != diskNode || r.length != s.size.Load()) {
			return f.replyError(r.unique, unix.EINVAL)
		}
		return s.replyAttr(&r, f)
	case opOpen:
		return s.open(&r, f)
	case opRelease:
		if r.node == diskNode && s.opens.Add(-1) == 0 {
			s.noteRelease()
		}
		return f.replyError(r.unique, 0)
	case opStatfs:
		return s.replyStatfs(&r, f)
	case opDestroy:
		return f.replyError(r.unique, 0)
	default:
		return f.replyError(r.unique, unix.ENOSYS)
	}
}

// setAttached says that the loop device has the file, so that a file that nobody
// has open means its end from now on. Before, it is opened and closed in vain
// whenever somebody else is faster to take a loop device.
func (s *server) setAttached() {
	s.attached.Store(true)
	s.noteRelease()
}

func (s *server) noteRelease() {
	if s.attached.Load() && s.opens.Load() == 0 {
		s.releasedOnce.Do(func() { close(s.released) })
	}
}

// checkRange answers EINVAL for what cannot come from our loop device.
func (s *server) checkRange(r *request) unix.Errno {
	size := s.size.Load()
	if r.node != diskNode || r.off < 0 || r.length < 0 || r.off > size || r.length > size-r.off ||
		r.off%sectorSize != 0 || r.length%sectorSize != 0 {
		klog.ErrorS(errBody, "Refused a range", "opcode", r.op, "node", r.node,
			"offset", r.off, "length", r.length, "size", size)
		return unix.EINVAL
	}
	return 0
}

func (s *server) read(r *request, f *frame) []byte {
	if errno := s.checkRange(r); errno != 0 {
		return f.replyError(r.unique, errno)
	}
	p := f.payload(int(r.length))
	errno := s.call(func() error {
		n, err := s.backend.ReadAt(p, r.off)
		return transport.Whole(n, len(p), err)
	})
	if errno != 0 {
		return f.replyError(r.unique, errno)
	}
	return f.replyPayload(r.unique, len(p))
}

func (s *server) write(r *request, f *frame) []byte {
	if s.readOnly {
		return f.replyError(r.unique, unix.EROFS)
	}
	if errno := s.checkRange(r); errno != 0 {
		return f.replyError(r.unique, errno)
	}
	errno := s.call(func() error {
		n, err := s.backend.WriteAt(r.data, r.off)
		return transport.Whole(n, len(r.data), err)
	})
	if errno != 0 {
		return f.replyError(r.unique, errno)
	}
	return f.replyWritten(r.unique, len(r.data))
}

// mayLend tells whether a request is one to be lent what it takes.
func (s *server) mayLend(r *request) bool {
	return s.lender != nil && !s.noRing.Load() && (r.op == opRead || r.op == opWrite && !s.readOnly) && r.length > 0 && r.length <= maxLentIO &&
		s.checkRange(r) == 0
}

// lend is Lend of the backend; what is lent counts as a call of it until giveBack.
func (s *server) lend(r *request) (fd int, back func(done bool), ok bool) {
	if fd, back, ok = s.lender.Lend(r.off, r.length, r.op == opWrite); ok {
		s.inBackend.Add(1)
	}
	return fd, back, ok
}

func (s *server) giveBack(back func(done bool), done bool) {
	back(done)
	s.inBackend.Add(-1)
}

// Modes of fallocate. The loop device asks for a hole for a discard and for
// write-zeroes, and for a zeroed range for write-zeroes without unmapping.
const (
	fallocHole = unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE
	fallocZero = unix.FALLOC_FL_ZERO_RANGE
)

func (s *server) fallocate(r *request) unix.Errno {
	if s.readOnly {
		return unix.EROFS
	}
	switch r.flags {
	case fallocHole, fallocZero, fallocZero | unix.FALLOC_FL_KEEP_SIZE:
	default:
		return unix.EOPNOTSUPP
	}
	if errno := s.checkRange(r); errno != 0 {
		return errno
	}
	return s.call(func() error { return s.backend.Zero(r.off, r.length) })
}

// call makes a call of the backend, counted.
func (s *server) call(f func() error) unix.Errno {
	s.inBackend.Add(1)
	defer s.inBackend.Add(-1)
	return errnoOf(f())
}

// errnoOf is what the guest shall see of a backend's error.
func errnoOf(err error) unix.Errno {
	if err == nil {
		return 0
	}
	var errno unix.Errno
	if !errors.As(err, &errno) {
		return unix.EIO
	}
	switch errno {
	case unix.ENOSYS:
		// The kernel would never send such a request again and call it a success.
		return unix.EIO
	case unix.EINTR, unix.EAGAIN:
		// The loop device has nobody who would try again.
		return unix.EIO
	}
	if errno < 1 || errno > 511 {
		return unix.EIO // the kernel takes no others, and the guest would wait for ever
	}
	return errno
}

// init agrees on the protocol. The kernel waits with all else until then.
func (s *server) init(r *request, f *frame) []byte {
	if r.major > protoMajor {
		return f.replyInit(r.unique, 0) // it asks again in our version
	}
	if r.major < protoMajor || r.minor < protoMinorMin {
		s.finishInit(errors.New("the kernel's FUSE protocol is older than 7.31 (kernel 5.4)"))
		return f.replyError(r.unique, unix.EPROTO)
	}
	features := r.features & s.want
	s.features.Store(features)
	s.finishInit(nil)
	return f.replyInit(r.unique, features)
}

func (s *server) finishInit(err error) {
	s.initOnce.Do(func() {
		s.initErr = err
		close(s.inited)
	})
}

func (s *server) open(r *request, f *frame) []byte {
	if r.node != diskNode {
		return f.replyError(r.unique, unix.EISDIR)
	}
	backing := s.backing.Load()
	if backing == backingUnknown {
		// All who have the file open must have the same one behind it.
		return f.replyError(r.unique, unix.EIO)
	}
	s.opens.Add(1)
	return f.replyOpen(r.unique, backing)
}
