package merge

import (
	"errors"
	"fmt"
	"hash/crc32"
	"io"

	"github.com/snapmerge/snapmerge/pkg/blockio"
	"github.com/snapmerge/snapmerge/pkg/cow"
)

// The headers of a journal; see the package comment for the format.

func (j *Journal) readHeader() error {
	head := make([]byte, bs)
	if err := blockio.ReadFull(j.f, head, 0); err != nil {
		if errors.Is(err, io.ErrUnexpectedEOF) {
			return j.damaged(0, "shorter than its header")
		}
		return err
	}
	if rule, off := j.decodeFileHeader(head); rule != "" {
		// It may be that its replacement was interrupted.
		if again, _ := j.decodeFileHeader(head[headerCopy:]); again != "" {
			return j.damaged(off, rule)
		}
	}
	if size, want := j.f.Size(), JournalBytes(j.capacity)+j.promoted.bytes(); size < want {
		return j.damaged(size, fmt.Sprintf("file ends before its %d bytes", want))
	}
	return nil
}

// encodeFileHeader writes the file header to p.
func (j *Journal) encodeFileHeader(p []byte, promoted promotions) {
	p = p[:fileHeaderCRC+4]
	clear(p)
	copy(p, journalMagic)
	le.PutUint32(p[8:], journalVersion)
	le.PutUint32(p[12:], uint32(j.capacity))
	copy(p[16:32], j.id[:])
	le.PutUint64(p[32:], uint64(j.baseSize))
	if promoted.layer != 0 {
		le.PutUint32(p[8:], promotedVersion)
		le.PutUint64(p[40:], promoted.chunks)
		le.PutUint32(p[48:], uint32(promoted.blocks))
		le.PutUint64(p[52:], promoted.layer)
	}
	le.PutUint32(p[fileHeaderCRC:], crc32.Checksum(p[:fileHeaderCRC], castagnoli))
}

// decodeFileHeader reads the file header from p, or tells the rule that it breaks and
// where.
func (j *Journal) decodeFileHeader(p []byte) (rule string, off int64) {
	version := le.Uint32(p[8:])
	switch {
	case string(p[:8]) != journalMagic:
		return "wrong magic", 0
	case crc32.Checksum(p[:fileHeaderCRC], castagnoli) != le.Uint32(p[fileHeaderCRC:]):
		return "wrong checksum of the file header", fileHeaderCRC
	case version != journalVersion && version != promotedVersion:
		return fmt.Sprintf("format version %d, this program knows up to %d", version, promotedVersion), 8
	}
	capacity := int(le.Uint32(p[12:]))
	if capacity > maxWindowBlocks {
		return fmt.Sprintf("slots of %d blocks", capacity), 12
	}
	var promoted promotions
	if version == promotedVersion {
		promoted = promotions{chunks: le.Uint64(p[40:]), blocks: uint64(le.Uint32(p[48:])), layer: le.Uint64(p[52:])}
		if err := promoted.check(); err != nil {
			return err.Error(), 40
		}
	}
	j.capacity, j.baseSize, j.promoted = capacity, int64(le.Uint64(p[32:])), promoted
	copy(j.id[:], p[16:32])
	j.early.Store(promoted.layer)
	return "", 0
}

// putFileHeader replaces the file header. Its copy in another sector comes first, so
// that there always is a whole one.
func (j *Journal) putFileHeader(p promotions) error {
	arena, err := blockio.NewArena(bs)
	if err != nil {
		return err
	}
	defer arena.Close()
	block := arena.Bytes()[:bs]
	j.encodeFileHeader(block[headerCopy:], p)
	j.encodeFileHeader(block, j.promoted)
	for range 2 {
		if _, err := j.f.WriteAt(block, 0); err != nil {
			return err
		}
		if err := j.f.Flush(); err != nil {
			return err
		}
		j.encodeFileHeader(block, p)
	}
	return nil
}

// slotHeader is the header of a slot in memory.
type slotHeader struct {
	seq              uint64
	layer            uint64
	identity         cow.Identity
	entries          uint32
	committed, bytes uint64
	start, end       uint64
	payloadCRC       uint32
	resumes          uint32
	done             bool
}

// encode fills the header's block: the header, twice.
func (h *slotHeader) encode(block []byte) {
	clear(block)
	p := block[:headerCopy]
	copy(p, slotMagic)
	le.PutUint64(p[8:], h.seq)
	le.PutUint64(p[16:], h.layer)
	le.PutUint64(p[24:], uint64(h.identity.Length))
	le.PutUint32(p[32:], h.identity.CRC)
	le.PutUint32(p[36:], h.entries)
	le.PutUint64(p[40:], h.committed)
	le.PutUint64(p[48:], h.bytes)
	le.PutUint64(p[56:], h.start)
	le.PutUint64(p[64:], h.end)
	le.PutUint32(p[72:], h.payloadCRC)
	le.PutUint32(p[76:], h.resumes)
	if h.done {
		p[80] = 1
	}
	le.PutUint32(p[slotHeaderCRC:], crc32.Checksum(p[:slotHeaderCRC], castagnoli))
	copy(block[headerCopy:], p)
}

// decodeBlock reads a header's block. If its copies differ, which a power cut
// can bring about, the newer one that is valid counts: what it says is right, as
// nothing that depends on it was done yet.
func (h *slotHeader) decodeBlock(block []byte, capacity int) error {
	var first, second slotHeader
	err := first.decode(block[:headerCopy], capacity)
	err2 := second.decode(block[headerCopy:2*headerCopy], capacity)
	switch {
	case err != nil && err2 != nil:
		return err
	case err != nil || err2 == nil && second.seq > first.seq:
		*h = second
	default:
		*h = first
	}
	return nil
}

// decode checks and reads a slot header for a journal of that capacity.
func (h *slotHeader) decode(p []byte, capacity int) error {
	if string(p[:8]) != slotMagic {
		return errors.New("wrong magic")
	}
	if crc32.Checksum(p[:slotHeaderCRC], castagnoli) != le.Uint32(p[slotHeaderCRC:]) {
		return errors.New("wrong checksum of the header")
	}
	*h = slotHeader{
		seq: le.Uint64(p[8:]), layer: le.Uint64(p[16:]),
		identity: cow.Identity{Length: int64(le.Uint64(p[24:])), CRC: le.Uint32(p[32:])},
		entries:  le.Uint32(p[36:]), committed: le.Uint64(p[40:]), bytes: le.Uint64(p[48:]),
		start: le.Uint64(p[56:]), end: le.Uint64(p[64:]),
		payloadCRC: le.Uint32(p[72:]), resumes: le.Uint32(p[76:]), done: p[80] == 1,
	}
	switch {
	case h.end < h.start, h.end > h.start && h.start != h.committed:
		return fmt.Errorf("window %d to %d with %d ops committed", h.start, h.end, h.committed)
	case h.end-h.start > maxWindowBlocks:
		return fmt.Errorf("window of %d ops", h.end-h.start)
	case int64(h.entries) > int64(capacity), uint64(h.entries) > h.end-h.start:
		return fmt.Errorf("%d entries in a window of %d ops, slot of %d blocks", h.entries, h.end-h.start, capacity)
	}
	return nil
}
