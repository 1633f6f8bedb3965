package cow

import "encoding/binary"

// runV3 passes over a file of version 3. The header is checked, so that all of
// sequence area and op table lie inside the file.
func (s *scan) runV3() error {
	h := &s.header
	count, err := s.opCount()
	if err != nil {
		return err
	}
	if err := s.readSequence(h.sequenceOffset(), int64(h.SequenceCount)*sequenceNumber); err != nil {
		return err
	}
	buf := make([]byte, readChunk)
	off, data := h.opsOffset(), h.dataOffset()
	for left := int64(count) * opSizeV3; left > 0; {
		b := buf[:min(left, readChunk)]
		if err := readAt(s.r, b, off); err != nil {
			return err
		}
		s.sum(b)
		for ; len(b) > 0; b = b[opSizeV3:] {
			r, err := s.parseV3(b, off, data)
			if err != nil {
				return err
			}
			if err := s.pass(r); err != nil {
				return err
			}
			data += int64(r.DataLength)
			off += opSizeV3
			left -= opSizeV3
		}
	}
	return nil
}

// parseV3 reads and checks the op at off. data is where its data must lie.
func (s *scan) parseV3(b []byte, off, data int64) (RawOp, error) {
	r, factor, unused := decodeV3(b)
	r.Offset = off
	if !r.Type.writes() {
		return r, badFormat(off, "op %s is not known in version 3", r.Type)
	}
	if unused != 0 {
		return r, badFormat(off, "%s op of block %d has unused bits set", r.Type, r.NewBlock)
	}
	if err := s.checkBlocks(r); err != nil {
		return r, err
	}
	if r.Type == Copy || r.Type == Zero {
		if factor != 0 {
			return r, badFormat(off, "%s op of block %d has compression factor %d", r.Type, r.NewBlock, factor)
		}
		if r.DataLength != 0 {
			return r, badFormat(off, "%s op of block %d has %d bytes of data", r.Type, r.NewBlock, r.DataLength)
		}
		return r, nil
	}
	r.Compression = s.header.Compression
	r.DataOffset = data
	switch {
	case r.Type == Xor && factor != 0:
		return r, badFormat(off, "xor op of block %d has compression factor %d", r.NewBlock, factor)
	case factor > maxFactor || r.Blocks*BlockSize > int(s.header.MaxCompressionSize):
		return r, badFormat(off, "replace op of block %d writes %d bytes, more than the file's maximum of %d",
			r.NewBlock, r.Blocks*BlockSize, s.header.MaxCompressionSize)
	case r.Type == Replace && r.Source != uint64(data):
		return r, badFormat(off, "data of the replace op of block %d is at byte %d, not after that of the ops before it at %d",
			r.NewBlock, r.Source, data)
	}
	var err error
	r.raw, err = s.checkData(r)
	return r, err
}

// opCount is the number of ops to read: all, or those of the label.
func (f *File) opCount() (uint64, error) {
	if f.label == nil {
		return f.header.OpCount, nil
	}
	points, err := f.resumePoints()
	if err != nil {
		return 0, err
	}
	for _, p := range points {
		if p.Label == *f.label {
			return p.Ops, nil
		}
	}
	return 0, badFormat(f.header.resumeOffset(), "no resume point has label %d", *f.label)
}

// resumePoints reads the resume points that can be believed. The header's count
// of them is not: Android's writer counts every label ever written, so it may
// exceed the slots, and what lies in the last slots may be leftovers. A point
// that does not come after the one before it in label and ops, or that covers
// more ops than there are, ends the list.
func (f *File) resumePoints() ([]ResumePoint, error) {
	h := &f.header
	n := int64(min(h.ResumePointCount, h.ResumePointMax))
	var points []ResumePoint
	b := make([]byte, resumePointSize)
	for i := range n {
		if err := readAt(f.r, b, h.resumeOffset()+i*resumePointSize); err != nil {
			return nil, err
		}
		p := ResumePoint{Label: binary.LittleEndian.Uint64(b), Ops: binary.LittleEndian.Uint64(b[8:])}
		if p.Ops > h.OpCount {
			break
		}
		if len(points) > 0 {
			if last := points[len(points)-1]; p.Label <= last.Label || p.Ops < last.Ops {
				break
			}
		}
		points = append(points, p)
	}
	return points, nil
}
