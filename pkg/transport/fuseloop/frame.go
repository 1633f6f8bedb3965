package fuseloop

import (
	"os"

	"golang.org/x/sys/unix"
)

const outHeaderSize = 16

// pageSize is that of the machine; direct I/O wants buffers aligned to it at
// the most.
var pageSize = os.Getpagesize()

// openNoFlush is FOPEN_NOFLUSH: no FLUSH when a process closes the file. Kernels
// before 5.16 do not know it.
const openNoFlush = 1 << 5

// frame is the memory for one request and its reply: a page and maxIO bytes.
//
//	0           small replies
//	page - 80   a request is read to here, so that the data of a WRITE
//	page - 16   a READ's reply begins here, so that its data
//	page        begins here, aligned for direct I/O
//
// A frame is used by one reader at a time.
type frame struct{ mem []byte }

func frameSize() int { return pageSize + maxIO }

// newFrame maps a frame, present in memory from the start: were a page missing when a
// process is killed that reads a request, the kernel could not copy the request, and
// would answer it with EIO instead of giving it to the next process.
func newFrame() (*frame, error) {
	mem, err := unix.Mmap(-1, 0, frameSize(), unix.PROT_READ|unix.PROT_WRITE,
		unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_POPULATE)
	if err != nil {
		return nil, os.NewSyscallError("mmap", err)
	}
	// Without swap, or without leave to lock, it stays in memory anyway or has
	// to take its chance.
	_ = unix.Mlock(mem)
	return &frame{mem}, nil
}

func (f *frame) free() {
	_ = unix.Munmap(f.mem) // fails only for what is not mapped
	f.mem = nil
}

// request is where to read a request to.
func (f *frame) request() []byte { return f.mem[pageSize-payloadOffset:] }

// payload is where the n bytes of a READ's data belong.
func (f *frame) payload(n int) []byte { return f.mem[pageSize : pageSize+n : pageSize+n] }

// replyPayload is the reply that carries the first n bytes of the payload.
func (f *frame) replyPayload(unique uint64, n int) []byte {
	reply := f.mem[pageSize-outHeaderSize : pageSize+n]
	putHeader(reply, unique, 0)
	return reply
}

// replyError is a reply without a body; errno 0 is success.
func (f *frame) replyError(unique uint64, errno unix.Errno) []byte {
	reply := f.mem[:outHeaderSize]
	putHeader(reply, unique, errno)
	return reply
}

// small is a successful reply with a zeroed body of n bytes, 512 at most.
func (f *frame) small(unique uint64, n int) (reply, body []byte) {
	reply = f.mem[:outHeaderSize+n]
	clear(reply)
	putHeader(reply, unique, 0)
	return reply, reply[outHeaderSize:]
}

func putHeader(reply []byte, unique uint64, errno unix.Errno) {
	native.PutUint32(reply, uint32(len(reply)))
	native.PutUint32(reply[4:], uint32(-int32(errno)))
	native.PutUint64(reply[8:], unique)
}

func (f *frame) replyWritten(unique uint64, n int) []byte {
	reply, b := f.small(unique, 8)
	native.PutUint32(b, uint32(n))
	return reply
}

// replyOpen: backing is the number of the file that is behind ours, 0 for none.
func (f *frame) replyOpen(unique uint64, backing int32) []byte {
	reply, b := f.small(unique, 16)
	flags := uint32(openNoFlush)
	if backing != 0 {
		flags |= openPassthrough
	}
	native.PutUint32(b[8:], flags)
	native.PutUint32(b[12:], uint32(backing))
	return reply
}

func (f *frame) replyInit(unique uint64, features uint64) []byte {
	reply, b := f.small(unique, 64)
	native.PutUint32(b[0:], protoMajor)
	native.PutUint32(b[4:], protoMinor)
	native.PutUint32(b[12:], uint32(features))
	native.PutUint16(b[16:], maxBackground)
	native.PutUint16(b[18:], maxBackground*3/4)
	native.PutUint32(b[20:], maxIO)
	native.PutUint32(b[24:], 1)
	native.PutUint16(b[28:], uint16(maxIO/pageSize))
	native.PutUint32(b[32:], uint32(features>>32))
	if features&featPassthrough != 0 {
		native.PutUint32(b[36:], stackDepth)
	}
	return reply
}

func (s *server) replyEntry(r *request, f *frame) []byte {
	reply, b := f.small(r.unique, 128)
	native.PutUint64(b[0:], diskNode)
	native.PutUint64(b[16:], foreverSeconds)
	native.PutUint64(b[24:], foreverSeconds)
	s.putAttr(b[40:], diskNode)
	return reply
}

func (s *server) replyAttr(r *request, f *frame) []byte {
	if r.node != rootNode && r.node != diskNode {
		return f.replyError(r.unique, unix.ENOENT)
	}
	reply, b := f.small(r.unique, 104)
	native.PutUint64(b[0:], foreverSeconds)
	s.putAttr(b[16:], r.node)
	return reply
}

func (s *server) putAttr(b []byte, node uint64) {
	native.PutUint64(b[0:], node)
	if node == rootNode {
		native.PutUint32(b[60:], unix.S_IFDIR|0o700)
		native.PutUint32(b[64:], 2)
	} else {
		size := uint64(s.size.Load())
		native.PutUint64(b[8:], size)
		native.PutUint64(b[16:], size/sectorSize)
		native.PutUint32(b[60:], unix.S_IFREG|0o600)
		native.PutUint32(b[64:], 1)
	}
	native.PutUint32(b[80:], blockSize)
}

// replyStatfs matters for bsize: it is the loop device's discard granularity.
func (s *server) replyStatfs(r *request, f *frame) []byte {
	reply, b := f.small(r.unique, 80)
	native.PutUint64(b[0:], uint64(s.size.Load()/blockSize))
	native.PutUint32(b[40:], blockSize)
	native.PutUint32(b[44:], 255)
	native.PutUint32(b[48:], blockSize)
	return reply
}
