package cow

import (
	"encoding/binary"
	"fmt"
	"math/bits"
)

// resumePoints is the number of resume point slots, as Android writes it.
const resumePoints = 4

// formatV3 writes version 3. There is no footer, so the header is written last:
// a file whose writing was cut off before the first label has none.
type formatV3 struct {
	sink      Sink
	h         Header
	ops, data *appender
	op        [opSizeV3]byte
	dataAt    int64
	points    []ResumePoint
}

func newFormatV3(s Sink, h Header) *formatV3 {
	return &formatV3{sink: s, h: h, ops: newAppender(s), data: newAppender(s), dataAt: h.dataOffset()}
}

func (f *formatV3) start(sequence []uint32) error {
	if err := writeStart(f.sink, f.h, make([]byte, headerSizeV3)); err != nil {
		return err
	}
	at := f.h.sequenceOffset()
	for _, block := range sequence {
		if err := f.data.put(binary.LittleEndian.AppendUint32(f.op[:0], block), at); err != nil {
			return err
		}
		at += sequenceNumber
	}
	return f.data.flush()
}

func (f *formatV3) put(r RawOp, data []byte) error {
	if f.h.OpCount == f.h.OpCountMax {
		return fmt.Errorf("the op table of the copy-on-write file is full with %d ops", f.h.OpCountMax)
	}
	if r.Type == Replace {
		r.Source = uint64(f.dataAt)
	}
	encodeV3(f.op[:], r, bits.Len(uint(r.Blocks))-1)
	if err := f.ops.put(f.op[:], f.h.opsOffset()+int64(f.h.OpCount)*opSizeV3); err != nil {
		return err
	}
	if len(data) > 0 {
		if err := f.data.put(data, f.dataAt); err != nil {
			return err
		}
	}
	f.h.OpCount++
	f.dataAt += int64(len(data))
	return nil
}

// label keeps the count of resume points equal to the entries that are there;
// readers that believe it then read no others.
func (f *formatV3) label(v uint64) error {
	for len(f.points) > 0 && f.points[len(f.points)-1].Label >= v {
		f.points = f.points[:len(f.points)-1]
	}
	f.points = append(f.points, ResumePoint{Label: v, Ops: f.h.OpCount})
	f.points = f.points[max(0, len(f.points)-resumePoints):]
	f.h.ResumePointCount = uint32(len(f.points))

	var b []byte
	for _, p := range f.points {
		b = binary.LittleEndian.AppendUint64(b, p.Label)
		b = binary.LittleEndian.AppendUint64(b, p.Ops)
	}
	if err := writeAt(f.sink, b, f.h.resumeOffset()); err != nil {
		return err
	}
	return f.finalize()
}

// finalize writes the header when all that it vouches for is durable.
func (f *formatV3) finalize() error {
	if err := f.ops.flush(); err != nil {
		return err
	}
	if err := f.data.flush(); err != nil {
		return err
	}
	if err := f.sink.Flush(); err != nil {
		return err
	}
	if err := writeAt(f.sink, f.h.encode(), 0); err != nil {
		return err
	}
	return f.sink.Flush()
}
