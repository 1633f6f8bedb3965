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

	// Locks, in the order in which they are taken. flushing is held over a flush.
	// appending is held while a record is written: one at a time, so that an
	// acknowledged one never follows a missing one. mu is only held to look and to
	// note, so that nobody who reads waits for a disk.
	flushing  sync.Mutex
	appending sync.Mutex
	mu        sync.RWMutex

	// Guarded by appending.
	pos   int64 // file offset of the next record in the last segment
	epoch uint32
	buf   []byte // a record that is written as one

	// Guarded by mu; seq and the number of segs change with appending held, too.
	index    extents
	segs     []segment // by number; the last one is appended to
	freed    []Freed
	seq      uint64 // last record written
	dataSeq  uint64 // last record that is not a mark
	flushed  uint64 // highest record known to be durable
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

// maxCopied is the most payload that is copied behind its header, in bytes, so that both
// are written at once.
const maxCopied = 16 << 10

// markBytes is room that every segment keeps for a mark, so that there can be a
// proof of the flush of its last record, too.
const markBytes = recordHeader

// Zero makes the range read as zeros.
func (l *Log) Zero(off, n int64) error {
	return l.append(typeZero, nil, uint64(off)/sector, uint64(n)/sector)
}

func (l *Log) append(kind uint8, p []byte, start, n uint64) error {
	r := record{kind: kind, payload: uint32(len(p)), payloadCRC: crc32.Checksum(p, castagnoli), start: start, n: n, layer: l.hdr.layer}
	l.appending.Lock()
	defer l.appending.Unlock()
	return l.appendLocked(r, p)
}

// appendLocked writes one record; appending must be held, mu must not.
func (l *Log) appendLocked(r record, p []byte) error {
	need := r.size()
	if r.kind != typeMark {
		need += markBytes
	}
	fits, err := l.prepare(&r, need)
	if err == nil && !fits {
		err = l.addSegment()
	}
	if err == nil {
		err = l.writeRecord(&r, p)
	}
	if err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.apply(&r, l.pos)
	l.pos += r.size()
	return nil
}

// prepare fills in what the record says of the log and tells whether need bytes fit in
// the last segment. appending must be held.
func (l *Log) prepare(r *record, need int64) (fits bool, err error) {
	l.mu.RLock()
	defer l.mu.RUnlock()
	switch {
	case l.poisoned != nil:
		return false, l.poisoned
	case l.sealed:
		return false, errors.New("write to a sealed log")
	}
	r.seq, r.flushed, r.epoch = l.seq+1, l.flushed, l.epoch
	return l.fits(need), nil
}

// writeRecord writes the record at pos; appending must be held. A part of it that is
// left of a write that was cut short has a wrong checksum.
func (l *Log) writeRecord(r *record, p []byte) error {
	var h [recordHeader]byte
	r.encode(&h)
	if len(p) <= maxCopied {
		l.buf = append(append(l.buf[:0], h[:]...), p...)
		_, err := l.f.WriteAt(l.buf, l.pos)
		return err
	}
	if _, err := l.f.WriteAt(p, l.pos+recordHeader); err != nil {
		return err
	}
	_, err := l.f.WriteAt(h[:], l.pos)
	return err
}

// apply notes a record that lies at pos. appending and mu must be held.
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

// addSegment reserves the next segment, where the next record goes. appending must be
// held.
func (l *Log) addSegment() error {
	next := len(l.segs)
	if err := blockio.Extend(l.f, l.segStart(next), l.hdr.segment); err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.segs = append(l.segs, segment{first: l.seq + 1})
	l.pos = l.segStart(next)
	return nil
}

// fits tells whether the last segment has room. appending and mu must be held.
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
	l.appending.Lock()
	defer l.appending.Unlock()
	mark := record{kind: typeMark, layer: l.hdr.layer}
	l.mu.Lock()
	if err != nil {
		// After a failed flush the kernel may hold pages as clean that never
		// reached the disk: no later success could be believed.
		l.poisoned = fmt.Errorf("write log: flush failed earlier: %w", err)
		l.mu.Unlock()
		return err
	}
	l.flushed = max(l.flushed, seq)
	room := !l.sealed && l.fits(mark.size())
	l.mu.Unlock()
	if room {
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
	l.appending.Lock()
	defer l.appending.Unlock()
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
