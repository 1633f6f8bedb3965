package cow_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"strings"
	"testing"

	"github.com/snapmerge/snapmerge/pkg/cow"
)

// Offsets of fields, as the package comment gives them.
const (
	minorAt, headerSizeAt, clusterAt, mergedAt, bufferAt = 10, 12, 22, 26, 34

	sequenceCountAt, resumeCountAt, resumeMaxAt, opCountAt, opCountMaxAt, algorithmAt, maxOpAt = 38, 46, 50, 54, 62, 70, 74
	// Within an op of version 2.
	type2, compression2, length2, block2, source2 = 0, 1, 2, 4, 12
	// Within an op of version 3.
	length3, block3, source3 = 0, 4, 8
)

// file is a file to be spoiled.
type file struct {
	b   []byte
	ops []cow.RawOp
}

func newFile(t testing.TB, o cow.WriterOptions, script func(w *cow.Writer) error) *file {
	t.Helper()
	f := &file{b: write(t, o, script)}
	r, err := cow.Open(bytes.NewReader(f.b), int64(len(f.b)), cow.OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	err = r.Walk(func(op cow.RawOp) error {
		f.ops = append(f.ops, op)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func (f *file) u8(off int64, v byte)      { f.b[off] = v }
func (f *file) u16(off int64, v uint16)   { binary.LittleEndian.PutUint16(f.b[off:], v) }
func (f *file) u32(off int64, v uint32)   { binary.LittleEndian.PutUint32(f.b[off:], v) }
func (f *file) u64(off int64, v uint64)   { binary.LittleEndian.PutUint64(f.b[off:], v) }
func (f *file) get64(off int64) uint64    { return binary.LittleEndian.Uint64(f.b[off:]) }
func (f *file) op(i int) int64            { return f.ops[i].Offset }
func (f *file) source(i int, bits uint64) { f.u64(f.op(i)+source3, f.get64(f.op(i)+source3)|bits) }

var block = bytes.Repeat([]byte("block "), cow.BlockSize)[:cow.BlockSize]

// Files that the table spoils. Their ops, by number:
//
//	   v2            v2 without clusters  v3
//	0  copy 0 ← 5    copy 0 ← 5           copy 0 ← 5
//	1  xor 1         xor 1                xor 1
//	2  replace 2     replace 2            replace 2–5
//	3  zero 9        zero 9               replace 6
//	4  cluster       zero 10              zero 9
//	5  zero 10       label 7              zero 10
//	6  label 7       footer
//	7  cluster
//	8  footer
func baseV2(t testing.TB, o cow.WriterOptions) *file {
	return newFile(t, o, func(w *cow.Writer) error {
		return steps(w.Copy(0, 5, 1), w.Xor(1, 8*cow.BlockSize+10, block), w.Replace(2, block), w.Zero(9, 2), w.Label(7))
	})
}

func baseV3(t testing.TB, o cow.WriterOptions) *file {
	return newFile(t, o, func(w *cow.Writer) error {
		return steps(w.Copy(0, 5, 1), w.Xor(1, 8*cow.BlockSize+10, block), w.Replace(2, bytes.Repeat(block, 5)), w.Zero(9, 2), w.Label(7))
	})
}

var bases = map[string]func(t testing.TB) *file{
	"v2": func(t testing.TB) *file { return baseV2(t, cow.WriterOptions{Version: 2, ClusterOps: 5}) },
	"v2-gz": func(t testing.TB) *file {
		return baseV2(t, cow.WriterOptions{Version: 2, ClusterOps: 5, Compression: cow.Gz})
	},
	"v2-flat": func(t testing.TB) *file { return baseV2(t, cow.WriterOptions{Version: 2}) },
	// One sequence op in slot 0, so all others are one later; cluster ops differ.
	"v2-sequence": func(t testing.TB) *file {
		return baseV2(t, cow.WriterOptions{Version: 2, ClusterOps: 20, Sequence: []uint32{1, 0}})
	},
	"v3": func(t testing.TB) *file {
		return baseV3(t, cow.WriterOptions{Version: 3, MaxBlock: 16 << 10, OpCountMax: 10})
	},
	"v3-lz4": func(t testing.TB) *file {
		return baseV3(t, cow.WriterOptions{Version: 3, MaxBlock: 16 << 10, OpCountMax: 10, Compression: cow.LZ4})
	},
	"v3-sequence": func(t testing.TB) *file {
		return baseV3(t, cow.WriterOptions{Version: 3, MaxBlock: 16 << 10, OpCountMax: 10, Sequence: []uint32{1, 0}})
	},
	"v2-scratch": func(t testing.TB) *file {
		return baseV2(t, cow.WriterOptions{Version: 2, ClusterOps: 5, ScratchSize: cow.DefaultScratchSize})
	},
	"v3-scratch": func(t testing.TB) *file {
		return newFile(t, cow.WriterOptions{Version: 3, OpCountMax: 10, ScratchSize: cow.DefaultScratchSize}, func(w *cow.Writer) error {
			return steps(w.Copy(0, 1, 6), w.Zero(9, 2))
		})
	},
}

// Geometry of the 2 MiB scratch.
const (
	scratchBlocks  = 510
	scratchDataV3  = 8270
	scratchEntryV3 = 79
)

// setScratch marks the scratch of a version 3 file done and lists blocks.
func (f *file) setScratch(blocks ...uint64) {
	f.u8(78, cow.ScratchDone)
	for i, block := range blocks {
		f.u64(scratchEntryV3+16*int64(i), block)
		f.u64(scratchEntryV3+16*int64(i)+8, scratchDataV3+uint64(i)*cow.BlockSize)
	}
}

func TestBadInput(t *testing.T) {
	label := uint64(8)
	// at returns the offset that the error must name.
	for _, tt := range []struct {
		name, base, rule string
		label            *uint64
		spoil            func(f *file) (at int64)
	}{
		// Header.
		{"magic", "v3", "magic", nil, func(f *file) int64 { f.u8(0, 1); return 0 }},
		{"major", "v3", "version 4", nil, func(f *file) int64 { f.u16(8, 4); return 8 }},
		{"minor", "v3", "version 3.1", nil, func(f *file) int64 { f.u16(minorAt, 1); return minorAt }},
		{"v1 header size", "v2", "header size", nil, func(f *file) int64 { f.u16(8, 1); f.u16(headerSizeAt, 36); return headerSizeAt }},
		{"v2 header size", "v2", "header size", nil, func(f *file) int64 { f.u16(headerSizeAt, 34); return headerSizeAt }},
		{"v3 header size", "v3", "header size", nil, func(f *file) int64 { f.u16(headerSizeAt, 38); return headerSizeAt }},
		{"cut in the header", "v3", "header of 78", nil, func(f *file) int64 { f.b = f.b[:60]; return headerSizeAt }},
		{"cut in the first fields", "v3", "too few", nil, func(f *file) int64 { f.b = f.b[:20]; return 0 }},
		{"v2 footer size", "v2", "footer size", nil, func(f *file) int64 { f.u16(14, 0); return 14 }},
		{"v3 footer size", "v3", "footer size", nil, func(f *file) int64 { f.u16(14, 84); return 14 }},
		{"v2 op size", "v2", "op size", nil, func(f *file) int64 { f.u16(16, 16); return 16 }},
		{"v3 op size", "v3", "op size", nil, func(f *file) int64 { f.u16(16, 20); return 16 }},
		{"block size", "v3", "block size", nil, func(f *file) int64 { f.u32(18, 512); return 18 }},
		{"cluster of one", "v2", "clusters of 1", nil, func(f *file) int64 { f.u32(clusterAt, 1); return clusterAt }},
		{"v3 cluster", "v3", "clusters", nil, func(f *file) int64 { f.u32(clusterAt, 5); return clusterAt }},
		{"scratch of 1 MiB", "v3-scratch", "scratch of", nil, func(f *file) int64 { f.u32(bufferAt, 1<<20); return bufferAt }},
		{"scratch past the end", "v2", "past the end", nil, func(f *file) int64 { f.u32(bufferAt, 4<<20); return bufferAt }},
		{"algorithm", "v3", "compression 5", nil, func(f *file) int64 { f.u32(algorithmAt, 5); return algorithmAt }},
		{"huge algorithm", "v3", "compression 256", nil, func(f *file) int64 { f.u32(algorithmAt, 256); return algorithmAt }},
		{"no largest op", "v3", "largest op", nil, func(f *file) int64 { f.u32(maxOpAt, 0); return maxOpAt }},
		{"odd largest op", "v3", "largest op", nil, func(f *file) int64 { f.u32(maxOpAt, 12288); return maxOpAt }},
		{"largest op too large", "v3", "largest op", nil, func(f *file) int64 { f.u32(maxOpAt, 512<<10); return maxOpAt }},
		{"sequence count", "v3", "sequence numbers", nil, func(f *file) int64 { f.u64(sequenceCountAt, 1<<30); return sequenceCountAt }},
		{"sequence count one too large", "v3", "sequence numbers", nil, func(f *file) int64 {
			f.u64(sequenceCountAt, uint64(len(f.b)-78)/4+1)
			return sequenceCountAt
		}},
		{"sequence count that overflows", "v3", "sequence numbers", nil, func(f *file) int64 { f.u64(sequenceCountAt, 1<<62); return sequenceCountAt }},
		{"resume points", "v3", "resume points", nil, func(f *file) int64 {
			f.u32(resumeCountAt, 1<<31)
			f.u32(resumeMaxAt, 1<<31)
			return resumeCountAt
		}},
		{"op slots", "v3", "op table", nil, func(f *file) int64 { f.u64(opCountMaxAt, 1<<45); return opCountMaxAt }},
		{"op slots that overflow", "v3", "op table", nil, func(f *file) int64 { f.u64(opCountMaxAt, 1<<63); return opCountMaxAt }},
		{"op count above slots", "v3", "slots", nil, func(f *file) int64 { f.u64(opCountAt, 11); return opCountAt }},
		{"op count past the end", "v3", "past the end", nil, func(f *file) int64 {
			f.u64(opCountAt, 1<<20)
			f.u64(opCountMaxAt, 1<<20)
			return opCountAt
		}},
		{"more merged than there is", "v3", "merged", nil, func(f *file) int64 { f.u64(mergedAt, 7); return mergedAt }},
		{"huge merged", "v2", "merged", nil, func(f *file) int64 { f.u64(mergedAt, 1<<63); return mergedAt }},

		// Structure of version 2.
		{"footer cut", "v2", "without a footer", nil, func(f *file) int64 { f.b = f.b[:f.op(7)+19]; return f.op(7) }},
		{"footer data cut", "v2", "past the end", nil, func(f *file) int64 { f.b = f.b[:len(f.b)-1]; return f.op(7) }},
		{"footer op count", "v2", "counts 9 ops", nil, func(f *file) int64 { f.u64(f.op(7)+source2, 9); return f.op(7) }},
		{"footer op bytes", "v2", "bytes of ops", nil, func(f *file) int64 { f.u64(f.op(7)+block2, 161); return f.op(7) }},
		{"footer length", "v2", "footer has", nil, func(f *file) int64 { f.u16(f.op(7)+length2, 63); return f.op(7) }},
		{"footer compression", "v2", "footer has", nil, func(f *file) int64 { f.u8(f.op(7)+compression2, 1); return f.op(7) }},
		{"no such label", "v2", "no label 8", &label, func(f *file) int64 { return f.op(7) }},
		{"no such label, cut", "v2", "before label 8", &label, func(f *file) int64 { f.b = f.b[:f.op(7)]; return f.op(7) }},
		{"no such resume point", "v3", "label 8", &label, func(f *file) int64 { return 78 }},
		{"type", "v2", "op type 9 is not known", nil, func(f *file) int64 { f.u8(f.op(3), 9); return f.op(3) }},
		{"type zero", "v2-flat", "op type 0", nil, func(f *file) int64 { f.u8(f.op(3), 0); return f.op(3) }},
		{"cluster leads astray", "v2", "cluster op leads", nil, func(f *file) int64 { f.u64(f.op(4)+source2, 20); return f.op(4) }},
		{"cluster leads far away", "v2", "cluster op leads", nil, func(f *file) int64 { f.u64(f.op(4)+source2, 1<<63); return f.op(4) }},
		{"cluster with data", "v2", "cluster op has", nil, func(f *file) int64 { f.u16(f.op(4)+length2, 1); return f.op(4) }},
		{"no cluster op", "v2", "does not end", nil, func(f *file) int64 { f.u8(f.op(4), byte(cow.Zero)); return f.op(4) }},
		{"cluster op without clusters", "v2-flat", "without clusters", nil, func(f *file) int64 { f.u8(f.op(3), byte(cow.Cluster)); return f.op(3) }},
		{"sequence without clusters", "v2-flat", "without clusters", nil, func(f *file) int64 { f.u8(f.op(2), byte(cow.Sequence)); return f.op(2) }},
		{"late sequence", "v2", "sequence op after", nil, func(f *file) int64 { f.u8(f.op(2), byte(cow.Sequence)); return f.op(2) }},
		{"odd sequence", "v2-sequence", "whole number", nil, func(f *file) int64 { f.u16(f.op(0)+length2, 6); return f.op(0) }},
		{"sequence elsewhere", "v2-sequence", "not after", nil, func(f *file) int64 { f.u64(f.op(0)+source2, 38); return f.op(0) }},
		{"sequence past the end", "v2-sequence", "past the end", nil, func(f *file) int64 {
			f.u16(f.op(0)+length2, 65532)
			return f.op(0)
		}},
		{"copy with data", "v2", "bytes of data", nil, func(f *file) int64 { f.u16(f.op(0)+length2, 5); return f.op(0) }},
		{"zero with data", "v2", "bytes of data", nil, func(f *file) int64 { f.u16(f.op(3)+length2, 4096); return f.op(3) }},
		{"label with data", "v2", "bytes of data", nil, func(f *file) int64 { f.u16(f.op(6)+length2, 1); return f.op(6) }},
		{"unknown algorithm", "v2", "compression 5", nil, func(f *file) int64 { f.u8(f.op(1)+compression2, 5); return f.op(1) }},
		{"second algorithm", "v2-gz", "in a file packed with gz", nil, func(f *file) int64 { f.u8(f.op(2)+compression2, 4); return f.op(2) }},
		{"raw of another length", "v2-gz", "raw data", nil, func(f *file) int64 { f.u8(f.op(2)+compression2, 0); return f.op(2) }},
		{"no data", "v2-gz", "no data", nil, func(f *file) int64 { f.u16(f.op(1)+length2, 0); return f.op(1) }},
		{"data elsewhere", "v2", "not after", nil, func(f *file) int64 { f.u64(f.op(2)+source2, 38); return f.op(2) }},
		{"data past the end", "v2-flat", "past the end", nil, func(f *file) int64 { f.b = f.b[:f.op(2)+100]; return f.op(2) }},
		{"block number of 33 bits", "v2", "32 bits", nil, func(f *file) int64 { f.u64(f.op(0)+block2, 1<<32); return f.op(0) }},
		{"copy source of 49 bits", "v2", "48 bits", nil, func(f *file) int64 { f.u64(f.op(0)+source2, 1<<48); return f.op(0) }},
		{"xor source of 64 bits", "v2", "48 bits", nil, func(f *file) int64 { f.u64(f.op(1)+source2, 1<<63); return f.op(1) }},

		// Ops of version 3.
		{"v3 label", "v3", "op label is not known", nil, func(f *file) int64 { f.u64(f.op(4)+source3, 4<<60); return f.op(4) }},
		{"v3 type zero", "v3", "op type 0", nil, func(f *file) int64 { f.u64(f.op(4)+source3, 0); return f.op(4) }},
		{"v3 type 15", "v3", "op type 15", nil, func(f *file) int64 { f.source(4, 15<<60); return f.op(4) }},
		{"unused bit 48", "v3", "unused", nil, func(f *file) int64 { f.source(4, 1<<48); return f.op(4) }},
		{"unused bit 56", "v3", "unused", nil, func(f *file) int64 { f.source(0, 1<<56); return f.op(0) }},
		{"copy of two blocks", "v3", "factor", nil, func(f *file) int64 { f.source(0, 1<<57); return f.op(0) }},
		{"zero of two blocks", "v3", "factor", nil, func(f *file) int64 { f.source(4, 1<<57); return f.op(4) }},
		{"xor of two blocks", "v3-lz4", "factor", nil, func(f *file) int64 { f.source(1, 1<<57); return f.op(1) }},
		{"factor 7", "v3-lz4", "maximum", nil, func(f *file) int64 { f.source(2, 7<<57); return f.op(2) }},
		{"larger than the largest", "v3-lz4", "maximum", nil, func(f *file) int64 { f.u32(maxOpAt, 8192); return f.op(2) }},
		{"blocks past 32 bits", "v3", "32 bits", nil, func(f *file) int64 { f.u32(f.op(2)+block3, 1<<32-3); return f.op(2) }},
		{"v3 copy with data", "v3", "bytes of data", nil, func(f *file) int64 { f.u32(f.op(0)+length3, 1); return f.op(0) }},
		{"v3 zero with data", "v3", "bytes of data", nil, func(f *file) int64 { f.u32(f.op(5)+length3, 1<<31); return f.op(5) }},
		{"v3 raw of another length", "v3", "raw data", nil, func(f *file) int64 { f.u32(f.op(1)+length3, 4095); return f.op(1) }},
		{"v3 longer than raw", "v3-lz4", "more than", nil, func(f *file) int64 { f.u32(f.op(3)+length3, 4097); return f.op(3) }},
		{"v3 no data", "v3-lz4", "no data", nil, func(f *file) int64 { f.u32(f.op(1)+length3, 0); return f.op(1) }},
		{"v3 data elsewhere", "v3", "not after", nil, func(f *file) int64 { f.source(2, 1); return f.op(2) }},
		{"v3 data past the end", "v3", "past the end", nil, func(f *file) int64 { f.b = f.b[:len(f.b)-1]; return f.op(3) }},

		// The ops together.
		{"block twice among the ordered", "v2", "more than one op", nil, func(f *file) int64 { f.u64(f.op(1)+block2, 0); return f.op(1) }},
		{"block twice among the rest", "v2", "more than one op", nil, func(f *file) int64 { f.u64(f.op(5)+block2, 2); return f.op(5) }},
		{"block twice, next to each other", "v2", "more than one op", nil, func(f *file) int64 { f.u64(f.op(5)+block2, 9); return f.op(5) }},
		{"block twice, ordered and not", "v2", "more than one op", nil, func(f *file) int64 { f.u64(f.op(3)+block2, 1); return f.op(3) }},
		{"v3 block twice", "v3", "more than one op", nil, func(f *file) int64 { f.u32(f.op(5)+block3, 9); return f.op(5) }},
		{"v3 block twice, apart", "v3", "more than one op", nil, func(f *file) int64 { f.u32(f.op(5)+block3, 0); return f.op(5) }},
		{"block within a larger op", "v3", "more than one op", nil, func(f *file) int64 { f.u32(f.op(4)+block3, 5); return f.op(4) }},
		{"larger op over a block", "v3", "more than one op", nil, func(f *file) int64 { f.u32(f.op(2)+block3, 7); return f.op(4) }},
		{"block twice in and out of the sequence", "v3-sequence", "more than one op", nil, func(f *file) int64 {
			f.u32(f.op(4)+block3, 1)
			return f.op(4)
		}},
		{"block twice out of the sequence", "v3-sequence", "more than one op", nil, func(f *file) int64 { f.u32(f.op(5)+block3, 9); return f.op(5) }},
		{"sequence names a block twice", "v3-sequence", "twice", nil, func(f *file) int64 { f.u32(78+4, 1); return 78 + 4 }},
		{"sequence names no op", "v3-sequence", "no op writes", nil, func(f *file) int64 { f.u32(78+4, 77); return 78 + 4 }},
		{"sequence names no op but part of one", "v3-sequence", "no op writes", nil, func(f *file) int64 { f.u32(78+4, 3); return 78 + 4 }},
		{"sequence names no op, another twice", "v3-sequence", "more than one op", nil, func(f *file) int64 {
			f.u32(78+4, 77)
			f.u32(f.op(5)+block3, 1)
			f.u32(f.op(0)+block3, 1)
			return f.op(1)
		}},
		{"v2 sequence names a block twice", "v2-sequence", "twice", nil, func(f *file) int64 {
			f.u32(f.ops[0].DataOffset+4, 1)
			return f.ops[0].DataOffset + 4
		}},
		{"v2 sequence names no op", "v2-sequence", "no op writes", nil, func(f *file) int64 { f.u32(f.ops[0].DataOffset, 77); return f.ops[0].DataOffset }},
		{"ordered after others", "v3", "comes after", nil, func(f *file) int64 { f.u64(f.op(4)+source3, 1<<60|50); return f.op(4) }},
		{"ordered outside of the sequence after others", "v3-sequence", "comes after", nil, func(f *file) int64 {
			f.u64(f.op(5)+source3, 1<<60|50)
			return f.op(5)
		}},
		{"copy of an overwritten block", "v3-scratch", "reads block 1", nil, func(f *file) int64 { f.u64(f.op(3)+source3, 1<<60|1); return f.op(3) }},
		{"xor of an overwritten block", "v2", "reads block 0", nil, func(f *file) int64 { f.u64(f.op(1)+source2, 0); return f.op(1) }},
		{"xor over the end of a block", "v2", "reads block 21", nil, func(f *file) int64 {
			f.u64(f.op(0)+block2, 21)
			f.u64(f.op(1)+source2, 20*cow.BlockSize+1)
			return f.op(1)
		}},
		{"overwritten in the order of the sequence", "v3-sequence", "reads block 1", nil, func(f *file) int64 {
			f.u64(f.op(0)+source3, 1<<60|1) // fine in file order, but 1 is merged first
			return f.op(0)
		}},

		// Scratch.
		{"scratch state", "v3-scratch", "scratch state 3", nil, func(f *file) int64 { f.u8(78, 3); return 78 }},
		{"v2 scratch state", "v2-scratch", "scratch state 255", nil, func(f *file) int64 { f.u8(38, 255); return 38 }},
		{"scratch without an end", "v3-scratch", "no end mark", nil, func(f *file) int64 {
			blocks := make([]uint64, scratchBlocks+1)
			f.setScratch(blocks...)
			f.u64(scratchEntryV3+16*scratchBlocks+8, scratchDataV3)
			return scratchEntryV3 + 16*(scratchBlocks+1)
		}},
		{"scratch data in the metadata", "v3-scratch", "scratch entry of block 0", nil, func(f *file) int64 {
			f.setScratch(0)
			f.u64(scratchEntryV3+8, 78)
			return scratchEntryV3
		}},
		{"scratch data behind the scratch", "v3-scratch", "scratch entry of block 1", nil, func(f *file) int64 {
			f.setScratch(0, 1)
			f.u64(scratchEntryV3+16+8, scratchDataV3+scratchBlocks*cow.BlockSize)
			return scratchEntryV3 + 16
		}},
		{"scratch data at no offset", "v3-scratch", "scratch entry", nil, func(f *file) int64 {
			f.setScratch(1)
			f.u64(scratchEntryV3+8, 0)
			return scratchEntryV3
		}},
		{"scratch data at a huge offset", "v3-scratch", "scratch entry", nil, func(f *file) int64 {
			f.setScratch(1)
			f.u64(scratchEntryV3+8, 1<<63)
			return scratchEntryV3
		}},
		{"scratch data between blocks", "v3-scratch", "scratch entry", nil, func(f *file) int64 {
			f.setScratch(0)
			f.u64(scratchEntryV3+8, scratchDataV3+1)
			return scratchEntryV3
		}},
		{"scratch block twice", "v3-scratch", "two scratch entries", nil, func(f *file) int64 { f.setScratch(0, 1, 0); return scratchEntryV3 }},
		{"scratch data twice", "v3-scratch", "two scratch entries", nil, func(f *file) int64 {
			f.setScratch(0, 1)
			f.u64(scratchEntryV3+16+8, scratchDataV3)
			return scratchEntryV3
		}},
		{"scratch of other ops", "v3-scratch", "not those of the ops", nil, func(f *file) int64 { f.setScratch(1, 2); return scratchEntryV3 }},
		{"scratch of no op", "v3-scratch", "not those of the ops", nil, func(f *file) int64 { f.setScratch(0, 77); return scratchEntryV3 }},
		{"scratch of unordered ops", "v3-scratch", "not those of the ops", nil, func(f *file) int64 {
			f.u64(mergedAt, 5)
			f.setScratch(5, 9)
			return scratchEntryV3
		}},
		{"scratch of an older window", "v3-scratch", "not those of the ops", nil, func(f *file) int64 {
			f.u64(mergedAt, 3)
			f.setScratch(0, 1)
			return scratchEntryV3
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f := bases[tt.base](t)
			if _, err := load(f.b, nil); err != nil {
				t.Fatalf("refused before it was spoiled: %v", err)
			}
			at := tt.spoil(f)
			_, err := load(f.b, tt.label)
			var format *cow.FormatError
			if !errors.As(err, &format) {
				t.Fatalf("error %v, want a format error", err)
			}
			if format.Offset != at || !strings.Contains(format.Rule, tt.rule) {
				t.Errorf("%q, want byte %d and %q", err, at, tt.rule)
			}
		})
	}
}
