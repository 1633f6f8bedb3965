// Package writelog is the write log of a volume: an append-only file of
// checksummed records that takes every guest write that may not go straight to
// the base, and serves it until it is folded into the base.
//
// # File
//
// All integers are little-endian.
//
//	offset          length    content
//	0               4096      file header
//	4096 + i*S      S         segment i; S is in the file header
//
// File header (CRC-32C over bytes 0..59):
//
//	offset  size  field
//	0       8     magic "SNPMWLOG"
//	8       4     format version, 1
//	12      4     segment length S in bytes, a multiple of 4096
//	16      8     layer id of the log in its volume
//	24      16    volume id hash, so that a log put in a wrong place is refused
//	40      20    zero
//	60      4     CRC-32C
//
// A segment holds records one after the other, each at a multiple of 64 bytes;
// a record never crosses a segment's end. Record header, 64 bytes (CRC-32C over
// bytes 8..63):
//
//	offset  size  field
//	0       4     magic "SMRC"
//	4       4     CRC-32C of the header
//	8       1     type: 1 data, 2 zero, 3 mark
//	9       3     zero
//	12      4     payload length in bytes (data), else 0
//	16      8     sequence number, grows by 1 with every record of the file
//	24      8     highest sequence number known to be flushed when it was written
//	32      4     epoch: the opening of the log that wrote it, from 1
//	36      4     CRC-32C of the payload
//	40      8     first sector (512 bytes)
//	48      8     number of sectors
//	56      8     layer id
//
// A data record's payload follows its header. A zero record makes a range of
// any length read as zeros (write-zeroes and discard). A mark carries nothing
// but the flushed number: it follows a flush, so that what was flushed is known
// even if nothing was written since.
//
// # What counts after a crash
//
// Records are written one after the other, so the valid prefix of the file, by
// sequence number, is what counts: after kill -9 it holds every acknowledged
// write, after power loss every flushed one. If a record behind the prefix is
// valid and says that the first missing one was flushed, or the volume's record
// says so, the log is damaged; otherwise the rest is a torn tail, which is cut
// off and the cut flushed before the first append.
package writelog

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
)

const (
	fileMagic   = "SNPMWLOG"
	fileVersion = 1
	recordMagic = 0x43524d53 // "SMRC"

	headerBytes  = 4096
	recordHeader = 64
	recordAlign  = 64
	sector       = 512

	typeData = 1
	typeZero = 2
	typeMark = 3

	// DefaultSegment is the segment length of new logs, in bytes.
	DefaultSegment = 8 << 20
	// MaxRecord is the most payload of one record, in bytes; longer writes are
	// split.
	MaxRecord = 1 << 20

	minSegment = 4096
	maxSegment = 1 << 30
)

var (
	castagnoli = crc32.MakeTable(crc32.Castagnoli)
	le         = binary.LittleEndian
)

// ErrDamaged says that a record that was flushed, and so may not be missing,
// cannot be read.
var ErrDamaged = errors.New("write log is damaged")

// fileHeader is the fixed part of a log file.
type fileHeader struct {
	segment int64
	layer   uint64
	volume  [16]byte
}

func (h *fileHeader) encode() []byte {
	p := make([]byte, headerBytes)
	copy(p, fileMagic)
	le.PutUint32(p[8:], fileVersion)
	le.PutUint32(p[12:], uint32(h.segment))
	le.PutUint64(p[16:], h.layer)
	copy(p[24:40], h.volume[:])
	le.PutUint32(p[60:], crc32.Checksum(p[:60], castagnoli))
	return p
}

func (h *fileHeader) decode(p []byte) error {
	switch {
	case len(p) < 64:
		return errors.New("byte 0: file is shorter than its header")
	case string(p[:8]) != fileMagic:
		return errors.New("byte 0: wrong magic")
	case crc32.Checksum(p[:60], castagnoli) != le.Uint32(p[60:]):
		return errors.New("byte 60: wrong checksum of the file header")
	case le.Uint32(p[8:]) != fileVersion:
		return fmt.Errorf("byte 8: format version %d, this program knows %d", le.Uint32(p[8:]), fileVersion)
	}
	h.segment, h.layer = int64(le.Uint32(p[12:])), le.Uint64(p[16:])
	copy(h.volume[:], p[24:40])
	if h.segment < minSegment || h.segment > maxSegment || h.segment%4096 != 0 {
		return fmt.Errorf("byte 12: segment length %d", h.segment)
	}
	return nil
}

// record is a record header in memory.
type record struct {
	kind       uint8
	payload    uint32 // bytes
	seq        uint64
	flushed    uint64
	epoch      uint32
	payloadCRC uint32
	start, n   uint64 // sectors
	layer      uint64
}

func (r *record) encode(p *[recordHeader]byte) {
	*p = [recordHeader]byte{}
	le.PutUint32(p[0:], recordMagic)
	p[8] = r.kind
	le.PutUint32(p[12:], r.payload)
	le.PutUint64(p[16:], r.seq)
	le.PutUint64(p[24:], r.flushed)
	le.PutUint32(p[32:], r.epoch)
	le.PutUint32(p[36:], r.payloadCRC)
	le.PutUint64(p[40:], r.start)
	le.PutUint64(p[48:], r.n)
	le.PutUint64(p[56:], r.layer)
	le.PutUint32(p[4:], crc32.Checksum(p[8:], castagnoli))
}

// decode reads a record header; false if there is none.
func (r *record) decode(p []byte, layer uint64) bool {
	if le.Uint32(p[0:]) != recordMagic || crc32.Checksum(p[8:recordHeader], castagnoli) != le.Uint32(p[4:]) {
		return false
	}
	*r = record{
		kind: p[8], payload: le.Uint32(p[12:]), seq: le.Uint64(p[16:]), flushed: le.Uint64(p[24:]),
		epoch: le.Uint32(p[32:]), payloadCRC: le.Uint32(p[36:]), start: le.Uint64(p[40:]), n: le.Uint64(p[48:]), layer: le.Uint64(p[56:]),
	}
	const maxSectors = 1 << 55 // 2^64 bytes
	if r.layer != layer || r.start > maxSectors || r.n > maxSectors || r.seq == 0 || r.flushed >= r.seq {
		return false
	}
	switch r.kind {
	case typeData:
		return r.payload > 0 && r.payload <= MaxRecord && uint64(r.payload) == r.n*sector
	case typeZero:
		return r.payload == 0 && r.n > 0
	case typeMark:
		return r.payload == 0 && r.n == 0
	}
	return false
}

// size is the room the record takes in a segment, in bytes.
func (r *record) size() int64 {
	return (recordHeader + int64(r.payload) + recordAlign - 1) / recordAlign * recordAlign
}
