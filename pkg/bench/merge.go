package bench

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/snapmerge/snapmerge/pkg/blockio"
	"github.com/snapmerge/snapmerge/pkg/cow"
	"github.com/snapmerge/snapmerge/pkg/offline"
)

// MergeOptions say what to merge, how, and what to put beside it.
type MergeOptions struct {
	Spec
	// Dir takes the files; it must be there and have none of their names.
	Dir string
	// IO lists the back ends; each is measured.
	IO          []blockio.Kind
	InPlace     bool
	NoReadAhead bool
	Window      int64 // bytes; 0: the default of a new journal
	Rate        int   // MiB/s; 0: no limit
	// FlushDelay is added to every flush.
	FlushDelay time.Duration
	// Runs is how often everything is measured, in turn.
	Runs int
	// Floor measures plain loops too (see runFloor).
	Floor bool
	// QemuImg measures qemu-img commit too (see qemu), with clusters of
	// QemuCluster bytes.
	QemuImg     bool
	QemuCluster int64
	// GenerateOnly makes the files, and nothing else.
	GenerateOnly bool
	// Keep leaves base, COW and expected image behind.
	Keep bool
	// Reuse takes COW and expected image that an earlier call with the same Spec
	// has left in Dir.
	Reuse bool
	// Note, if set, is told about every step.
	Note func(format string, args ...any)
}

// Result is what was measured with one back end. Times are medians; all else
// that can vary is of the run with the median time (of an even number, the
// faster one of the two in the middle). The JSON keys are those of the command.
type Result struct {
	offline.MergeResult
	Spec
	Verified bool `json:"verified"`

	Runs         int     `json:"runs"`
	SecondsMin   float64 `json:"seconds_min"`
	SecondsMax   float64 `json:"seconds_max"`
	InPlace      bool    `json:"in_place"`
	ReadAhead    bool    `json:"read_ahead"`
	WindowBytes  int64   `json:"window_bytes"`
	FlushDelayMS float64 `json:"flush_delay_ms"`
	COWBytes     int64   `json:"cow_bytes"`

	// Of the process during the merge. PeakRSS includes what the benchmark
	// itself holds.
	CPUSeconds      float64 `json:"cpu_seconds"`
	ContextSwitches int64   `json:"context_switches"`
	PeakRSS         int64   `json:"peak_rss_bytes"` // 0: unknown

	// Ratios are ours divided by theirs.
	FloorSeconds    float64 `json:"floor_seconds,omitempty"`
	FloorSecondsMin float64 `json:"floor_seconds_min,omitempty"`
	FloorSecondsMax float64 `json:"floor_seconds_max,omitempty"`
	FloorRatio      float64 `json:"floor_ratio,omitempty"`

	QemuSeconds      float64 `json:"qemu_img_seconds,omitempty"`
	QemuSecondsMin   float64 `json:"qemu_img_seconds_min,omitempty"`
	QemuSecondsMax   float64 `json:"qemu_img_seconds_max,omitempty"`
	QemuRatio        float64 `json:"qemu_img_ratio,omitempty"`
	QemuClusterBytes int64   `json:"qemu_img_cluster_bytes,omitempty"`
}

// Files are the names of what is made.
type Files struct {
	Base     string `json:"base"`
	COW      string `json:"cow"`
	Expected string `json:"expected"`
}

// ErrReuse says that the files in a directory are not those of the Spec.
var ErrReuse = errors.New("cannot be reused")

// bench is the state of one call of Merge.
type bench struct {
	o      MergeOptions
	images *images
	Files
	temporary []string // removed at the end
	warn      sync.Once
}

// Merge makes the files, measures and compares. There is one Result for each
// back end. A merged base that is not the expected image is an
// *offline.DifferenceError. o.Spec is complete.
func Merge(ctx context.Context, o MergeOptions) (results []Result, err error) {
	if o.Note == nil {
		o.Note = func(string, ...any) {}
	}
	b := &bench{o: o, images: newImages(o.Spec), Files: Names(o.Dir)}
	defer func() { err = errors.Join(err, b.remove()) }()
	if err := b.generate(ctx); err != nil || o.GenerateOnly {
		return nil, err
	}
	return b.measure(ctx)
}

// Names are the files that Merge makes in dir.
func Names(dir string) Files {
	return Files{filepath.Join(dir, "base.img"), filepath.Join(dir, "cow.img"), filepath.Join(dir, "expected.img")}
}

func (b *bench) path(name string) string { return filepath.Join(b.o.Dir, name) }

// temp is the path of a file that does not outlive the call.
func (b *bench) temp(name string) string {
	p := b.path(name)
	b.temporary = append(b.temporary, p)
	return p
}

func (b *bench) remove() error {
	var errs []error
	for _, p := range b.temporary {
		errs = append(errs, b.images.fs.RemoveAll(p))
	}
	return errors.Join(errs...)
}

// generate makes the three files and the note of their Spec, or finds them.
func (b *bench) generate(ctx context.Context) error {
	spec := b.path("bench.json")
	made := []string{b.Base, b.COW, b.Expected, spec}
	if b.o.Reuse {
		return b.checkReuse(spec)
	}
	for _, p := range made {
		ok, err := b.images.fs.Exists(p)
		if err != nil {
			return err
		}
		if ok {
			return fmt.Errorf("%s is there already: it is not overwritten", p)
		}
	}
	if !b.o.Keep && !b.o.GenerateOnly {
		b.temporary = append(b.temporary, made...)
	}
	b.o.Note("making %s: %d MiB, %d ops, seed %d", b.o.Workload, b.o.Size/mib, b.o.Ops, b.o.Seed)
	err := b.images.writeCOW(ctx, b.COW)
	if err == nil {
		err = b.images.writeExpected(ctx, b.Expected)
	}
	if err == nil && b.o.GenerateOnly {
		err = b.images.writeBase(ctx, b.Base)
	}
	if err != nil {
		// Half of a file is of no use to anybody.
		b.temporary = append(b.temporary, made...)
		return err
	}
	text, err := json.Marshal(b.o.Spec)
	if err != nil {
		return err
	}
	return os.WriteFile(spec, append(text, '\n'), 0o600)
}

func (b *bench) checkReuse(spec string) error {
	text, err := os.ReadFile(spec)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrReuse, err)
	}
	var s Spec
	if err := json.Unmarshal(text, &s); err != nil {
		return fmt.Errorf("%s: %w: %w", spec, ErrReuse, err)
	}
	if s != b.o.Spec {
		return fmt.Errorf("%s: %w: made for %+v, asked for %+v", spec, ErrReuse, s, b.o.Spec)
	}
	return nil
}

// run is one measurement of ours.
type run struct {
	offline.MergeResult
	usage usage
}

func (b *bench) measure(ctx context.Context) ([]Result, error) {
	series := make([]ours, len(b.o.IO))
	for round := range b.o.Runs {
		for i, kind := range b.o.IO {
			if err := b.ours(ctx, kind, &series[i]); err != nil {
				return nil, err
			}
			b.o.Note("run %d of %d: %s %.3f s", round+1, b.o.Runs, kind, series[i].runs[round].Seconds)
		}
	}
	var results []Result
	for i := range series {
		r, err := b.result(&series[i])
		if err != nil {
			return nil, err
		}
		results = append(results, r)
	}
	return results, nil
}

// ours are the runs with one back end.
type ours struct{ runs []run }

// ours makes a base, merges the COW into it as the merge command does, and
// compares.
func (b *bench) ours(ctx context.Context, kind blockio.Kind, s *ours) error {
	if err := b.images.writeBase(ctx, b.Base); err != nil {
		return err
	}
	o := offline.MergeOptions{
		Base: b.Base, COW: b.COW, IO: kind, NoReadAhead: b.o.NoReadAhead, Window: b.o.Window, Rate: b.o.Rate, FS: b.fs(),
	}
	if b.o.InPlace {
		o.COW = b.temp("merged-cow.img")
		if err := copyFile(ctx, b.images.fs, b.COW, o.COW); err != nil {
			return err
		}
	} else {
		o.Journal = b.temp("journal")
		if err := b.images.fs.RemoveAll(o.Journal); err != nil {
			return err
		}
	}
	if err := b.dropCaches(b.Base, o.COW); err != nil {
		return err
	}
	before := startUsage()
	res, err := offline.Merge(ctx, o)
	u := before.end()
	if err != nil {
		return err
	}
	if err := compare(ctx, b.images.fs, b.Base, b.Expected); err != nil {
		return err
	}
	s.runs = append(s.runs, run{res, u})
	return nil
}

// fs is the file system that is measured.
func (b *bench) fs() blockio.FS {
	if b.o.FlushDelay == 0 {
		return b.images.fs
	}
	return slowFlushFS{b.images.fs, b.o.FlushDelay}
}

func (b *bench) result(s *ours) (Result, error) {
	st, err := os.Stat(b.COW)
	if err != nil {
		return Result{}, err
	}
	var seconds []float64
	for _, r := range s.runs {
		seconds = append(seconds, r.Seconds)
	}
	mid, at := median(seconds)
	r := s.runs[at]
	res := Result{
		MergeResult: r.MergeResult, Spec: b.o.Spec, Verified: true, Runs: len(s.runs),
		InPlace: b.o.InPlace, ReadAhead: !b.o.NoReadAhead, WindowBytes: int64(b.windowBlocks()) * bs,
		FlushDelayMS: float64(b.o.FlushDelay) / float64(time.Millisecond), COWBytes: st.Size(),
		CPUSeconds: r.usage.cpu.Seconds(), ContextSwitches: r.usage.switches, PeakRSS: r.usage.peakRSS,
	}
	res.Seconds, res.SecondsMin, res.SecondsMax = mid.mid, mid.min, mid.max
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
