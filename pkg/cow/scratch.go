package cow

import (
	"cmp"
	"encoding/binary"
	"slices"
)

// States of the scratch. Only ScratchDone says anything about its content.
const (
	ScratchIdle       = 0 // nothing was put there
	ScratchInProgress = 1 // a window is being filled, or its ops are merged
	ScratchDone       = 2 // holds a whole window that may be half written to the base
)

// ScratchEntrySize is the length in bytes of one entry of the scratch: a block
// and the file offset of its data, 8 bytes each (spec cow-format 3).
const ScratchEntrySize = 16

// ScratchEntry is one block in the scratch.
type ScratchEntry struct {
	NewBlock uint64
	// Offset is the file offset of the block's final data.
	Offset int64
}

// Scratch is what the read-ahead of a merge left in the file. Its parts are not
// aligned to anything.
type Scratch struct {
	State uint8
	// Entries is empty unless State is ScratchDone. Their order says nothing:
	// one generation of Android's engine stored runs backwards.
	Entries []ScratchEntry

	start, size int64
}

// StateOffset is the file offset of the state byte.
func (s *Scratch) StateOffset() int64 { return s.start }

// MetadataOffset is the file offset of the first entry.
func (s *Scratch) MetadataOffset() int64 { return s.start + 1 }

// DataOffset is the file offset of the first block of data.
func (s *Scratch) DataOffset() int64 { return s.start + s.metadataSize() }

// Capacity is the number of blocks that the data part has room for.
func (s *Scratch) Capacity() int { return int((s.size - s.metadataSize()) / BlockSize) }

func (s *Scratch) metadataSize() int64 { return s.size * ScratchEntrySize / BlockSize }

// Scratch reads the scratch as it is now; nil if the file has none. Entries are
// checked by themselves; whether they fit the merge is for Window to say.
func (f *File) Scratch() (*Scratch, error) {
	h := &f.header
	if h.BufferSize == 0 {
		return nil, nil
	}
	s := &Scratch{start: int64(h.HeaderSize), size: int64(h.BufferSize)}
	state := make([]byte, 1)
	if err := readAt(f.r, state, s.StateOffset()); err != nil {
		return nil, err
	}
	s.State = state[0]
	if s.State > ScratchDone {
		return nil, badFormat(s.StateOffset(), "scratch state %d is not 0, 1 or 2", s.State)
	}
	if s.State != ScratchDone {
		return s, nil
	}
	if err := f.readEntries(s); err != nil {
		return nil, err
	}
	if err := s.checkDistinct(); err != nil {
		return nil, err
	}
	return s, nil
}

// readEntries reads the list up to its end mark, which must come within
// Capacity+1 entries: more would run into the data.
func (f *File) readEntries(s *Scratch) error {
	const chunk = 512 // entries
	buf := make([]byte, 0, chunk*ScratchEntrySize)
	off := s.MetadataOffset()
	for left := s.Capacity() + 1; left > 0; {
		buf = buf[:min(left, chunk)*ScratchEntrySize]
		if err := readAt(f.r, buf, off); err != nil {
			return err
		}
		for b := buf; len(b) > 0; b = b[ScratchEntrySize:] {
			e := ScratchEntry{
				NewBlock: binary.LittleEndian.Uint64(b),
				Offset:   int64(binary.LittleEndian.Uint64(b[8:])),
			}
			if e == (ScratchEntry{}) {
				return nil
			}
			in := e.Offset - s.DataOffset()
			if in < 0 || in%BlockSize != 0 || in/BlockSize >= int64(s.Capacity()) {
				return badFormat(off, "scratch entry of block %d has its data at byte %d, not in one of the %d places from %d on",
					e.NewBlock, e.Offset, s.Capacity(), s.DataOffset())
			}
			s.Entries = append(s.Entries, e)
			off += ScratchEntrySize
			left--
		}
	}
	return badFormat(off, "the scratch entries have no end mark")
}

// checkDistinct checks that no block and no data is listed twice.
func (s *Scratch) checkDistinct() error {
	for _, key := range []func(ScratchEntry) uint64{
		func(e ScratchEntry) uint64 { return e.NewBlock },
		func(e ScratchEntry) uint64 { return uint64(e.Offset) },
	} {
		byKey := slices.SortedFunc(slices.Values(s.Entries), func(a, b ScratchEntry) int { return cmp.Compare(key(a), key(b)) })
		for i := 1; i < len(byKey); i++ {
			if key(byKey[i]) == key(byKey[i-1]) {
				return badFormat(s.MetadataOffset(), "two scratch entries for block %d or its data at byte %d", byKey[i].NewBlock, byKey[i].Offset)
			}
		}
	}
	return nil
}

// Window tells how many ops of the merge list, from position merged on, have
// their final data in the scratch: they may be half written to the base, must be
// redone from the scratch, and until then be read from there. It is 0 unless
// State is ScratchDone, and also when the entries are the ops just before
// merged: then the count of merged ops reached the disk before the state did,
// and the scratch is spent. Entries that are neither mean that the base cannot
// be completed from this file, a format error.
func (s *Scratch) Window(ops Ops, merged uint64) (uint64, error) {
	n := uint64(len(s.Entries))
	if n == 0 {
		return 0, nil
	}
	blocks := make([]uint64, 0, n)
	for _, e := range s.Entries {
		blocks = append(blocks, e.NewBlock)
	}
	slices.Sort(blocks)
	if ok, err := sameOps(blocks, ops, merged); ok || err != nil {
		return n, err
	}
	if merged >= n {
		if ok, err := sameOps(blocks, ops, merged-n); ok || err != nil {
			return 0, err
		}
	}
	return 0, badFormat(s.MetadataOffset(), "the %d blocks in the scratch are not those of the ops after the %d that are merged", n, merged)
}

// sameOps tells whether the ops from position pos on, as many as there are
// blocks, are ordered ones that write just these blocks, which are sorted.
func sameOps(blocks []uint64, ops Ops, pos uint64) (bool, error) {
	if pos+uint64(len(blocks)) > ops.Ordered() {
		return false, nil
	}
	for i := range uint64(len(blocks)) {
		op, err := ops.At(pos + i)
		if err != nil {
			return false, err
		}
		if _, ok := slices.BinarySearch(blocks, op.NewBlock); !ok {
			return false, nil
		}
	}
	return true, nil
}
