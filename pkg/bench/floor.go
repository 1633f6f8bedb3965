package bench

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/snapmerge/snapmerge/pkg/blockio"
	"github.com/snapmerge/snapmerge/pkg/cow"
	"github.com/snapmerge/snapmerge/pkg/offline"
)

const (
	// floorRequest is the most that one pread or pwrite of the floor moves.
	floorRequest = 1 << 20
	// floorBatch is how much replaced or zeroed data is written between two
	// places for flushes.
	floorBatch = 64 << 20
)

// span is a range of a file in bytes.
type span struct{ off, n int64 }

// floorStep is what the floor does between two flushes of the base: a window of
// ordered ops, or a batch of the others.
type floorStep struct {
	reads, writes, zeros []span // of the base
	ordered              int64  // ops of a window; 0: a batch
	replaced             int64  // bytes
}

// floor is a lower bound for a merge: loops of pread and pwrite, one transfer at
// a time with direct I/O, that move the bytes that the engine has moved, without
// any thought for what is in them. It knows nothing of the engine but the size
// of its windows and the number of its flushes and scratch bytes. All ranges are
// sorted, neighbours joined and cut into pieces of 1 MiB.
//
// First the header and op table of the COW are read. Then, for every window of
// ordered ops, in merge order:
//
//	read all source blocks, each once
//	write one block and the window's share of the scratch bytes to a file
//	flush that file
//	write all blocks of the ops
//	flush the base
//
// and for every 64 MiB of blocks that are replaced or zeroed, in the order of the
// plan:
//
//	read their share of the COW's data, on from where the last read ended
//	write the replaced blocks, punch out the zeroed ones
//	flush the base
//	write one block to the scratch file and flush that
//
// The flushes are as many as the engine's: where that is not the number of the
// places above, they are spread over them evenly, so that some have none or
// several. Data of xor ops is read together with that of replace ops, or first
// if there are none.
//
// The base is one of its own, laid out like ours, because what the floor leaves
// in it is nobody's image.
type floor struct {
	ctx                 context.Context
	base, scratch, data blockio.File
	buf                 []byte // as long as a window or a batch
	steps               []floorStep
	slot                int64 // bytes of one half of the scratch file
	res                 offline.MergeResult

	places, place       uint64
	payloadEnd, payload int64 // of the COW: where data ends, where to read on
	ordered, replaced   int64 // in all steps
	moved               floorMoved
}

// floorMoved is what the floor has done.
type floorMoved struct {
	scratch, written uint64 // bytes
	flushes          uint64
}

// newFloorSteps makes the steps of a plan, windows of at most so many ops.
func newFloorSteps(p *plan, window int) []floorStep {
	var steps []floorStep
	for ops := range slices.Chunk(p.ordered, window) {
		var s floorStep
		for _, o := range ops {
			first := o.source / bs * bs
			s.reads = append(s.reads, span{int64(first), bs})
			if first != o.source {
				s.reads = append(s.reads, span{int64(first) + bs, bs})
			}
			s.writes = append(s.writes, span{int64(o.block) * bs, bs})
		}
		s.ordered = int64(len(ops))
		s.reads, s.writes = joined(s.reads, floorRequest), joined(s.writes, floorRequest)
		steps = append(steps, s)
	}
	for ops := range slices.Chunk(p.independent, floorBatch/bs) {
		var s floorStep
		for _, o := range ops {
			at := span{int64(o.block) * bs, bs}
			if o.typ == cow.Zero {
				s.zeros = append(s.zeros, at)
				continue
			}
			s.writes = append(s.writes, at)
			s.replaced += bs
		}
		s.writes, s.zeros = joined(s.writes, floorRequest), joined(s.zeros, maxSize)
		steps = append(steps, s)
	}
	return steps
}

// joined sorts spans, drops what is there twice and joins neighbours up to limit
// bytes.
func joined(list []span, limit int64) []span {
	slices.SortFunc(list, func(a, b span) int { return cmp.Compare(a.off, b.off) })
	var out []span
	for _, s := range list {
		if k := len(out) - 1; k >= 0 {
			last := &out[k]
			if s.off < last.off+last.n {
				continue // the same block: all spans are blocks
			}
			if s.off == last.off+last.n && last.n+s.n <= limit {
				last.n += s.n
				continue
			}
		}
		out = append(out, s)
	}
	return out
}

// floorFiles are the names of the floor's files. COW is only read.
type floorFiles struct{ base, scratch, cow string }

// runFloor measures the floor of a merge that gave res, and returns the time
// from the opening of the files to the end of the last flush.
func runFloor(ctx context.Context, fsys blockio.FS, names floorFiles, steps []floorStep, window int, res offline.MergeResult) (_ time.Duration, moved floorMoved, err error) {
	f := &floor{ctx: ctx, steps: steps, res: res, slot: int64(window+1) * bs}
	size := int64(floorRequest)
	for _, s := range steps {
		f.ordered, f.replaced = f.ordered+s.ordered, f.replaced+s.replaced
		f.places += 2
		size = max(size, total(s.reads), total(s.writes))
	}
	arena, err := blockio.NewArena(int(size))
	if err != nil {
		return 0, moved, err
	}
	defer arena.Close()
	f.buf = arena.Bytes()
	for i := range f.buf { // used before: the engine's memory counts for it, too
		f.buf[i] = byte(i >> 12)
	}

	begin := time.Now()
	var closers []blockio.File
	defer func() {
		for _, c := range closers {
			err = errors.Join(err, c.Close())
		}
	}()
	for _, o := range []struct {
		to   *blockio.File
		name string
		flag blockio.Flag
	}{
		{&f.base, names.base, blockio.Direct},
		{&f.scratch, names.scratch, blockio.Create | blockio.Direct},
		{&f.data, names.cow, blockio.ReadOnly},
	} {
		if *o.to, err = fsys.Open(o.name, o.flag); err != nil {
			return 0, moved, err
		}
		closers = append(closers, *o.to)
	}
	if err := f.run(); err != nil {
		return 0, moved, fmt.Errorf("floor: %w", err)
	}
	return time.Since(begin), f.moved, nil
}

func total(list []span) int64 {
	n := int64(0)
	for _, s := range list {
		n += s.n
	}
	return n
}

func (f *floor) run() error {
	if err := f.scratch.Allocate(0, 2*f.slot); err != nil {
		return err
	}
	if err := f.readTable(); err != nil {
		return err
	}
	ordered, replaced, half := int64(0), int64(0), int64(0)
	for _, s := range f.steps {
		if err := f.ctx.Err(); err != nil {
			return err
		}
		ordered, replaced = ordered+s.ordered, replaced+s.replaced
		var err error
		if s.ordered > 0 {
			err = f.window(s, ordered, half)
		} else {
			err = f.batch(s, replaced, half)
		}
		if err != nil {
			return err
		}
		half = f.slot - half
	}
	return nil
}

// readTable reads all of the COW that is neither scratch space nor data.
func (f *floor) readTable() error {
	file, err := cow.Open(f.data, f.data.Size(), cow.OpenOptions{})
	if err != nil {
		return err
	}
	h := file.Header()
	f.payloadEnd, f.payload = f.data.Size(), int64(h.HeaderSize)+int64(h.BufferSize)
	if h.Major == 3 {
		// Behind the scratch space, the sequence and the resume points.
		if err := f.readData(f.payload + int64(h.SequenceCount)*4 + int64(h.ResumePointMax)*16 + int64(h.OpCountMax)*16); err != nil {
			return err
		}
	}
	if f.replaced == 0 {
		return f.readData(f.payloadEnd)
	}
	return nil
}

// readData reads the COW on up to end.
func (f *floor) readData(end int64) error {
	for f.payload < end {
		n := min(floorRequest, end-f.payload)
		if _, err := f.data.ReadAt(f.buf[:n], f.payload); err != nil {
			return err
		}
		f.payload += n
	}
	return nil
}

// window does a window, with which so many ordered ops are done.
func (f *floor) window(s floorStep, done, half int64) error {
	if err := f.each(s.reads, f.base.ReadAt); err != nil {
		return err
	}
	blocks := int64(f.res.ScratchBytes/bs)*done/f.ordered - int64(f.moved.scratch/bs)
	log := []span{{half, bs}}
	for off, left := half+bs, blocks*bs; left > 0; {
		n := min(left, floorRequest)
		log = append(log, span{off, n})
		off, left = off+n, left-n
	}
	if err := f.each(log, f.scratch.WriteAt); err != nil {
		return err
	}
	f.moved.scratch += uint64(blocks) * bs
	if err := f.flush(f.scratch); err != nil {
		return err
	}
	if err := f.each(s.writes, f.base.WriteAt); err != nil {
		return err
	}
	f.moved.written += uint64(total(s.writes))
	return f.flush(f.base)
}

// batch does a batch, with which so many bytes are replaced.
func (f *floor) batch(s floorStep, done, half int64) error {
	if f.replaced > 0 {
		// What is left of the data for what was left to replace before.
		before := done - s.replaced
		share := (f.payloadEnd - f.payload) * s.replaced / max(f.replaced-before, 1)
		if err := f.readData(f.payload + share); err != nil {
			return err
		}
	}
	if err := f.each(s.writes, f.base.WriteAt); err != nil {
		return err
	}
	f.moved.written += uint64(total(s.writes))
	for _, z := range s.zeros {
		if err := f.base.Zero(z.off, z.n); err != nil {
			return err
		}
	}
	if err := f.flush(f.base); err != nil {
		return err
	}
	if err := f.each([]span{{half, bs}}, f.scratch.WriteAt); err != nil {
		return err
	}
	return f.flush(f.scratch)
}

// each moves spans, one after the other through the buffer.
func (f *floor) each(list []span, move func(p []byte, off int64) (int, error)) error {
	at := int64(0)
	for _, s := range list {
		if at+s.n > int64(len(f.buf)) {
			at = 0
		}
		if _, err := move(f.buf[at:at+s.n], s.off); err != nil {
			return err
		}
		at += s.n
	}
	return nil
}

// flush is a place for flushes: as many as bring their number up to the share
// of the places so far.
func (f *floor) flush(file blockio.File) error {
	f.place++
	for ; f.moved.flushes < f.res.Flushes*f.place/f.places; f.moved.flushes++ {
		if err := file.Flush(); err != nil {
			return err
		}
	}
	return nil
}
