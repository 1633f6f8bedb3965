package cow

import (
	"encoding/binary"
	"io"
	"math/bits"
)

const (
	magic          = 0x436f77634f572121
	headerSizeV1   = 34
	headerSizeV2   = 38
	headerSizeV3   = 78
	footerSize     = 84
	footerDataSize = 64
	// minScratch is the smallest scratch that keeps entries and data apart and
	// that Android's engine can use, in bytes.
	minScratch = 2 << 20
	// maxOffset bounds all file offsets: 48 bits is what a replace op can hold.
	maxOffset = 1 << 48
)

// NumMergeOpsOffset is where the header holds NumMergeOps, as a u64.
const NumMergeOpsOffset = 26

// Header is the header of a file. The fields from SequenceCount on are those of
// version 3 and zero in earlier ones.
type Header struct {
	Major, Minor uint16
	// HeaderSize, FooterSize and OpSize are the sizes of the structures in bytes.
	HeaderSize, FooterSize, OpSize uint16
	BlockSize                      uint32 // bytes
	ClusterOps                     uint32 // slots of an op table; 0 without clusters
	NumMergeOps                    uint64 // ops merged into the base already, in merge order
	BufferSize                     uint32 // bytes of scratch; 0 in version 1 whatever is stored
	SequenceCount                  uint64 // numbers in the sequence area
	ResumePointCount               uint32 // resume points written, as counted by the writer: may exceed the slots
	ResumePointMax                 uint32 // resume point slots
	OpCount                        uint64 // ops in the op table
	OpCountMax                     uint64 // slots in the op table
	Compression                    Compression
	MaxCompressionSize             uint32 // largest uncompressed size of one op in bytes
}

// readHeader reads and checks the header of a file of the given size. stored is
// the header as it lies in the file.
func readHeader(r io.ReaderAt, size int64) (h Header, stored []byte, err error) {
	b := make([]byte, headerSizeV3)
	stored = b[:min(size, headerSizeV3)]
	if err := readAt(r, stored, 0); err != nil {
		return h, nil, err
	}
	if size < headerSizeV1 {
		return h, nil, badFormat(0, "%d bytes are too few for a header", size)
	}
	le := binary.LittleEndian
	if m := le.Uint64(b); m != magic {
		return h, nil, badFormat(0, "magic is %#x, not %#x", m, uint64(magic))
	}
	h = Header{
		Major: le.Uint16(b[8:]), Minor: le.Uint16(b[10:]),
		HeaderSize: le.Uint16(b[12:]), FooterSize: le.Uint16(b[14:]), OpSize: le.Uint16(b[16:]),
		BlockSize: le.Uint32(b[18:]), ClusterOps: le.Uint32(b[22:]), NumMergeOps: le.Uint64(b[26:]),
	}
	if err := h.checkCommon(size); err != nil {
		return h, nil, err
	}
	if h.Major >= 2 {
		h.BufferSize = le.Uint32(b[34:])
	}
	if h.BufferSize != 0 {
		if h.BufferSize < minScratch {
			return h, nil, badFormat(34, "scratch of %d bytes is smaller than %d", h.BufferSize, minScratch)
		}
		if end := h.scratchEnd(); end > size {
			return h, nil, badFormat(34, "scratch ends at byte %d, past the end of the file at %d", end, size)
		}
	}
	if h.Major == 3 {
		algorithm := le.Uint32(b[70:])
		if algorithm >= uint32(len(compressions)) {
			return h, nil, badFormat(70, "compression %d is not known", algorithm)
		}
		h.SequenceCount = le.Uint64(b[38:])
		h.ResumePointCount = le.Uint32(b[46:])
		h.ResumePointMax = le.Uint32(b[50:])
		h.OpCount = le.Uint64(b[54:])
		h.OpCountMax = le.Uint64(b[62:])
		h.Compression = Compression(algorithm)
		h.MaxCompressionSize = le.Uint32(b[74:])
		if err := h.checkV3(size); err != nil {
			return h, nil, err
		}
	}
	return h, b[:h.HeaderSize], nil
}

// checkCommon checks the fields that all versions have.
func (h Header) checkCommon(size int64) error {
	if h.Major < 1 || h.Major > 3 {
		return badFormat(8, "version %d.%d is not 1, 2 or 3", h.Major, h.Minor)
	}
	if h.Minor != 0 {
		return badFormat(10, "version %d.%d is not known: minor versions are 0", h.Major, h.Minor)
	}
	sizeOK, footer, op := false, uint16(footerSize), uint16(opSizeV2)
	switch h.Major {
	case 1:
		sizeOK = h.HeaderSize == headerSizeV1 || h.HeaderSize == headerSizeV2
	case 2:
		sizeOK = h.HeaderSize == headerSizeV2
	case 3:
		sizeOK, footer, op = h.HeaderSize == headerSizeV3, 0, opSizeV3
	}
	switch {
	case !sizeOK:
		return badFormat(12, "header size %d is not one of version %d", h.HeaderSize, h.Major)
	case int64(h.HeaderSize) > size:
		return badFormat(12, "header of %d bytes in a file of %d", h.HeaderSize, size)
	case h.FooterSize != footer:
		return badFormat(14, "footer size is %d, not %d", h.FooterSize, footer)
	case h.OpSize != op:
		return badFormat(16, "op size is %d, not %d", h.OpSize, op)
	case h.BlockSize != BlockSize:
		return badFormat(18, "block size is %d, not %d", h.BlockSize, BlockSize)
	case h.ClusterOps == 1:
		return badFormat(22, "clusters of 1 op have no room for an op")
	case h.Major == 3 && h.ClusterOps != 0:
		return badFormat(22, "clusters of %d ops in version 3, which has none", h.ClusterOps)
	}
	return nil
}

// checkV3 checks the areas of version 3. Slots past the end of the file are
// fine as long as they are unused: Android's writer leaves them so. The counts
// are believed no further than this; see File.scan.
func (h Header) checkV3(size int64) error {
	if s := h.MaxCompressionSize; bits.OnesCount32(s) != 1 || s < BlockSize || s > BlockSize<<maxFactor {
		return badFormat(74, "largest op of %d bytes is not 4096 to 262144 and a power of two", s)
	}
	if h.SequenceCount > uint64(size-h.sequenceOffset())/sequenceNumber {
		return badFormat(38, "%d sequence numbers do not fit a file of %d bytes", h.SequenceCount, size)
	}
	if n := int64(min(h.ResumePointCount, h.ResumePointMax)); n > 0 && h.resumeOffset()+n*resumePointSize > size {
		return badFormat(46, "%d resume points do not fit a file of %d bytes", n, size)
	}
	if h.OpCountMax > maxOffset/opSizeV3 || h.dataOffset() > maxOffset {
		return badFormat(62, "an op table of %d slots is too large", h.OpCountMax)
	}
	if h.OpCount > h.OpCountMax {
		return badFormat(54, "%d ops in a table of %d slots", h.OpCount, h.OpCountMax)
	}
	if end := h.opsOffset() + int64(h.OpCount)*opSizeV3; h.OpCount > 0 && end > size {
		return badFormat(54, "%d ops end at byte %d, past the end of the file at %d", h.OpCount, end, size)
	}
	return nil
}

// encode returns the header as it is stored.
func (h Header) encode() []byte {
	b := make([]byte, headerSizeV3)
	le := binary.LittleEndian
	le.PutUint64(b, magic)
	le.PutUint16(b[8:], h.Major)
	le.PutUint16(b[10:], h.Minor)
	le.PutUint16(b[12:], h.HeaderSize)
	le.PutUint16(b[14:], h.FooterSize)
	le.PutUint16(b[16:], h.OpSize)
	le.PutUint32(b[18:], h.BlockSize)
	le.PutUint32(b[22:], h.ClusterOps)
	le.PutUint64(b[26:], h.NumMergeOps)
	le.PutUint32(b[34:], h.BufferSize)
	le.PutUint64(b[38:], h.SequenceCount)
	le.PutUint32(b[46:], h.ResumePointCount)
	le.PutUint32(b[50:], h.ResumePointMax)
	le.PutUint64(b[54:], h.OpCount)
	le.PutUint64(b[62:], h.OpCountMax)
	le.PutUint32(b[70:], uint32(h.Compression))
	le.PutUint32(b[74:], h.MaxCompressionSize)
	return b[:h.HeaderSize]
}

// scratchEnd is where the scratch ends: the first op of versions 1 and 2, the
// sequence area of version 3.
func (h Header) scratchEnd() int64 { return int64(h.HeaderSize) + int64(h.BufferSize) }

// The areas of version 3, as file offsets. sequenceOffset is right for any
// header; each of the others needs the check of the one before it.
func (h Header) sequenceOffset() int64 { return h.scratchEnd() }

func (h Header) resumeOffset() int64 {
	return h.sequenceOffset() + int64(h.SequenceCount)*sequenceNumber
}

func (h Header) opsOffset() int64 {
	return h.resumeOffset() + int64(h.ResumePointMax)*resumePointSize
}

func (h Header) dataOffset() int64 { return h.opsOffset() + int64(h.OpCountMax)*opSizeV3 }
