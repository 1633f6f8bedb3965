package writelog

import (
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"slices"
	"sync"

	"github.com/snapmerge/snapmerge/pkg/blockio"
)

// Log is an open write log. Offsets and lengths are in bytes and multiples of
// 512. Its methods may be called concurrently.
type Log struct {
	f   blockio.File
	hdr fileHeader

	// flushing is held over a flush; it is taken before mu.
	flushing sync.Mutex

	mu       sync.RWMutex
	index    extents
	segs     []segment // by number; the last one is appended to
	freed    []Freed
	pos      int64  // file offset of the next record in the last segment
	seq      uint64 // last record written
	dataSeq  uint64 // last record that is not a mark
	flushed  uint64 // highest record known to be durable
	epoch    uint32
	live     uint64 // sectors of data in the index
	sealed   bool
	poisoned error // why nothing may be written any more
}

// segment is what has to be known to free one.
type segment struct {
	first  uint64 // number of its first record
	refs   int    // extents that point into it
	killed uint64 // the newest record that made one of its extents obsolete
	gone   bool   // freed
}

// Freed is a run of segments whose space was given back. The volume's record
// keeps them: the log alone could not tell them from damage.
type Freed struct {
	Segment  int    `json:"segment"` // first
	Count    int    `json:"count"`
	FirstSeq uint64 `json:"firstSeq"` // of the first record that was in them
	NextSeq  uint64 `json:"nextSeq"`  // of the first record behind them
}

// Info is what the volume's record says of a log.
type Info struct {
	// Layer is the layer id.
	Layer uint64
	// Volume is the hash of the volume's id.
	Volume [16]byte
	// Freed lists segments that are legitimately empty.
	Freed []Freed
	// Sealed says that nothing is written any more, and Last is the number of
	// the last record, up to which all must be there.
	Sealed bool
	Last   uint64
}

// Create makes the log's file with its first segment reserved, durable but for
// its name. A segment length of 0 is DefaultSegment.
func Create(fsys blockio.FS, name string, layer uint64, volume [16]byte, segmentBytes int64) error {
	if segmentBytes == 0 {
		segmentBytes = DefaultSegment
	}
	f, err := fsys.Open(name, blockio.Create|blockio.Excl)
	if err != nil {
		return err
	}
	defer f.Close()
	h := fileHeader{segment: segmentBytes, layer: layer, volume: volume}
	err = f.Allocate(0, headerBytes+segmentBytes)
	if err == nil {
		_, err = f.WriteAt(h.encode(), 0)
	}
	if err == nil {
		err = f.Flush()
	}
	if err != nil {
		return errors.Join(err, fsys.Remove(name))
	}
	return nil
}

// Open reads a log, cuts off a torn tail and, unless it is sealed, is ready to
// append in a new epoch. Damage gives ErrDamaged and changes nothing. The log
// takes over f, which it does not close on error.
func Open(f blockio.File, info Info) (*Log, error) {
	head := make([]byte, headerBytes)
	if n, err := f.ReadAt(head, 0); err != nil && err != io.EOF {
		return nil, err
	} else if n < len(head) {
		head = head[:n]
	}
	l := &Log{f: f, freed: slices.Clone(info.Freed), sealed: info.Sealed}
	if err := l.hdr.decode(head); err != nil {
		return nil, fmt.Errorf("%w: %s: %v", ErrDamaged, f.Name(), err)
	}
	if l.hdr.layer != info.Layer || l.hdr.volume != info.Volume {
		return nil, fmt.Errorf("%w: %s belongs to another volume or layer", ErrDamaged, f.Name())
	}
	if err := l.scan(info.Last); err != nil {
		return nil, err
	}
	return l, nil
}

func (l *Log) segStart(i int) int64 { return headerBytes + int64(i)*l.hdr.segment }

// Close closes the file without flushing it.
func (l *Log) Close() error { return l.f.Close() }

// Lock takes the flock of the log's file.
func (l *Log) Lock() error { return l.f.Lock() }

// Write appends p as the newest content of its range. When it returns, the data
// is with the kernel.
func (l *Log) Write(p []byte, off int64) error {
	for len(p) > 0 {
		n := min(len(p), MaxRecord, l.maxPayload())
		if err := l.append(typeData, p[:n], uint64(off)/sector, uint64(n)/sector); err != nil {
			return err
		}
		p, off = p[n:], off+int64(n)
	}
	return nil
}

// maxPayload is what fits in a segment beside the header and a mark.
func (l *Log) maxPayload() int { return int(l.hdr.segment-recordHeader-markBytes) / sector * sector }

// markBytes is room that every segment keeps for a mark, so that there can be a
// proof of the flush of its last record, too.
const markBytes = recordHeader

// Zero makes the range read as zeros.
func (l *Log) Zero(off, n int64) error {
	return l.append(typeZero, nil, uint64(off)/sector, uint64(n)/sector)
}

func (l *Log) append(kind uint8, p []byte, start, n uint64) error {
	r := record{kind: kind, payload: uint32(len(p)), payloadCRC: crc32.Checksum(p, castagnoli), start: start, n: n, layer: l.hdr.layer}
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.appendLocked(r, p)
}

// appendLocked writes one record; mu must be held. Records are written one
// after the other, so that an acknowledged one never follows a missing one.
func (l *Log) appendLocked(r record, p []byte) error {
	switch {
	case l.poisoned != nil:
		return l.poisoned
	case l.sealed:
		return errors.New("write to a sealed log")
	}
	need := r.size()
	if kind := r.kind; kind != typeMark {
		need += markBytes
	}
	if err := l.room(need); err != nil {
		return err
	}
	r.seq, r.flushed, r.epoch = l.seq+1, l.flushed, l.epoch
	var h [recordHeader]byte
	r.encode(&h)
	// The header comes last, so that a record without its data is no record.
	if len(p) > 0 {
		if _, err := l.f.WriteAt(p, l.pos+recordHeader); err != nil {
			return err
		}
	}
	if _, err := l.f.WriteAt(h[:], l.pos); err != nil {
		return err
	}
	l.apply(&r, l.pos)
	l.pos += r.size()
	return nil
}

// apply notes a record that lies at pos. mu must be held.
func (l *Log) apply(r *record, pos int64) {
	l.seq, l.epoch = r.seq, r.epoch
	if r.kind == typeMark {
		return
	}
	l.dataSeq = r.seq
	e := extent{start: r.start, n: r.n, off: -1, seg: int((pos - headerBytes) / l.hdr.segment)}
	if r.kind == typeData {
		e.off = pos + recordHeader
	}
	l.index.insert(e, func(seg int, refs, sectors int) {
		s := &l.segs[seg]
		s.refs += refs
		if refs < 0 {
			s.killed = r.seq
		}
		l.live += uint64(sectors)
	})
}

// room makes sure that size bytes fit at pos, reserving the next segment if
// need be. mu must be held.
func (l *Log) room(size int64) error {
	if l.fits(size) {
		return nil
	}
	next := len(l.segs)
	if err := l.f.Allocate(l.segStart(next), l.hdr.segment); err != nil {
		return err
	}
	l.segs = append(l.segs, segment{first: l.seq + 1})
	l.pos = l.segStart(next)
	return nil
}

// fits tells whether the last segment has room. mu must be held.
func (l *Log) fits(size int64) bool {
	k := len(l.segs) - 1
	return k >= 0 && !l.segs[k].gone && l.pos+size <= l.segStart(k+1)
}

// Flush makes every record written before the call durable.
func (l *Log) Flush() error {
	l.flushing.Lock()
	defer l.flushing.Unlock()
	l.mu.RLock()
	seq, done, poisoned := l.seq, l.dataSeq <= l.flushed, l.poisoned
	l.mu.RUnlock()
	if poisoned != nil {
		return poisoned
	}
	if done {
		return nil
	}
	err := l.f.Flush()
	l.mu.Lock()
	defer l.mu.Unlock()
	if err != nil {
		// After a failed flush the kernel may hold pages as clean that never
		// reached the disk: no later success could be believed.
		l.poisoned = fmt.Errorf("write log: flush failed earlier: %w", err)
		return err
	}
	l.flushed = max(l.flushed, seq)
	if mark := (record{kind: typeMark, layer: l.hdr.layer}); !l.sealed && l.fits(mark.size()) {
		// The flush has succeeded; a mark that cannot be written is only a
		// proof less.
		_ = l.appendLocked(mark, nil)
	}
	return nil
}

// Seal flushes the log and ends it: nothing can be written any more. It returns
// the number of the last record, for the volume's record.
func (l *Log) Seal() (uint64, error) {
	if err := l.Flush(); err != nil {
		return 0, err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.dataSeq > l.flushed {
		return 0, errors.New("write log was written to while it was sealed")
	}
	l.sealed = true
	return l.flushed, nil
}

// Unseal takes back a Seal that was not recorded.
func (l *Log) Unseal() {
	l.mu.Lock()
	l.sealed = false
	l.mu.Unlock()
}

// LiveBytes is how much data the log serves, in bytes.
func (l *Log) LiveBytes() int64 {
	l.mu.RLock()
	defer l.mu.RUnlock()
	return int64(l.live) * sector
}

// Bytes is the room the log takes on disk, in bytes.
func (l *Log) Bytes() int64 {
	l.mu.RLock()
	defer l.mu.RUnlock()
	n := int64(headerBytes)
	for i := range l.segs {
		if !l.segs[i].gone {
			n += l.hdr.segment
		}
	}
	return n
}

// Empty tells whether the log holds nothing.
func (l *Log) Empty() bool {
	l.mu.RLock()
	defer l.mu.RUnlock()
	return l.index.tree.Len() == 0
}
