package cow

import "encoding/binary"

// opStream walks the op tables of a file of version 1 or 2.
type opStream struct {
	*scan
	// op is the file offset of the next op, data that of the next data.
	op, data int64
	// slot counts the ops since the start of the table, clusterData the bytes of
	// their data.
	slot        int64
	clusterData int64

	ops         uint64 // ops passed, metadata included
	sawBlock    bool   // an op that writes blocks was passed
	compression Compression

	// ahead holds what was read from aheadAt on.
	ahead   []byte
	aheadAt int64
	buf     []byte
}

// runV2 passes over a file of version 1 or 2.
func (s *scan) runV2() error {
	st := opStream{scan: s, op: s.header.scratchEnd(), buf: make([]byte, readChunk)}
	st.data = st.op + max(int64(s.header.ClusterOps), 1)*opSizeV2
	for {
		b, err := st.next()
		if err != nil {
			return err
		}
		r := decodeV2(b)
		r.Offset = st.op
		if r.Type == Footer {
			if err := st.checkFooter(r); err != nil {
				return err
			}
			s.sum(b)
			return s.pass(r)
		}
		if err := st.check(&r); err != nil {
			return err
		}
		s.sum(b)
		if r.Type == Sequence {
			if err := s.readSequence(r.DataOffset, int64(r.DataLength)); err != nil {
				return err
			}
		}
		if err := s.pass(r); err != nil {
			return err
		}
		st.ops++
		if r.Type == Label && s.label != nil && r.Source == *s.label {
			return nil
		}
		if err := st.advance(r); err != nil {
			return err
		}
	}
}

// next returns the stored op at st.op; valid until the next call.
func (st *opStream) next() ([]byte, error) {
	if st.op+opSizeV2 > st.size {
		if st.label != nil {
			return nil, badFormat(st.op, "the file ends before label %d", *st.label)
		}
		return nil, badFormat(st.op, "the file ends without a footer: its writing was cut off")
	}
	if st.op < st.aheadAt || st.op+opSizeV2 > st.aheadAt+int64(len(st.ahead)) {
		// The rest of the op table, or the op alone where there are no tables.
		n := max(int64(st.header.ClusterOps)-st.slot, 1) * opSizeV2
		st.ahead, st.aheadAt = st.buf[:min(n, st.size-st.op, readChunk)], st.op
		if err := readAt(st.r, st.ahead, st.op); err != nil {
			st.ahead = nil
			return nil, err
		}
	}
	i := st.op - st.aheadAt
	return st.ahead[i : i+opSizeV2], nil
}

// check checks an op that is not a footer and completes it.
func (st *opStream) check(r *RawOp) error {
	if !r.Compression.known() {
		return badFormat(r.Offset, "%s of the op is not known", r.Compression)
	}
	// Android's reader unpacks all ops of a file with one algorithm and refuses
	// a file that names two. An op that says "none" in a packed file is beyond
	// it unless its length gives it away; here it is what it says.
	if r.Compression != None && st.compression != None && r.Compression != st.compression {
		return badFormat(r.Offset, "%s op is packed with %s in a file packed with %s", r.Type, r.Compression, st.compression)
	}
	if r.Compression != None {
		st.compression = r.Compression
	}
	switch r.Type {
	case Copy, Zero, Label:
		if r.DataLength != 0 {
			return badFormat(r.Offset, "%s op has %d bytes of data", r.Type, r.DataLength)
		}
	case Cluster:
		return st.checkCluster(*r)
	case Replace, Xor, Sequence:
		if r.Type != Xor && r.Source != uint64(st.data) {
			return badFormat(r.Offset, "data of the %s op is at byte %d, not after that of the ops before it at %d", r.Type, r.Source, st.data)
		}
		r.DataOffset = st.data
	default:
		return badFormat(r.Offset, "op %s is not known", r.Type)
	}
	if r.Type == Sequence {
		return st.checkSequence(*r)
	}
	if r.Type == Label {
		return nil
	}
	st.sawBlock = true
	r.Blocks = 1
	if err := st.checkBlocks(*r); err != nil {
		return err
	}
	if r.Type == Copy || r.Type == Zero {
		return nil
	}
	var err error
	r.raw, err = st.checkData(*r)
	return err
}

// checkSequence checks a sequence op. Without clusters the next op would lie on
// the sequence data, so no such file can be right.
func (st *opStream) checkSequence(r RawOp) error {
	switch {
	case st.header.ClusterOps == 0:
		return badFormat(r.Offset, "sequence op in a file without clusters")
	case st.sawBlock:
		return badFormat(r.Offset, "sequence op after ops that write blocks")
	case r.DataLength%sequenceNumber != 0:
		return badFormat(r.Offset, "sequence op of %d bytes, not a whole number of block numbers", r.DataLength)
	}
	return st.checkInside(r)
}

// checkCluster checks the op that ends an op table: it must lead to the first
// byte after the data of the table's ops.
func (st *opStream) checkCluster(r RawOp) error {
	slots := int64(st.header.ClusterOps)
	if slots == 0 {
		return badFormat(r.Offset, "cluster op in a file without clusters")
	}
	if r.DataLength != 0 {
		return badFormat(r.Offset, "cluster op has %d bytes of data", r.DataLength)
	}
	want := (slots-st.slot-1)*opSizeV2 + st.clusterData
	if r.Source != uint64(want) {
		return badFormat(r.Offset, "cluster op leads %d bytes on; the next op table is %d bytes on", r.Source, want)
	}
	return nil
}

// advance moves past r.
func (st *opStream) advance(r RawOp) error {
	slots := int64(st.header.ClusterOps)
	st.op += opSizeV2
	st.data += int64(r.DataLength)
	switch {
	case slots == 0:
		st.op += int64(r.DataLength)
		st.data += opSizeV2
	case r.Type == Cluster:
		st.op += int64(r.Source)
		st.data += slots * opSizeV2
		st.slot, st.clusterData = 0, 0
	default:
		st.slot++
		st.clusterData += int64(r.DataLength)
		if st.slot == slots {
			return badFormat(r.Offset, "op table of %d slots does not end with a cluster op", slots)
		}
	}
	return nil
}

// checkFooter checks the footer r, whose two numbers lie in the fields for new
// block and source.
func (st *opStream) checkFooter(r RawOp) error {
	switch {
	case st.label != nil:
		return badFormat(r.Offset, "the file is finished and has no label %d", *st.label)
	case r.Compression != None || r.DataLength != footerDataSize:
		return badFormat(r.Offset, "footer has %s and %d bytes of data, not none and %d", r.Compression, r.DataLength, footerDataSize)
	case r.Offset+footerSize > st.size:
		return badFormat(r.Offset, "footer ends at byte %d, past the end of the file at %d", r.Offset+footerSize, st.size)
	case r.Source != st.ops:
		return badFormat(r.Offset, "footer counts %d ops, the file has %d", r.Source, st.ops)
	case r.NewBlock != st.ops*opSizeV2:
		return badFormat(r.Offset, "footer counts %d bytes of ops, the file has %d", r.NewBlock, st.ops*opSizeV2)
	}
	return nil
}

// sequenceValue reads the first of the stored numbers.
func sequenceValue(numbers []byte) uint32 { return binary.LittleEndian.Uint32(numbers) }
