package dmuser

import (
	"encoding/binary"
	"fmt"

	"github.com/snapmerge/snapmerge/pkg/transport"
)

var native = binary.NativeEndian

// Request types (DM_USER_REQ_MAP_*).
type reqType uint64

const (
	reqRead  reqType = 0
	reqWrite reqType = 1
	reqFlush reqType = 2
)

// Answers (DM_USER_RESP_*).
type respType uint64

const (
	respSuccess     respType = 0
	respError       respType = 1
	respUnsupported respType = 2
)

// Flags of a request (DM_USER_REQ_MAP_FLAG_*).
const (
	flagFUA      = 0x200
	flagPreflush = 0x400
)

const (
	headerSize  = 40
	sectorSize  = 512
	sectorShift = 9

	// noSeq is a seq that no request has.
	noSeq = ^uint64(0)
)

// header is a message without its payload.
type header struct {
	seq    uint64
	typ    uint64
	flags  uint64
	sector uint64
	n      uint64 // bytes
}

func decodeHeader(b []byte) header {
	return header{native.Uint64(b), native.Uint64(b[8:]), native.Uint64(b[16:]), native.Uint64(b[24:]), native.Uint64(b[32:])}
}

func (h header) encode(b []byte) {
	for i, v := range [...]uint64{h.seq, h.typ, h.flags, h.sector, h.n} {
		native.PutUint64(b[8*i:], v)
	}
}

// payload is how many bytes follow the request's header.
func (h header) payload() int64 {
	if reqType(h.typ) == reqWrite {
		return int64(h.n)
	}
	return 0
}

// at is part of the request, for the backend; off counts from its beginning.
func (h header) at(op transport.Op, off, n int64) transport.Request {
	return transport.Request{Op: op, Off: int64(h.sector<<sectorShift) + off, N: n}
}

// check refuses what no request of the kernel can be.
func (h header) check() error {
	const most = 1 << 62
	if h.sector >= most>>sectorShift || h.n >= most || h.n%sectorSize != 0 {
		return fmt.Errorf("%w: request of type %d at sector %d for %d bytes", transport.ErrRange, h.typ, h.sector, h.n)
	}
	return nil
}
