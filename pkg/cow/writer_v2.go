package cow

import "encoding/binary"

// maxSequenceOp is the most numbers that one sequence op holds: two blocks full.
const maxSequenceOp = 2 * BlockSize / sequenceNumber

// formatV2 writes version 2. The header is written once, at the start; what
// tells a finished file is the footer.
type formatV2 struct {
	sink Sink
	h    Header
	// ops and data are one and the same without clusters, where each op is
	// followed by its data.
	ops, data *appender
	op        [opSizeV2]byte

	opAt, dataAt int64
	slot         int64 // ops in the table so far
	clusterData  int64 // bytes of their data
	count        uint64
}

func newFormatV2(s Sink, h Header) *formatV2 {
	f := &formatV2{sink: s, h: h, ops: newAppender(s), opAt: h.scratchEnd()}
	f.data = f.ops
	if h.ClusterOps > 0 {
		f.data = newAppender(s)
	}
	f.dataAt = f.opAt + max(int64(h.ClusterOps), 1)*opSizeV2
	return f
}

func (f *formatV2) start(sequence []uint32) error {
	if err := writeStart(f.sink, f.h, f.h.encode()); err != nil {
		return err
	}
	for len(sequence) > 0 {
		n := min(len(sequence), maxSequenceOp)
		data := make([]byte, 0, n*sequenceNumber)
		for _, block := range sequence[:n] {
			data = binary.LittleEndian.AppendUint32(data, block)
		}
		if err := f.put(RawOp{Type: Sequence, DataLength: len(data)}, data); err != nil {
			return err
		}
		sequence = sequence[n:]
	}
	return nil
}

// writeStart writes the header and an empty scratch behind it. The zeros are
// written, not left out, so that an engine that merges in place has the space.
func writeStart(s Sink, h Header, header []byte) error {
	if err := writeAt(s, header, 0); err != nil {
		return err
	}
	zeros := make([]byte, min(int64(h.BufferSize), appendChunk))
	for at, end := int64(h.HeaderSize), h.scratchEnd(); at < end; at += int64(len(zeros)) {
		zeros = zeros[:min(int64(len(zeros)), end-at)]
		if err := writeAt(s, zeros, at); err != nil {
			return err
		}
	}
	return nil
}

func (f *formatV2) put(r RawOp, data []byte) error {
	if r.Type == Replace || r.Type == Sequence {
		r.Source = uint64(f.dataAt)
	}
	encodeV2(f.op[:], r)
	if err := f.ops.put(f.op[:], f.opAt); err != nil {
		return err
	}
	if len(data) > 0 {
		if err := f.data.put(data, f.dataAt); err != nil {
			return err
		}
	}
	f.advance(r)
	// The last slot is kept for the cluster op.
	if f.slot > 0 && f.slot+2 > int64(f.h.ClusterOps) {
		return f.endCluster()
	}
	return nil
}

// advance moves past an op. Without clusters, slot stays 0.
func (f *formatV2) advance(r RawOp) {
	f.count++
	f.opAt += opSizeV2
	f.dataAt += int64(r.DataLength)
	if f.h.ClusterOps == 0 {
		f.opAt += int64(r.DataLength)
		f.dataAt += opSizeV2
		return
	}
	f.slot++
	f.clusterData += int64(r.DataLength)
}

// endCluster writes a cluster op and goes on with the next table.
func (f *formatV2) endCluster() error {
	slots := int64(f.h.ClusterOps)
	r := RawOp{Type: Cluster, Source: uint64(f.clusterData + (slots-f.slot-1)*opSizeV2)}
	encodeV2(f.op[:], r)
	if err := f.ops.put(f.op[:], f.opAt); err != nil {
		return err
	}
	f.count++
	f.opAt += opSizeV2 + int64(r.Source)
	f.dataAt += slots * opSizeV2
	f.slot, f.clusterData = 0, 0
	return nil
}

func (f *formatV2) label(v uint64) error {
	if err := f.put(RawOp{Type: Label, Source: v}, nil); err != nil {
		return err
	}
	return f.flush()
}

func (f *formatV2) flush() error {
	if err := f.ops.flush(); err != nil {
		return err
	}
	if err := f.data.flush(); err != nil {
		return err
	}
	return f.sink.Flush()
}

// finalize writes the footer, behind everything else, when all that it vouches
// for is durable.
func (f *formatV2) finalize() error {
	if f.clusterData > 0 {
		if err := f.endCluster(); err != nil {
			return err
		}
	}
	if err := f.flush(); err != nil {
		return err
	}
	footer := make([]byte, footerSize)
	encodeV2(footer, RawOp{Type: Footer, DataLength: footerDataSize, NewBlock: f.count * opSizeV2, Source: f.count})
	if err := writeAt(f.sink, footer, f.opAt); err != nil {
		return err
	}
	return f.sink.Flush()
}
