package cow

import (
	"encoding/binary"
	"fmt"
)

// BlockSize is the only block size read and written, in bytes.
const BlockSize = 4096

const (
	maxBlocks       = 1 << 32 // new block numbers are 32 bits wide
	maxSource       = 1 << 48 // sources are 48 bits wide
	maxFactor       = 6       // 2^6 blocks, 256 KiB, is the largest op
	opSizeV2        = 20
	opSizeV3        = 16
	sequenceNumber  = 4  // bytes of one number in sequence data
	resumePointSize = 16 // bytes of one resume point
)

// OpType is the kind of an operation.
type OpType uint8

// The values are those of the format.
const (
	Copy     OpType = 1
	Replace  OpType = 2
	Zero     OpType = 3
	Label    OpType = 4
	Cluster  OpType = 5
	Xor      OpType = 6
	Sequence OpType = 7
	Footer   OpType = 255
)

var opNames = map[OpType]string{
	Copy: "copy", Replace: "replace", Zero: "zero", Label: "label",
	Cluster: "cluster", Xor: "xor", Sequence: "sequence", Footer: "footer",
}

// String is the name in reports.
func (t OpType) String() string {
	if name, ok := opNames[t]; ok {
		return name
	}
	return fmt.Sprintf("type %d", uint8(t))
}

// Ordered tells whether ops of this type read the source image, so that their
// place in the merge order matters.
func (t OpType) Ordered() bool { return t == Copy || t == Xor }

// writes tells whether ops of this type write blocks; the others are metadata.
func (t OpType) writes() bool { return t == Copy || t == Replace || t == Zero || t == Xor }

// Op is one entry of the merge list.
type Op struct {
	// Type is Copy, Replace, Zero or Xor.
	Type OpType
	// Compression is how the stored data is packed; None is raw. The rules for
	// data that was stored raw because packing did not help are applied already.
	Compression Compression
	// NewBlock is the first block written in the target image.
	NewBlock uint64
	// Blocks is the number of blocks written: 2^f for replace, else 1.
	Blocks int
	// Source is a block number (Copy) or a byte offset (Xor) in the source image.
	Source uint64
	// DataOffset and DataLength tell where the stored data of a Replace or Xor
	// lies in the file, in bytes.
	DataOffset int64
	DataLength int
	// Checksum is the CRC-32C of the stored data where HasChecksum is set. The
	// format has none; an index made beside the file may.
	Checksum    uint32
	HasChecksum bool
}

// SourceBlocks returns the run of blocks of the source image that the op reads:
// n is 0 for Replace and Zero, 2 for a Xor whose source is not block aligned.
func (o Op) SourceBlocks() (first uint64, n int) {
	switch o.Type {
	case Copy:
		return o.Source, 1
	case Xor:
		if o.Source%BlockSize != 0 {
			return o.Source / BlockSize, 2
		}
		return o.Source / BlockSize, 1
	}
	return 0, 0
}

// sourceEnd is the first byte past what the op reads of the source image.
func (o Op) sourceEnd() uint64 {
	switch o.Type {
	case Copy:
		return (o.Source + 1) * BlockSize
	case Xor:
		return o.Source + BlockSize
	}
	return 0
}

// RawOp is one entry of the op stream as it is stored, metadata included.
type RawOp struct {
	// Offset is the file offset of the entry itself, in bytes.
	Offset int64
	Type   OpType
	// Compression is the op's own value in versions 1 and 2, and for Replace and
	// Xor the file's in version 3.
	Compression Compression
	// NewBlock and Source are the stored values. Their meaning depends on Type.
	NewBlock uint64
	Source   uint64
	// Blocks is the number of blocks written; 0 for metadata.
	Blocks int
	// DataOffset and DataLength tell where the op's data lies in the file, in
	// bytes. Both are 0 for ops without data.
	DataOffset int64
	DataLength int
	// raw tells whether the data is stored as it is.
	raw bool
}

// op returns r as an entry of the merge list; r.Type.writes() holds.
func (r RawOp) op() Op {
	o := Op{Type: r.Type, NewBlock: r.NewBlock, Blocks: r.Blocks, DataOffset: r.DataOffset, DataLength: r.DataLength}
	if r.Type.Ordered() {
		o.Source = r.Source
	}
	if !r.raw {
		o.Compression = r.Compression
	}
	return o
}

// decodeV2 reads an op of versions 1 and 2; the caller sets Offset, Blocks,
// DataOffset and raw. DataLength is set whatever the type.
func decodeV2(b []byte) RawOp {
	return RawOp{
		Type:        OpType(b[0]),
		Compression: Compression(b[1]),
		DataLength:  int(binary.LittleEndian.Uint16(b[2:])),
		NewBlock:    binary.LittleEndian.Uint64(b[4:]),
		Source:      binary.LittleEndian.Uint64(b[12:]),
	}
}

func encodeV2(b []byte, r RawOp) {
	b[0], b[1] = byte(r.Type), byte(r.Compression)
	binary.LittleEndian.PutUint16(b[2:], uint16(r.DataLength))
	binary.LittleEndian.PutUint64(b[4:], r.NewBlock)
	binary.LittleEndian.PutUint64(b[12:], r.Source)
}

// Layout of the source word of a version 3 op.
const (
	v3FactorShift = 57
	v3TypeShift   = 60
	v3UnusedBits  = 0x1ff << 48
)

// decodeV3 reads an op of version 3. unused are the bits that must be zero.
func decodeV3(b []byte) (r RawOp, factor int, unused uint64) {
	word := binary.LittleEndian.Uint64(b[8:])
	factor = int(word >> v3FactorShift & 7)
	return RawOp{
		Type:       OpType(word >> v3TypeShift),
		DataLength: int(binary.LittleEndian.Uint32(b)),
		NewBlock:   uint64(binary.LittleEndian.Uint32(b[4:])),
		Source:     word & (maxSource - 1),
		Blocks:     1 << factor,
	}, factor, word & v3UnusedBits
}

func encodeV3(b []byte, r RawOp, factor int) {
	binary.LittleEndian.PutUint32(b, uint32(r.DataLength))
	binary.LittleEndian.PutUint32(b[4:], uint32(r.NewBlock))
	binary.LittleEndian.PutUint64(b[8:], r.Source|uint64(factor)<<v3FactorShift|uint64(r.Type)<<v3TypeShift)
}
