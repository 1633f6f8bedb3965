package merge

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"path"
	"sync/atomic"

	"github.com/google/uuid"

	"github.com/snapmerge/snapmerge/pkg/blockio"
	"github.com/snapmerge/snapmerge/pkg/cow"
)

const (
	journalMagic = "SNPMJRNL"
	slotMagic    = "SNPMSLOT"
	// journalVersion is that of a journal without promotions, promotedVersion of one
	// that may have some.
	journalVersion  = 1
	promotedVersion = 2

	fileHeaderCRC = 60
	slotHeaderCRC = 124
	headerCopy    = 512 // from the header of a slot to its copy: another sector
	entryBytes    = 8

	// DefaultWindowBlocks is the capacity of a slot: 16 MiB of data.
	DefaultWindowBlocks = 4096
	// maxWindowBlocks is what a reader accepts: 1 GiB of data in a slot.
	maxWindowBlocks = 1 << 18
)

var (
	castagnoli = crc32.MakeTable(crc32.Castagnoli)
	le         = binary.LittleEndian
)

// Journal is a volume's merge progress and scratch space; see the package
// comment for its format. It is a state of one volume, whatever number of COWs
// are merged into it one after the other.
type Journal struct {
	f        blockio.File
	id       uuid.UUID
	capacity int
	baseSize int64

	cur slotHeader // the newest valid header

	// The layer that is being merged.
	layer    uint64
	identity cow.Identity
	total    uint64 // ops

	scratchBytes, nflushes uint64

	// One goroutine at a time promotes, beside the one that merges.
	promoted       promotions
	promotedBlocks []uint64      // by sector of the promotions
	early          atomic.Uint64 // promoted.layer, for anybody
}

// JournalSpec describes a new journal.
type JournalSpec struct {
	// ID marks the base of an unfinished merge (see ClaimBase).
	ID uuid.UUID
	// WindowBlocks is the capacity of a slot in blocks. 0 is enough for COWs
	// without ordered ops.
	WindowBlocks int
	// BaseSize is the size of the base in bytes.
	BaseSize int64
	// Layer and Identity are the layer that will be merged first and its COW.
	Layer    uint64
	Identity cow.Identity
	// Seed, if not nil, is the progress that the COW itself records.
	Seed *Seed
}

// Seed is progress found in a half-merged COW file.
type Seed struct {
	Committed, Bytes uint64 // ops, and the bytes they wrote
	// Window holds the final content of the blocks that the next ops write, if
	// the COW's scratch space is valid: the ops [Committed, Committed+len).
	Window []SeedBlock
}

// SeedBlock is one block of a window in a COW's scratch space.
type SeedBlock struct {
	Pos   uint64 // op, in merge order
	Block uint64
	Data  []byte
}

func slotBytes(capacity int) int64 {
	return bs + roundUp(int64(capacity)*entryBytes) + int64(capacity)*bs
}

func roundUp(n int64) int64 { return (n + bs - 1) / bs * bs }

// JournalBytes is the length of a journal file in bytes.
func JournalBytes(windowBlocks int) int64 { return bs + 2*slotBytes(windowBlocks) }

// CreateJournal makes a journal under that name, whole or not at all: a file of
// that name always has a valid state, which is durable when CreateJournal
// returns. All space it will ever need is reserved.
func CreateJournal(fsys blockio.FS, dir, name string, spec JournalSpec) error {
	capacity := spec.WindowBlocks
	if spec.Seed != nil {
		capacity = max(capacity, len(spec.Seed.Window))
	}
	if capacity > maxWindowBlocks {
		return fmt.Errorf("window of %d blocks, at most %d are possible", capacity, maxWindowBlocks)
	}
	path, tmp := dir+"/"+name, dir+"/"+name+".new"
	if err := fsys.RemoveAll(tmp); err != nil {
		return err
	}
	f, err := fsys.Open(tmp, blockio.Create|blockio.Excl)
	if err != nil {
		return err
	}
	defer f.Close()
	err = writeNewJournal(f, capacity, spec)
	if err == nil {
		err = fsys.Rename(tmp, path)
	}
	if err != nil {
		return errors.Join(err, fsys.RemoveAll(tmp))
	}
	return fsys.SyncDir(dir)
}

func writeNewJournal(f blockio.File, capacity int, spec JournalSpec) error {
	if err := f.Allocate(0, JournalBytes(capacity)); err != nil {
		return err
	}
	head := make([]byte, bs)
	j := &Journal{f: f, id: spec.ID, capacity: capacity, baseSize: spec.BaseSize}
	j.encodeFileHeader(head, promotions{})
	if _, err := f.WriteAt(head, 0); err != nil {
		return err
	}
	for seq := range uint64(2) {
		h := slotHeader{seq: seq, layer: spec.Layer, identity: spec.Identity}
		if s := spec.Seed; s != nil {
			h.committed, h.bytes = s.Committed, s.Bytes
			h.start, h.end = s.Committed, s.Committed+uint64(len(s.Window))
			h.entries = uint32(len(s.Window))
			var err error
			if h.payloadCRC, err = j.writeSeed(seq, s); err != nil {
				return err
			}
		}
		h.encode(head)
		if _, err := f.WriteAt(head, j.slotOffset(seq)); err != nil {
			return err
		}
	}
	return f.Flush()
}

func (j *Journal) writeSeed(seq uint64, s *Seed) (uint32, error) {
	entries := make([]byte, len(s.Window)*entryBytes)
	for i, b := range s.Window {
		le.PutUint32(entries[i*entryBytes:], uint32(b.Pos-s.Committed))
		le.PutUint32(entries[i*entryBytes+4:], uint32(b.Block))
	}
	crc := crc32.Checksum(entries, castagnoli)
	if _, err := j.f.WriteAt(entries, j.slotOffset(seq)+bs); err != nil {
		return 0, err
	}
	for i, b := range s.Window {
		crc = crc32.Update(crc, castagnoli, b.Data)
		if _, err := j.f.WriteAt(b.Data, j.dataOffset(seq)+int64(i)*bs); err != nil {
			return 0, err
		}
	}
	return crc, nil
}

func (j *Journal) slotOffset(seq uint64) int64 { return bs + int64(seq%2)*slotBytes(j.capacity) }

func (j *Journal) dataOffset(seq uint64) int64 {
	return j.slotOffset(seq) + bs + roundUp(int64(j.capacity)*entryBytes)
}

// OpenJournal opens and locks a journal. A file that is not one, or one with no
// valid slot, gives ErrDamaged; one that somebody else has open, an error that
// wraps blockio.ErrLocked.
func OpenJournal(fsys blockio.FS, name string) (*Journal, error) {
	f, err := fsys.Open(name, blockio.Direct)
	if err != nil {
		return nil, err
	}
	j := &Journal{f: f}
	if err := j.open(fsys); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return j, nil
}

func (j *Journal) open(fsys blockio.FS) error {
	if err := j.f.Lock(); err != nil {
		return fmt.Errorf("%s: %w", j.f.Name(), err)
	}
	// A process that was killed leaves writes and names that are visible but not
	// durable. What is acted upon below has to be.
	if err := errors.Join(fsys.SyncDir(path.Dir(j.f.Name())), j.f.Flush()); err != nil {
		return err
	}
	if err := j.readHeader(); err != nil {
		return err
	}
	return j.readSlots()
}

func (j *Journal) damaged(off int64, rule string) error {
	return fmt.Errorf("%w: %s: byte %d: %s", ErrDamaged, j.f.Name(), off, rule)
}

// readSlots finds the newest valid slot.
//
// A header lies in one sector and its copy in another, so no power cut leaves
// none of them whole. If both are damaged nobody can tell whether they were the
// newest. The window that a whole header speaks of can be incomplete: then its
// flush never returned, nothing of the window is in the base, and the slot before
// holds. (Damage to a window that was complete looks the same.)
func (j *Journal) readSlots() error {
	var why [2]error
	valid := false
	for s := range uint64(2) {
		var h slotHeader
		why[s] = j.readSlot(s, &h)
		if errors.Is(why[s], errWindowSum) {
			continue
		}
		if why[s] != nil {
			return why[s]
		}
		if !valid || h.seq > j.cur.seq {
			j.cur = h
		}
		valid = true
	}
	if !valid {
		return j.damaged(j.slotOffset(0), fmt.Sprintf("no valid slot: %v; byte %d: %v", why[0], j.slotOffset(1), why[1]))
	}
	return nil
}

// errWindowSum is what a slot may have without being damaged.
var errWindowSum = errors.New("wrong checksum of the window")

func (j *Journal) readSlot(s uint64, h *slotHeader) error {
	p := make([]byte, bs)
	if err := blockio.ReadFull(j.f, p, j.slotOffset(s)); err != nil {
		return err
	}
	err := h.decodeBlock(p, j.capacity)
	if err == nil && h.seq%2 != s {
		err = fmt.Errorf("sequence number %d in slot %d", h.seq, s)
	}
	if err != nil {
		return j.damaged(j.slotOffset(s), err.Error())
	}
	crc, err := j.payloadCRC(h)
	if err != nil {
		return err
	}
	if crc != h.payloadCRC {
		return errWindowSum
	}
	return nil
}

func (j *Journal) payloadCRC(h *slotHeader) (uint32, error) {
	crc := uint32(0)
	buf := make([]byte, min(int64(h.entries)*bs, requestBytes))
	sum := func(off, n int64) error {
		for n > 0 {
			p := buf[:min(n, int64(len(buf)))]
			if err := blockio.ReadFull(j.f, p, off); err != nil {
				return err
			}
			crc = crc32.Update(crc, castagnoli, p)
			off, n = off+int64(len(p)), n-int64(len(p))
		}
		return nil
	}
	if err := sum(j.slotOffset(h.seq)+bs, int64(h.entries)*entryBytes); err != nil {
		return 0, err
	}
	return crc, sum(j.dataOffset(h.seq), int64(h.entries)*bs)
}

// ID is the journal's identity, which a base of an unfinished merge carries.
func (j *Journal) ID() uuid.UUID { return j.id }

// BaseSize is the size of the base when the journal was made, in bytes.
func (j *Journal) BaseSize() int64 { return j.baseSize }

// WindowBlocks is the capacity of a slot.
func (j *Journal) WindowBlocks() int { return j.capacity }

// InProgress tells whether a merge was begun and has not been completed, so that
// there is a base that only this journal can make whole.
func (j *Journal) InProgress() bool {
	early := j.early.Load()
	return j.begun() || early > j.cur.layer || early == j.cur.layer && early != 0 && !j.cur.done
}

// begun tells whether the headers speak of a merge that is not completed. Something
// may have been promoted before.
func (j *Journal) begun() bool { return j.cur.seq > 1 && !j.cur.done }

// Close closes the file.
func (j *Journal) Close() error { return j.f.Close() }

// attach makes layer the one whose progress the journal keeps and returns what
// it says of it. total is the number of ops of the layer's COW.
func (j *Journal) attach(layer uint64, id cow.Identity, total uint64) (recovered, error) {
	h := &j.cur
	switch {
	case layer < h.layer:
		return recovered{}, fmt.Errorf("%w: %s has progress of layer %d, not %d", ErrMismatch, j.f.Name(), h.layer, layer)
	case layer == h.layer && id != h.identity:
		return recovered{}, fmt.Errorf("%w: %s is of a COW of %d bytes (checksum %08x), this one has %d bytes (checksum %08x)",
			ErrMismatch, j.f.Name(), h.identity.Length, h.identity.CRC, id.Length, id.CRC)
	case layer > h.layer && j.begun():
		return recovered{}, fmt.Errorf("%w: %s has an unfinished merge of layer %d", ErrMismatch, j.f.Name(), h.layer)
	}
	fresh := layer > h.layer
	j.layer, j.identity, j.total = layer, id, total
	promoted, blocks, err := j.readPromotions()
	if err != nil {
		return recovered{}, err
	}
	if fresh {
		// The first header of this layer starts it; until then nothing of it is
		// in the base.
		*h = slotHeader{seq: h.seq, layer: h.layer, identity: h.identity, done: true}
	}
	rec := recovered{promoted: promoted, promotedBytes: blocks * bs}
	if fresh {
		return rec, nil
	}
	rec.committed, rec.bytes, rec.start, rec.end, rec.logged = h.committed, h.bytes, h.start, h.end, map[uint64][]byte{}
	if (j.InProgress() || h.committed > 0 || h.end > h.start) && !h.done {
		h.resumes++
	}
	rec.resumes = uint64(h.resumes)
	if h.entries == 0 {
		return rec, nil
	}
	entries := make([]byte, int(h.entries)*entryBytes)
	if err := blockio.ReadFull(j.f, entries, j.slotOffset(h.seq)+bs); err != nil {
		return rec, err
	}
	data := make([]byte, int(h.entries)*bs)
	if err := blockio.ReadFull(j.f, data, j.dataOffset(h.seq)); err != nil {
		return rec, err
	}
	for i := range int(h.entries) {
		rec.logged[uint64(le.Uint32(entries[i*entryBytes+4:]))] = data[i*bs : (i+1)*bs]
	}
	return rec, nil
}

// The journal as progress of a merge.

func (j *Journal) windowBlocks() int { return j.capacity }
func (j *Journal) scratch() bool     { return j.capacity > 0 }
func (j *Journal) logsWhole() bool   { return false }
func (j *Journal) close()            {} // its owner closes it

// stage writes entries and logged content of w into the slot that the current
// header does not use.
func (j *Journal) stage(w *window, q blockio.Queue) error {
	n := w.loggedOps()
	if n == 0 {
		w.entries, w.payloadCRC = 0, 0
		return nil
	}
	seq := j.cur.seq + 1
	arena, err := blockio.NewArena(int(roundUp(int64(n) * entryBytes)))
	if err != nil {
		return err
	}
	defer arena.Close()
	entries := arena.Bytes()[:roundUp(int64(n)*entryBytes)]
	batch := []blockio.Request{{Buf: entries, Off: j.slotOffset(seq) + bs}}
	off := j.dataOffset(seq)
	crc := uint32(0)
	k := 0
	for i := range w.ops {
		if !w.ops[i].logged {
			continue
		}
		le.PutUint32(entries[k*entryBytes:], uint32(w.ops[i].pos-w.start))
		le.PutUint32(entries[k*entryBytes+4:], uint32(w.ops[i].NewBlock))
		k++
		last := &batch[len(batch)-1]
		if len(batch) > 1 && i > 0 && w.ops[i-1].logged && len(last.Buf) < requestBytes {
			last.Buf = last.Buf[:len(last.Buf)+bs]
		} else {
			batch = append(batch, blockio.Request{Buf: w.data[i*bs : (i+1)*bs], Off: off})
		}
		off += bs
	}
	crc = crc32.Checksum(entries[:n*entryBytes], castagnoli)
	for _, r := range batch[1:] {
		crc = crc32.Update(crc, castagnoli, r.Buf)
	}
	if err := q.Write(j.f, batch); err != nil {
		return fmt.Errorf("write to the journal: %w", err)
	}
	j.scratchBytes += uint64(n) * bs
	w.entries, w.payloadCRC = uint32(n), crc
	return nil
}

func (j *Journal) begin(w *window, _ blockio.Queue) error {
	h := j.cur
	h.seq++
	h.layer, h.identity = j.layer, j.identity
	h.bytes += uint64(h.end-h.start) * bs // the window before is committed now
	h.committed, h.start, h.end = w.start, w.start, w.end
	h.entries, h.payloadCRC, h.done = w.entries, w.payloadCRC, false
	return j.put(h)
}

func (j *Journal) commit(upTo, bytes uint64) error {
	h := j.cur
	h.layer, h.identity = j.layer, j.identity
	h.committed, h.bytes, h.done = upTo, bytes, upTo == j.total
	h.start, h.end, h.entries, h.payloadCRC = 0, 0, 0, 0
	h.seq++
	return j.put(h)
}

// note puts a header that says nothing new but that the merge is in progress.
// Should a power cut take it away, the header before still tells the truth.
func (j *Journal) note() error {
	if j.begun() {
		return nil
	}
	h := j.cur
	h.seq++
	h.layer, h.identity, h.done = j.layer, j.identity, false
	if err := j.write(&h); err != nil {
		return err
	}
	j.cur = h
	return nil
}

// write writes a header into its slot.
func (j *Journal) write(h *slotHeader) error {
	arena, err := blockio.NewArena(bs)
	if err != nil {
		return err
	}
	defer arena.Close()
	p := arena.Bytes()[:bs]
	h.encode(p)
	_, err = j.f.WriteAt(p, j.slotOffset(h.seq))
	return err
}

// put writes a header, makes it durable, and only then adopts it.
func (j *Journal) put(h slotHeader) error {
	if err := j.write(&h); err != nil {
		return err
	}
	j.nflushes++
	if err := j.f.Flush(); err != nil {
		return err
	}
	j.cur = h
	return nil
}

func (j *Journal) counts() (scratch, flushes uint64) {
	scratch, flushes = j.scratchBytes, j.nflushes
	j.scratchBytes, j.nflushes = 0, 0
	return scratch, flushes
}
