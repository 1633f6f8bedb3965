package writelog

import (
	"bytes"
	"fmt"
	"hash/crc32"
	"io"
)

// scan walks the records in order and builds the index. Records up to last must
// be there.
func (l *Log) scan(last uint64) error {
	buf := make([]byte, l.hdr.segment)
	count := int((max(l.f.Size(), headerBytes) - headerBytes + l.hdr.segment - 1) / l.hdr.segment)
	freed := l.freed
	for i := 0; i < count; {
		if len(freed) > 0 && i >= freed[0].Segment {
			// Only whole known runs can be passed over.
			fr := freed[0]
			if fr.Segment != i || fr.Count <= 0 || fr.Count > count-i || fr.FirstSeq != l.seq+1 || fr.NextSeq <= fr.FirstSeq {
				return l.damaged(l.segStart(i), "the volume's record of freed segments does not fit")
			}
			for range fr.Count {
				// Only the first number of a run is ever asked for.
				l.segs = append(l.segs, segment{gone: true, first: fr.FirstSeq})
			}
			freed = freed[1:]
			i += fr.Count
			l.seq = fr.NextSeq - 1
			continue
		}
		p, err := l.readSegment(buf, i)
		if err != nil {
			return err
		}
		used, n := l.scanSegment(p, i)
		if n == 0 {
			break
		}
		l.pos = l.segStart(i) + used
		i++
	}
	if len(freed) > 0 {
		return l.damaged(l.segStart(freed[0].Segment), "segments are missing")
	}
	if l.seq < last {
		return l.damaged(l.pos, fmt.Sprintf("record %d is missing or bad, the volume's record says that %d were flushed", l.seq+1, last))
	}
	if err := l.checkTail(buf, count); err != nil {
		return err
	}
	for _, fr := range l.freed {
		// Space that a crash kept from being given back.
		if err := l.f.Zero(l.segStart(fr.Segment), int64(fr.Count)*l.hdr.segment); err != nil {
			return err
		}
	}
	// Everything valid counts, but how much of it is durable is not known
	// before the next flush.
	l.flushed = last
	if l.sealed {
		return nil
	}
	l.epoch++
	return l.cutTail(buf)
}

func (l *Log) damaged(off int64, rule string) error {
	return fmt.Errorf("%w: %s: byte %d: %s", ErrDamaged, l.f.Name(), off, rule)
}

// readSegment reads segment i up to the end of what was ever written to it;
// most of a segment is often space that is only reserved.
func (l *Log) readSegment(buf []byte, i int) ([]byte, error) {
	start, end := l.segStart(i), l.segStart(i)
	for end < l.segStart(i+1) {
		from, to, err := l.f.NextData(end)
		if err == io.EOF || err == nil && from >= l.segStart(i+1) {
			break
		}
		if err != nil {
			return nil, err
		}
		end = min(to, l.segStart(i+1))
	}
	n, err := l.f.ReadAt(buf[:end-start], start)
	if err != nil && err != io.EOF {
		return nil, err
	}
	return buf[:n], nil
}

// scanSegment applies the records of segment i that continue the sequence. It
// returns the bytes they take and their number.
func (l *Log) scanSegment(p []byte, i int) (used int64, n int) {
	var r record
	for used+recordHeader <= int64(len(p)) && l.valid(p[used:], &r) && r.seq == l.seq+1 && r.epoch >= l.epoch {
		if n == 0 {
			l.segs = append(l.segs, segment{first: r.seq})
		}
		l.apply(&r, l.segStart(i)+used)
		used += r.size()
		n++
	}
	return used, n
}

// valid reads the record at the start of p and checks it with its payload.
func (l *Log) valid(p []byte, r *record) bool {
	return r.decode(p, l.hdr.layer) && r.size() <= int64(len(p)) &&
		crc32.Checksum(p[recordHeader:recordHeader+r.payload], castagnoli) == r.payloadCRC
}

// tail returns the last segment that is appended to, or would be, and the
// offset in it behind the last valid record.
func (l *Log) tail() (seg int, from int64) {
	k := len(l.segs) - 1
	if k < 0 || l.segs[k].gone {
		return k + 1, 0
	}
	return k, l.pos - l.segStart(k)
}

// checkTail looks behind the valid prefix for a record that proves that the
// prefix ought to be longer.
func (l *Log) checkTail(buf []byte, count int) error {
	seg, from := l.tail()
	for ; seg < count; seg++ {
		p, err := l.readSegment(buf, seg)
		if err != nil {
			return err
		}
		var r record
		for o := from; o+recordHeader <= int64(len(p)); o += recordAlign {
			if l.valid(p[o:], &r) && r.flushed > l.seq {
				return l.damaged(l.pos, fmt.Sprintf("record %d is missing or bad, record %d says that it was flushed", l.seq+1, r.seq))
			}
		}
		from = 0
	}
	return nil
}

// cutTail zeroes what follows the last valid record, so that nothing of it can
// be taken for a record later, and flushes that. Space stays reserved.
func (l *Log) cutTail(buf []byte) error {
	seg, from := l.tail()
	cut := false
	if end := l.segStart(seg + 1); l.f.Size() > end {
		if err := l.f.Truncate(end); err != nil {
			return err
		}
		cut = true
	}
	p, err := l.readSegment(buf, seg)
	if err != nil {
		return err
	}
	if from < int64(len(p)) {
		rest := p[from:]
		n := len(bytes.TrimRight(rest, "\x00"))
		if n > 0 {
			clear(rest[:n])
			if _, err := l.f.WriteAt(rest[:n], l.segStart(seg)+from); err != nil {
				return err
			}
			cut = true
		}
	}
	if !cut {
		return nil
	}
	return l.f.Flush()
}
