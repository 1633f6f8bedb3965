package bench

import (
	"context"
	"errors"
	"os"
	"time"

	"github.com/snapmerge/snapmerge/pkg/blockio"
	"github.com/snapmerge/snapmerge/pkg/cow"
	"github.com/snapmerge/snapmerge/pkg/offline"
)

// run is one measurement of ours.
type run struct {
	offline.MergeResult
	usage usage
}

func (b *bench) measure(ctx context.Context) ([]Result, error) {
	if err := b.prepare(ctx); err != nil {
		return nil, err
	}
	runs := make([][]run, len(b.o.IO))
	var floors, commits []float64
	scales := make([]scaling, len(b.o.IO))
	for round := range b.o.Runs {
		for k := range b.o.IO {
			// Each goes first in turn: what ran before it matters.
			i := (round + k) % len(b.o.IO)
			kind := b.o.IO[i]
			r, err := b.ours(ctx, kind)
			if err != nil {
				return nil, err
			}
			b.o.Note("run %d of %d: snapmerge with %s: %.3f s", round+1, b.o.Runs, r.IO, r.Seconds)
			runs[i] = append(runs[i], r)
			if b.o.Scaling {
				if err := scales[i].run(ctx, b, kind); err != nil {
					return nil, err
				}
			}
		}
		if b.o.Floor {
			s, err := b.floor(ctx, runs[0][round].MergeResult)
			if err != nil {
				return nil, err
			}
			b.o.Note("run %d of %d: floor: %.3f s", round+1, b.o.Runs, s)
			floors = append(floors, s)
		}
		if b.o.QemuImg {
			s, err := b.commit(ctx, round == 0)
			if err != nil {
				return nil, err
			}
			b.o.Note("run %d of %d: qemu-img: %.3f s", round+1, b.o.Runs, s)
			commits = append(commits, s)
		}
	}
	var results []Result
	for i, r := range runs {
		res, err := b.result(r, floors, commits)
		if err != nil {
			return nil, err
		}
		scales[i].addTo(&res)
		results = append(results, res)
	}
	return results, nil
}

// prepare makes what the floor and qemu-img need.
func (b *bench) prepare(ctx context.Context) (err error) {
	if !b.o.Floor && !b.o.QemuImg {
		return nil
	}
	if err := b.images.writeBase(ctx, b.spare); err != nil {
		return err
	}
	if b.o.QemuImg {
		b.o.Note("making the overlay for qemu-img")
		if b.qemu, err = newQemu(ctx, b.spare, b.overlay, b.Expected, b.o.QemuCluster); err != nil {
			return err
		}
	}
	if b.o.Floor {
		b.steps = newFloorSteps(b.images.plan, b.windowBlocks())
	}
	return nil
}

// floor measures the floor of a merge; seconds.
func (b *bench) floor(ctx context.Context, res offline.MergeResult) (float64, error) {
	if err := b.images.fs.RemoveAll(b.scratch); err != nil {
		return 0, err
	}
	if err := b.dropCaches(b.spare, b.COW); err != nil {
		return 0, err
	}
	d, _, err := runFloor(ctx, b.fs(), floorFiles{b.spare, b.scratch, b.COW}, b.steps, b.windowBlocks(), res)
	return d.Seconds(), err
}

// commit measures qemu-img; seconds.
func (b *bench) commit(ctx context.Context, check bool) (float64, error) {
	if err := b.dropCaches(b.spare, b.qemu.overlay); err != nil {
		return 0, err
	}
	d, err := b.qemu.run(ctx, b.fs())
	if err == nil && check {
		err = compare(ctx, b.images.fs, b.spare, b.Expected)
	}
	return d.Seconds(), err
}

// ours makes a base, merges the COW into it as the merge command does, and
// compares.
func (b *bench) ours(ctx context.Context, kind blockio.Kind) (r run, err error) {
	if err := b.images.writeBase(ctx, b.Base); err != nil {
		return r, err
	}
	o := offline.MergeOptions{
		Base: b.Base, COW: b.COW, IO: kind, NoReadAhead: b.o.NoReadAhead, Reflink: b.o.Reflink, Window: b.o.Window, Rate: b.o.Rate, FS: b.fs(),
	}
	if b.o.InPlace {
		o.COW = b.merged
		err = copyFile(ctx, b.images.fs, b.COW, o.COW)
	} else {
		o.Journal = b.journal
		err = b.images.fs.RemoveAll(o.Journal)
	}
	if err == nil {
		err = b.dropCaches(b.Base, o.COW)
	}
	if err != nil {
		return r, err
	}
	before := startUsage()
	r.MergeResult, err = offline.Merge(ctx, o)
	r.usage = before.end()
	if err != nil {
		return r, err
	}
	return r, compare(ctx, b.images.fs, b.Base, b.Expected)
}

// fs is the file system that is measured.
func (b *bench) fs() blockio.FS {
	if b.o.FlushDelay == 0 {
		return b.images.fs
	}
	return slowFlushFS{b.images.fs, b.o.FlushDelay}
}

// result sums up the runs with one back end.
func (b *bench) result(runs []run, floors, commits []float64) (Result, error) {
	st, err := os.Stat(b.COW)
	if err != nil {
		return Result{}, err
	}
	var seconds []float64
	for _, r := range runs {
		seconds = append(seconds, r.Seconds)
	}
	s, mid := median(seconds)
	r := runs[mid]
	res := Result{
		MergeResult: r.MergeResult, Spec: b.o.Spec, Verified: true, Runs: len(runs),
		InPlace: b.o.InPlace, ReadAhead: !b.o.NoReadAhead, Reflink: b.o.Reflink, WindowBytes: int64(b.windowBlocks()) * bs,
		FlushDelayMS: float64(b.o.FlushDelay) / float64(time.Millisecond), COWBytes: st.Size(),
		CPUSeconds: r.usage.cpu.Seconds(), ContextSwitches: r.usage.switches, Syscalls: r.usage.syscalls, PeakRSS: r.usage.peakRSS,
	}
	res.Seconds, res.SecondsMin, res.SecondsMax = s.mid, s.min, s.max
	if b.o.Floor {
		f, _ := median(floors)
		res.FloorSeconds, res.FloorSecondsMin, res.FloorSecondsMax, res.FloorRatio = f.mid, f.min, f.max, s.mid/f.mid
	}
	if b.o.QemuImg {
		q, _ := median(commits)
		res.QemuSeconds, res.QemuSecondsMin, res.QemuSecondsMax, res.QemuRatio = q.mid, q.min, q.max, s.mid/q.mid
		res.QemuClusterBytes = b.o.QemuCluster
	}
	return res, nil
}

// copyFile makes a copy with the same content.
func copyFile(ctx context.Context, fsys blockio.FS, from, to string) (err error) {
	if err := fsys.RemoveAll(to); err != nil {
		return err
	}
	src, err := fsys.Open(from, blockio.ReadOnly)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, src.Close()) }()
	dst, err := fsys.Open(to, blockio.Create|blockio.Excl)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, dst.Close()) }()
	buf := make([]byte, chunkBytes)
	for off, size := int64(0), src.Size(); off < size; off += chunkBytes {
		p := buf[:min(chunkBytes, size-off)]
		if err := ctx.Err(); err != nil {
			return err
		}
		if _, err := src.ReadAt(p, off); err != nil {
			return err
		}
		if _, err := dst.WriteAt(p, off); err != nil {
			return err
		}
	}
	return dst.Flush()
}

// windowBlocks is the most ops of a window of ours.
func (b *bench) windowBlocks() int {
	if b.o.InPlace {
		// Of 2 MiB, each block takes 16 bytes of metadata besides.
		return (cow.DefaultScratchSize - cow.DefaultScratchSize*16/bs) / bs
	}
	return int(b.o.Window / bs)
}
