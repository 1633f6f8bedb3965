package fuseloop

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/snapmerge/snapmerge/pkg/transport"
)

// message builds a request as the kernel would.
func message(op opcode, node uint64, body ...any) []byte {
	var b []byte
	for _, v := range body {
		switch v := v.(type) {
		case uint16:
			b = native.AppendUint16(b, v)
		case uint32:
			b = native.AppendUint32(b, v)
		case uint64:
			b = native.AppendUint64(b, v)
		case string:
			b = append(b, v...)
		case []byte:
			b = append(b, v...)
		default:
			panic(fmt.Sprintf("%T", v))
		}
	}
	msg := make([]byte, inHeaderSize, inHeaderSize+len(b))
	native.PutUint32(msg, uint32(inHeaderSize+len(b)))
	native.PutUint32(msg[4:], uint32(op))
	native.PutUint64(msg[8:], testUnique)
	native.PutUint64(msg[16:], node)
	return append(msg, b...)
}

const testUnique = 1<<63 | 42 // as after a resend

func readMsg(off uint64, n uint32) []byte {
	return message(opRead, diskNode, uint64(1), off, n, uint32(0), uint64(0), uint32(0), uint32(0))
}

func writeMsg(off uint64, n uint32, data []byte) []byte {
	return message(opWrite, diskNode, uint64(1), off, n, uint32(0), uint64(0), uint32(0), uint32(0), data)
}

func fallocMsg(off, n uint64, mode uint32) []byte {
	return message(opFallocate, diskNode, uint64(1), off, n, mode, uint32(0))
}

func initMsg(major, minor, flags, flags2 uint32) []byte {
	return message(opInit, 0, major, minor, uint32(1<<20), flags, flags2, make([]byte, 44))
}

func setattrMsg(valid uint32, size uint64) []byte {
	return message(opSetattr, diskNode, valid, uint32(0), uint64(0), size, make([]byte, 64))
}

// testFrame is a frame of ordinary memory with the message where read would put
// it.
func testFrame(msg []byte) (*frame, []byte) {
	f := &frame{make([]byte, frameSize())}
	return f, f.request()[:copy(f.request(), msg)]
}

const (
	noReply = -1 // instead of an errno
	volSize = 64 << 10
)

// TestHandle gives the server good and bad requests and looks at the replies'
// headers and lengths.
func TestHandle(t *testing.T) {
	block := bytes.Repeat([]byte{7}, 4096)
	cut := func(msg []byte, n int) []byte { // with a length that fits
		msg = bytes.Clone(msg[:len(msg)-n])
		native.PutUint32(msg, uint32(len(msg)))
		return msg
	}
	lie := func(msg []byte, n uint32) []byte { // about the length
		msg = bytes.Clone(msg)
		native.PutUint32(msg, n)
		return msg
	}
	read := readMsg(0, 4096)
	tests := []struct {
		name  string
		msg   []byte
		errno int // or noReply
		body  int // bytes of the reply behind its header
	}{
		{"init", initMsg(7, 45, featInitExt|featMaxPages, 1<<7), 0, 64},
		{"init of a kernel to come", initMsg(8, 0, 0, 0), 0, 64},
		{"init of an old kernel", message(opInit, 0, uint32(7), uint32(31), uint32(0), uint32(0)), 0, 64},
		{"init of a very old kernel", initMsg(7, 30, 0, 0), int(unix.EPROTO), 0},
		{"init, cut", cut(initMsg(7, 45, 0, 0), 49), int(unix.EINVAL), 0},
		{"lookup", message(opLookup, rootNode, "disk\x00"), 0, 128},
		{"lookup of another name", message(opLookup, rootNode, "dis\x00"), int(unix.ENOENT), 0},
		{"lookup in the file", message(opLookup, diskNode, "disk\x00"), int(unix.ENOENT), 0},
		{"lookup without NUL", message(opLookup, rootNode, "disk"), int(unix.EINVAL), 0},
		{"lookup of two names", message(opLookup, rootNode, "disk\x00disk\x00"), int(unix.EINVAL), 0},
		{"lookup of nothing", message(opLookup, rootNode, "\x00"), int(unix.EINVAL), 0},
		{"getattr", message(opGetattr, diskNode, make([]byte, 16)), 0, 104},
		{"getattr of the root", message(opGetattr, rootNode, make([]byte, 16)), 0, 104},
		{"getattr of another node", message(opGetattr, 3, make([]byte, 16)), int(unix.ENOENT), 0},
		{"getattr, cut", message(opGetattr, diskNode, make([]byte, 15)), int(unix.EINVAL), 0},
		{"setattr of times", setattrMsg(1<<4, 0), 0, 104},
		{"setattr of our size", setattrMsg(setattrSize, volSize), 0, 104},
		{"setattr of another size", setattrMsg(setattrSize, volSize-4096), int(unix.EINVAL), 0},
		{"open", message(opOpen, diskNode, make([]byte, 8)), 0, 16},
		{"open of the root", message(opOpen, rootNode, make([]byte, 8)), int(unix.EISDIR), 0},
		{"release", message(opRelease, diskNode, make([]byte, 24)), 0, 0},
		{"statfs", message(opStatfs, rootNode), 0, 80},
		{"statfs with a body", message(opStatfs, rootNode, "x"), int(unix.EINVAL), 0},
		{"fsync", message(opFsync, diskNode, make([]byte, 16)), 0, 0},
		{"destroy", message(opDestroy, 0), 0, 0},
		{"forget", message(opForget, diskNode, uint64(1)), noReply, 0},
		{"forget, cut", message(opForget, diskNode, uint32(1)), int(unix.EINVAL), 0},
		{"forget of many", message(opBatchForget, 0, uint32(2), uint32(0), make([]byte, 32)), noReply, 0},
		{"forget of more than there are", message(opBatchForget, 0, ^uint32(0), uint32(0), make([]byte, 32)), int(unix.EINVAL), 0},
		{"interrupt", message(opInterrupt, 0, uint64(42)), noReply, 0},
		{"flush", message(25, diskNode, make([]byte, 24)), int(unix.ENOSYS), 0},
		{"getxattr", message(22, diskNode, make([]byte, 8), "user.x\x00"), int(unix.ENOSYS), 0},
		{"access", message(34, diskNode, make([]byte, 8)), int(unix.ENOSYS), 0},
		{"no such opcode", message(1<<31, diskNode), int(unix.ENOSYS), 0},

		{"read", read, 0, 4096},
		{"read of a sector", readMsg(512, 512), 0, 512},
		{"read of nothing", readMsg(0, 0), 0, 0},
		{"read up to the end", readMsg(volSize-4096, 4096), 0, 4096},
		{"read of the root", message(opRead, rootNode, make([]byte, 40)), int(unix.EINVAL), 0},
		{"read past the end", readMsg(volSize-4096, 8192), int(unix.EINVAL), 0},
		{"read far out", readMsg(1<<62, 4096), int(unix.EINVAL), 0},
		{"read at a negative offset", readMsg(^uint64(0)-511, 512), int(unix.EINVAL), 0},
		{"read, unaligned offset", readMsg(1, 512), int(unix.EINVAL), 0},
		{"read, unaligned length", readMsg(0, 511), int(unix.EINVAL), 0},
		{"read of too much", readMsg(0, maxIO+512), int(unix.EINVAL), 0},
		{"read of 4 GiB", readMsg(0, ^uint32(0)), int(unix.EINVAL), 0},
		{"read, cut", cut(read, 1), int(unix.EINVAL), 0},
		{"write", writeMsg(4096, 4096, block), 0, 8},
		{"write past the end", writeMsg(volSize, 4096, block), int(unix.EINVAL), 0},
		{"write of less than it says", writeMsg(0, 4096, block[:512]), int(unix.EINVAL), 0},
		{"write of more than it says", writeMsg(0, 512, block), int(unix.EINVAL), 0},
		{"write, cut in its header", cut(writeMsg(0, 0, nil), 4), int(unix.EINVAL), 0},
		{"punch a hole", fallocMsg(0, 8192, 3), 0, 0},
		{"zero a range", fallocMsg(0, 8192, 0x10), 0, 0},
		{"zero a range, keeping the size", fallocMsg(0, 8192, 0x11), 0, 0},
		{"allocate", fallocMsg(0, 8192, 0), int(unix.EOPNOTSUPP), 0},
		{"collapse", fallocMsg(0, 8192, 8), int(unix.EOPNOTSUPP), 0},
		{"punch past the end", fallocMsg(0, volSize+512, 3), int(unix.EINVAL), 0},
		{"punch 2^64 bytes", fallocMsg(512, ^uint64(511), 3), int(unix.EINVAL), 0},

		{"nothing", nil, noReply, 0},
		{"half a header", read[:20], noReply, 0},
		{"longer than it says", lie(read, 79), noReply, 0},
		{"shorter than it says", lie(read, 81), noReply, 0},
		{"says 4 GiB", lie(read, ^uint32(0)), noReply, 0},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s := newServer("disk", newMemBackend(volSize), false)
			f, msg := testFrame(tt.msg)
			reply := s.handle(msg, f)
			if tt.errno == noReply {
				if reply != nil {
					t.Fatalf("reply %x", reply)
				}
				return
			}
			if errno := checkReply(t, reply); errno != tt.errno {
				t.Errorf("errno %d, want %d", errno, tt.errno)
			}
			if len(reply) != outHeaderSize+tt.body {
				t.Errorf("reply of %d bytes, want %d", len(reply), outHeaderSize+tt.body)
			}
		})
	}
}

// checkReply checks what the kernel checks and returns the errno.
func checkReply(t *testing.T, reply []byte) int {
	t.Helper()
	if len(reply) < outHeaderSize {
		t.Fatalf("reply of %d bytes", len(reply))
	}
	errno := -int(int32(native.Uint32(reply[4:])))
	if n := native.Uint32(reply); int(n) != len(reply) {
		t.Fatalf("reply of %d bytes says %d", len(reply), n)
	}
	if errno < 0 || errno > 511 || errno != 0 && len(reply) != outHeaderSize {
		t.Fatalf("reply of %d bytes with errno %d", len(reply), errno)
	}
	if u := native.Uint64(reply[8:]); u != testUnique {
		t.Fatalf("reply to request %#x", u)
	}
	return errno
}

// TestData checks that data lands where it belongs and is aligned.
func TestData(t *testing.T) {
	m := newMemBackend(volSize)
	s := newServer("disk", m, false)
	data := make([]byte, 8192)
	for i := range data {
		data[i] = byte(i*7 + i>>8)
	}
	f, msg := testFrame(writeMsg(4096, 8192, data))
	if reply := s.handle(msg, f); checkReply(t, reply) != 0 || native.Uint32(reply[outHeaderSize:]) != 8192 {
		t.Fatalf("write: %x", reply)
	}
	if !bytes.Equal(m.data[4096:12288], data) {
		t.Error("written wrong")
	}
	f, msg = testFrame(readMsg(4096, 8192))
	if reply := s.handle(msg, f); checkReply(t, reply) != 0 || !bytes.Equal(reply[outHeaderSize:], data) {
		t.Error("read wrong")
	}
	f, msg = testFrame(fallocMsg(4096+512, 512, 3))
	if reply := s.handle(msg, f); checkReply(t, reply) != 0 || !bytes.Equal(m.data[4608:5120], make([]byte, 512)) {
		t.Error("zeroed wrong")
	}
	if m.data[4607] != data[511] || m.data[5120] != data[1024] {
		t.Error("zeroed too much")
	}
}

func TestReadOnlyServer(t *testing.T) {
	m := newMemBackend(volSize)
	s := newServer("disk", m, true)
	for _, msg := range [][]byte{writeMsg(0, 512, make([]byte, 512)), fallocMsg(0, 512, 3)} {
		f, msg := testFrame(msg)
		if errno := checkReply(t, s.handle(msg, f)); errno != int(unix.EROFS) {
			t.Errorf("errno %d", errno)
		}
	}
	if m.writes.Load()+m.zeros.Load() != 0 {
		t.Error("the backend was written")
	}
}

func TestInitFeatures(t *testing.T) {
	s := newServer("disk", newMemBackend(volSize), false)
	f, msg := testFrame(initMsg(7, 45, ^uint32(0), ^uint32(0)))
	b := s.handle(msg, f)[outHeaderSize:]
	if got := uint64(native.Uint32(b[12:])) | uint64(native.Uint32(b[32:]))<<32; got != featWanted {
		t.Errorf("features %#x, want %#x", got, uint64(featWanted))
	}
	if native.Uint32(b[0:]) != 7 || native.Uint32(b[20:]) != maxIO || int(native.Uint16(b[28:]))*pageSize != maxIO {
		t.Errorf("INIT reply %x", b)
	}
	<-s.inited
	if s.initErr != nil || s.features.Load() != featWanted {
		t.Errorf("%v, features %#x", s.initErr, s.features.Load())
	}
	// Without INIT_EXT the second word of flags means nothing.
	s = newServer("disk", newMemBackend(volSize), false)
	f, msg = testFrame(initMsg(7, 35, 0, ^uint32(0)))
	s.handle(msg, f)
	if got := s.features.Load(); got != 0 {
		t.Errorf("features %#x, want none", got)
	}
}

func TestErrnoOf(t *testing.T) {
	for _, tt := range []struct {
		err  error
		want unix.Errno
	}{
		{nil, 0},
		{unix.ENOSPC, unix.ENOSPC},
		{fmt.Errorf("log: %w", unix.ENOSPC), unix.ENOSPC},
		{errors.Join(errors.New("a"), unix.EDQUOT), unix.EDQUOT},
		{unix.EOPNOTSUPP, unix.EOPNOTSUPP},
		{errors.New("something"), unix.EIO},
		{io.ErrUnexpectedEOF, unix.EIO},
		{unix.ENOSYS, unix.EIO},
		{unix.EINTR, unix.EIO},
		{unix.EAGAIN, unix.EIO},
		{unix.Errno(512), unix.EIO},
		{unix.Errno(1 << 31), unix.EIO},
	} {
		if got := errnoOf(tt.err); got != tt.want {
			t.Errorf("%v: %v, want %v", tt.err, got, tt.want)
		}
	}
	if err := transport.Whole(4096, 4096, io.EOF); err != nil {
		t.Errorf("a whole read up to the end: %v", err)
	}
	if err := transport.Whole(512, 4096, nil); err == nil {
		t.Error("a short read without an error is taken for whole")
	}
	if err := transport.Whole(512, 4096, io.EOF); err == nil {
		t.Error("a short read at the end is taken for whole")
	}
}

// FuzzRequest checks that whatever is read from /dev/fuse, the server neither
// panics nor gives a reply that the kernel would refuse, which would hang the
// guest.
func FuzzRequest(f *testing.F) {
	for _, msg := range [][]byte{
		initMsg(7, 45, ^uint32(0), ^uint32(0)),
		message(opLookup, rootNode, "disk\x00"),
		message(opGetattr, diskNode, make([]byte, 16)),
		setattrMsg(setattrSize, volSize),
		message(opOpen, diskNode, make([]byte, 8)),
		message(opRelease, diskNode, make([]byte, 24)),
		message(opStatfs, rootNode),
		message(opFsync, diskNode, make([]byte, 16)),
		message(opBatchForget, 0, uint32(2), uint32(0), make([]byte, 32)),
		readMsg(0, 4096),
		writeMsg(512, 512, make([]byte, 512)),
		fallocMsg(0, 8192, 3),
	} {
		f.Add(msg)
	}
	s := newServer("disk", newMemBackend(volSize), false)
	fr := &frame{make([]byte, frameSize())}
	f.Fuzz(func(t *testing.T, msg []byte) {
		if len(msg) > len(fr.request()) {
			return // read has no more room
		}
		if len(msg) >= inHeaderSize {
			native.PutUint32(msg, uint32(len(msg))) // get past the first check
			native.PutUint64(msg[8:], testUnique)
		}
		in := fr.request()[:copy(fr.request(), msg)]
		if reply := s.handle(in, fr); reply != nil {
			checkReply(t, reply)
		} else if len(msg) >= inHeaderSize {
			switch op := opcode(native.Uint32(msg[4:])); op {
			case opForget, opBatchForget, opInterrupt:
			default:
				t.Fatalf("no reply to opcode %d", op)
			}
		}
	})
}
