package merge

import (
	"errors"
	"fmt"

	"github.com/snapmerge/snapmerge/pkg/blockio"
	"github.com/snapmerge/snapmerge/pkg/cow"
)

// scratch states (spec cow-format 3).
const (
	scratchInProgress = 1
	scratchDone       = 2
)

// inPlace keeps progress in the COW file as Android does: the counter in its
// header, windows in its scratch space. Counter and scratch state lie in one
// sector, so that one write changes both.
//
// The scratch space lies at no multiple of a block, but direct I/O wants whole
// ones. So image is the beginning of the file, with what begins it and with what
// follows the room for a window in its last block: those bytes are written again as
// they are, and a torn write does not change them.
type inPlace struct {
	f       blockio.File
	ops     cow.Ops
	space   *cow.Scratch // nil: the file has none
	counter uint64       // as on disk
	state   byte         // as on disk

	image *blockio.Arena // nil: not read yet

	scratchBytes, nflushes uint64
}

// OpenInPlace makes a Merger that keeps its progress in the COW file itself and
// leaves it, at any time, in a state that Android's engine can go on from. The
// file has to have one name: another one may be a snapshot's.
func OpenInPlace(cfg Config, file *cow.File, f blockio.File) (*Merger, error) {
	links, err := f.Links()
	if err != nil {
		return nil, err
	}
	if links > 1 {
		return nil, fmt.Errorf("%s has %d names: a COW that others may use cannot be merged in place", f.Name(), links)
	}
	// A process that was killed leaves writes that are visible but not durable.
	if err := f.Flush(); err != nil {
		return nil, err
	}
	p := &inPlace{f: f, ops: cfg.Ops, counter: file.Header().NumMergeOps}
	if p.space, err = file.Scratch(); err != nil {
		return nil, err
	}
	if p.space != nil {
		p.state = p.space.State
	}
	seed, err := ReadSeed(file, f, cfg.Ops)
	if err != nil {
		return nil, err
	}
	rec := recovered{committed: seed.Committed, bytes: seed.Bytes, start: seed.Committed,
		end: seed.Committed + uint64(len(seed.Window)), logged: map[uint64][]byte{}}
	for _, b := range seed.Window {
		rec.logged[b.Block] = b.Data
	}
	if rec.committed > 0 || rec.end > rec.start {
		rec.resumes = 1
	}
	m, err := open(cfg, p, rec)
	if err == nil {
		// The file has no place that tells of a merge before its first commit.
		m.commitSoon = true
	}
	return m, err
}

// ReadSeed reads the progress that a COW file itself records: the ops merged,
// and the window in its scratch space if that is valid. Scratch that holds the
// window just before the counter is spent (spec merge-engine 7, case G).
func ReadSeed(file *cow.File, f blockio.File, ops cow.Ops) (*Seed, error) {
	s := &Seed{Committed: file.Header().NumMergeOps}
	for pos := range s.Committed {
		op, err := ops.At(pos)
		if err != nil {
			return nil, err
		}
		s.Bytes += uint64(op.Blocks) * bs
	}
	space, err := file.Scratch()
	if err != nil || space == nil {
		return s, err
	}
	n, err := space.Window(ops, s.Committed)
	if err != nil || n == 0 {
		return s, err
	}
	if n > maxWindowBlocks { // before its data takes memory
		return nil, fmt.Errorf("window of %d blocks in the scratch space, at most %d are possible", n, maxWindowBlocks)
	}
	at := make(map[uint64]int64, n)
	for _, e := range space.Entries {
		at[e.NewBlock] = e.Offset
	}
	for pos := s.Committed; pos < s.Committed+n; pos++ {
		op, err := ops.At(pos)
		if err != nil {
			return nil, err
		}
		data := make([]byte, bs)
		if err := blockio.ReadFull(f, data, at[op.NewBlock]); err != nil {
			return nil, err
		}
		s.Window = append(s.Window, SeedBlock{Pos: pos, Block: op.NewBlock, Data: data})
	}
	return s, nil
}

// windowBlocks bounds windows, and with them the image, even where the scratch
// space is larger: its size is only what the file says, and it may be a hole.
func (p *inPlace) windowBlocks() int {
	if p.space == nil {
		return DefaultWindowBlocks
	}
	return min(p.space.Capacity(), DefaultWindowBlocks)
}

func (p *inPlace) scratch() bool { return p.space != nil }

// logsWhole: Android's recovery takes all of a window from the scratch space.
func (p *inPlace) logsWhole() bool { return true }

// stage puts the window into the image alone: the scratch space has one slot,
// which the window before may still need. It is in merge order, as Android's
// recovery wants it. Until begin, what is written of the image says that the
// scratch space has no window.
func (p *inPlace) stage(w *window, _ blockio.Queue) error {
	if w.loggedOps() == 0 {
		return nil
	}
	image, err := p.load()
	if err != nil {
		return err
	}
	entries, data := image[p.space.MetadataOffset():], p.space.DataOffset()
	for i := range w.ops {
		k := int64(w.ops[i].pos - w.start)
		at := data + k*bs
		le.PutUint64(entries[k*cow.ScratchEntrySize:], w.ops[i].NewBlock)
		le.PutUint64(entries[k*cow.ScratchEntrySize+8:], uint64(at))
		copy(image[at:], w.blockData(i))
	}
	clear(image[p.space.MetadataOffset()+int64(len(w.ops))*cow.ScratchEntrySize : data]) // zeros end the list
	return nil
}

func (p *inPlace) begin(w *window, _ blockio.Queue) error {
	if w.start != p.counter || p.state == scratchDone {
		if err := p.putSector(w.start, scratchInProgress); err != nil {
			return err
		}
	}
	if w.loggedOps() == 0 {
		// Nothing that redoing the window from its sources would miss.
		return nil
	}
	if err := p.putScratch(w); err != nil {
		return err
	}
	return p.putSector(w.start, scratchDone)
}

func (p *inPlace) commit(upTo, _ uint64) error {
	if upTo == p.counter && p.state != scratchDone {
		return nil
	}
	return p.putSector(upTo, scratchInProgress)
}

func (p *inPlace) note() error { return nil }

// putScratch writes the window that was staged and flushes it.
func (p *inPlace) putScratch(w *window) error {
	image, err := p.load()
	if err != nil {
		return err
	}
	// A write of the sector that failed may have left another there.
	image[p.space.StateOffset()] = p.state
	end := roundUp(p.space.DataOffset() + int64(len(w.ops))*bs)
	if _, err := p.f.WriteAt(image[:min(end, int64(len(image)))], 0); err != nil {
		return fmt.Errorf("write to the scratch space: %w", err)
	}
	p.scratchBytes += uint64(len(w.ops)) * bs
	return p.flush()
}

// load returns the image, read from the file the first time.
func (p *inPlace) load() ([]byte, error) {
	if p.image != nil {
		return p.image.Bytes(), nil
	}
	n := int64(bs)
	if p.space != nil {
		n = roundUp(p.space.DataOffset() + int64(p.windowBlocks())*bs)
	}
	image, err := blockio.NewArena(int(min(n, p.f.Size())))
	if err != nil {
		return nil, err
	}
	if err := blockio.ReadFull(p.f, image.Bytes(), 0); err != nil {
		return nil, errors.Join(err, image.Close())
	}
	p.image = image
	return image.Bytes(), nil
}

// putSector writes counter and state with one write of the sector that holds
// both, flushes it, and adopts them.
func (p *inPlace) putSector(counter uint64, state byte) error {
	image, err := p.load()
	if err != nil {
		return err
	}
	sector := image[:min(blockio.SectorSize, len(image))]
	le.PutUint64(sector[cow.NumMergeOpsOffset:], counter)
	if p.space != nil {
		at := p.space.StateOffset()
		if at >= int64(len(sector)) {
			return errors.New("scratch state lies outside the first sector")
		}
		sector[at] = state
	} else {
		state = 0
	}
	if _, err := p.f.WriteAt(sector, 0); err != nil {
		return err
	}
	if err := p.flush(); err != nil {
		return err
	}
	p.counter, p.state = counter, state
	return nil
}

func (p *inPlace) flush() error {
	p.nflushes++
	return p.f.Flush()
}

func (p *inPlace) close() {
	if p.image != nil {
		p.image.Close()
		p.image = nil
	}
}

func (p *inPlace) counts() (scratch, flushes uint64) {
	scratch, flushes = p.scratchBytes, p.nflushes
	p.scratchBytes, p.nflushes = 0, 0
	return scratch, flushes
}
