package fuseloop

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
)

var native = binary.NativeEndian

type opcode uint32

// Opcodes of linux/fuse.h that we act on.
const (
	opLookup      opcode = 1
	opForget      opcode = 2
	opGetattr     opcode = 3
	opSetattr     opcode = 4
	opOpen        opcode = 14
	opRead        opcode = 15
	opWrite       opcode = 16
	opStatfs      opcode = 17
	opRelease     opcode = 18
	opFsync       opcode = 20
	opInit        opcode = 26
	opInterrupt   opcode = 36
	opDestroy     opcode = 38
	opBatchForget opcode = 42
	opFallocate   opcode = 43
)

const (
	inHeaderSize  = 40
	writeInSize   = 40
	payloadOffset = inHeaderSize + writeInSize // where the data of a WRITE begins

	// maxIO is the most bytes of one READ or WRITE.
	maxIO = 1 << 20

	rootNode = 1 // FUSE_ROOT_ID
	diskNode = 2

	setattrSize = 1 << 3 // FATTR_SIZE
)

// request is a message of the kernel. Slices point into the message.
type request struct {
	op     opcode
	unique uint64
	node   uint64

	name   []byte // LOOKUP
	flags  uint32 // SETATTR: valid; FALLOCATE: mode
	off    int64  // READ, WRITE, FALLOCATE: bytes
	length int64  // READ, WRITE, FALLOCATE: bytes; SETATTR: size
	data   []byte // WRITE

	major, minor uint32 // INIT
	features     uint64 // INIT: flags and flags2
}

var (
	// errNoHeader says that a message cannot even be answered.
	errNoHeader = errors.New("no FUSE header")
	// errBody says that a message has a header and nonsense behind it.
	errBody = errors.New("bad FUSE request")
)

// parseRequest takes a message of the kernel apart. The header is good unless
// the error is errNoHeader.
func parseRequest(msg []byte) (request, error) {
	if len(msg) < inHeaderSize || int64(native.Uint32(msg)) != int64(len(msg)) {
		return request{}, errNoHeader
	}
	r := request{
		op:     opcode(native.Uint32(msg[4:])),
		unique: native.Uint64(msg[8:]),
		node:   native.Uint64(msg[16:]),
	}
	if err := r.parseBody(msg[inHeaderSize:]); err != nil {
		return r, fmt.Errorf("%w: opcode %d: %w", errBody, r.op, err)
	}
	return r, nil
}

func (r *request) parseBody(b []byte) error {
	size := -1 // of the body, if it is fixed
	switch r.op {
	case opForget, opOpen, opInterrupt:
		size = 8
	case opGetattr, opFsync:
		size = 16
	case opSetattr:
		size = 88
	case opRead:
		size = 40
	case opRelease:
		size = 24
	case opFallocate:
		size = 32
	case opStatfs, opDestroy:
		size = 0
	}
	if size >= 0 && len(b) != size {
		return fmt.Errorf("body of %d bytes, want %d", len(b), size)
	}
	switch r.op {
	case opLookup:
		name, rest, found := bytes.Cut(b, []byte{0})
		if !found || len(rest) != 0 || len(name) == 0 {
			return errors.New("name does not end with its NUL")
		}
		r.name = name
	case opSetattr:
		r.flags = native.Uint32(b)
		r.length = int64(native.Uint64(b[16:]))
	case opRead:
		r.off = int64(native.Uint64(b[8:]))
		r.length = int64(native.Uint32(b[16:]))
		return r.checkTransfer()
	case opWrite:
		if len(b) < writeInSize {
			return fmt.Errorf("body of %d bytes, want %d and the data", len(b), writeInSize)
		}
		r.off = int64(native.Uint64(b[8:]))
		r.length = int64(native.Uint32(b[16:]))
		r.data = b[writeInSize:]
		if int64(len(r.data)) != r.length {
			return fmt.Errorf("%d bytes of data, want %d", len(r.data), r.length)
		}
		return r.checkTransfer()
	case opFallocate:
		r.off = int64(native.Uint64(b[8:]))
		r.length = int64(native.Uint64(b[16:]))
		r.flags = native.Uint32(b[24:])
	case opInit:
		if len(b) < 16 {
			return fmt.Errorf("body of %d bytes, want 16 or more", len(b))
		}
		r.major, r.minor = native.Uint32(b), native.Uint32(b[4:])
		r.features = uint64(native.Uint32(b[12:]))
		if r.features&featInitExt != 0 && len(b) >= 20 {
			r.features |= uint64(native.Uint32(b[16:])) << 32
		}
	case opBatchForget:
		if len(b) < 8 || int64(len(b)) != 8+16*int64(native.Uint32(b)) {
			return fmt.Errorf("body of %d bytes does not fit its count", len(b))
		}
	}
	return nil
}

func (r *request) checkTransfer() error {
	if r.length > maxIO {
		return fmt.Errorf("%d bytes, at most %d", r.length, maxIO)
	}
	return nil
}
