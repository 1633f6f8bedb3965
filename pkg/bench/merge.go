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
	Reflink     bool
	Window      int64 // bytes; 0: the default of a new journal
	Rate        int   // MiB/s; 0: no limit
	// FlushDelay is added to every flush.
	FlushDelay time.Duration
	// Runs is how often everything is measured, in turn.
	Runs int
	// Floor measures plain loops too (see floor), once a run and with the flushes
	// and scratch bytes of the first back end.
	Floor bool
	// QemuImg measures qemu-img commit too (see qemu), with clusters of
	// QemuCluster bytes.
	QemuImg     bool
	QemuCluster int64
	// Scaling measures the merge on one processor too, and beside it a loop that
	// does nothing but unpack the COW's data, with one and with all.
	Scaling bool
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
	Reflink      bool    `json:"reflink"`
	WindowBytes  int64   `json:"window_bytes"`
	FlushDelayMS float64 `json:"flush_delay_ms"`
	COWBytes     int64   `json:"cow_bytes"`

	// Of the process during the merge. PeakRSS includes what the benchmark
	// itself holds.
	CPUSeconds      float64 `json:"cpu_seconds"`
	ContextSwitches int64   `json:"context_switches"`
	Syscalls        int64   `json:"syscalls"`       // 0: unknown
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

	// Scaling is how many times as fast all processors are as one; ScalingRatio is
	// that of the merge divided by that of bare unpacking.
	OneProcessorSeconds float64 `json:"one_processor_seconds,omitempty"`
	Scaling             float64 `json:"scaling,omitempty"`
	BareScaling         float64 `json:"bare_scaling,omitempty"`
	ScalingRatio        float64 `json:"scaling_ratio,omitempty"`
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
	spec string // the note of the Spec
	// What only the measuring needs: the journal or the COW that ours changes,
	// and for the others a base, the floor's scratch file, and an overlay.
	journal, merged, spare, scratch, overlay string

	remove []string // at the end
	warn   sync.Once
	steps  []floorStep
	qemu   *qemu
}

// Merge makes the files, measures and compares. There is one Result for each
// back end. A merged base that is not the expected image is an
// *offline.DifferenceError; files that cannot be used again give ErrReuse. o.Spec
// is complete.
func Merge(ctx context.Context, o MergeOptions) (results []Result, err error) {
	if o.Note == nil {
		o.Note = func(string, ...any) {}
	}
	if o.QemuCluster == 0 {
		o.QemuCluster = defaultQemuCluster(o.Workload)
	}
	if o.QemuImg {
		if err := findQemu(); err != nil {
			return nil, err
		}
	}
	if o.Dir, err = filepath.Abs(o.Dir); err != nil {
		return nil, err
	}
	b := newBench(o)
	defer func() { err = errors.Join(err, b.clean()) }()
	if err := b.generate(ctx); err != nil || o.GenerateOnly {
		return nil, err
	}
	return b.measure(ctx)
}

func newBench(o MergeOptions) *bench {
	b := &bench{o: o, images: newImages(o.Spec), Files: Names(o.Dir)}
	path := func(name string) string { return filepath.Join(o.Dir, name) }
	b.spec, b.journal, b.merged = path("bench.json"), path("journal"), path("merged-cow.img")
	b.spare, b.scratch, b.overlay = path("spare.img"), path("floor-scratch"), path("overlay.qcow2")
	return b
}

// Names are the files that Merge makes in dir.
func Names(dir string) Files {
	return Files{filepath.Join(dir, "base.img"), filepath.Join(dir, "cow.img"), filepath.Join(dir, "expected.img")}
}

func (b *bench) clean() error {
	var errs []error
	for _, p := range b.remove {
		errs = append(errs, b.images.fs.RemoveAll(p))
	}
	return errors.Join(errs...)
}

// wantAbsent refuses to begin where one of the files is there.
func wantAbsent(fsys blockio.FS, paths ...string) error {
	for _, p := range paths {
		ok, err := fsys.Exists(p)
		if err != nil {
			return err
		}
		if ok {
			return fmt.Errorf("%s is there already: it is not overwritten", p)
		}
	}
	return nil
}

// generate makes the three files and the note of their Spec, or finds them.
func (b *bench) generate(ctx context.Context) error {
	kept := []string{b.Base, b.COW, b.Expected, b.spec}
	temporary := []string{b.journal, b.merged, b.spare, b.scratch, b.overlay}
	if b.o.Reuse {
		b.remove = temporary
		return b.checkReuse()
	}
	if err := wantAbsent(b.images.fs, append(kept, temporary...)...); err != nil {
		return err
	}
	// Half of a file is of no use to anybody.
	b.remove = append(kept, temporary...)
	b.o.Note("making %s: %d MiB, %d ops, seed %d", b.o.Workload, b.o.Size/mib, b.o.Ops, b.o.Seed)
	if err := b.images.writeCOW(ctx, b.COW); err != nil {
		return err
	}
	if err := b.images.writeExpected(ctx, b.Expected); err != nil {
		return err
	}
	if b.o.GenerateOnly { // each run makes its own
		if err := b.images.writeBase(ctx, b.Base); err != nil {
			return err
		}
	}
	text, err := json.Marshal(b.o.Spec)
	if err != nil {
		return err
	}
	if err := os.WriteFile(b.spec, append(text, '\n'), 0o600); err != nil {
		return err
	}
	if b.o.Keep || b.o.GenerateOnly {
		b.remove = temporary
	}
	return nil
}

func (b *bench) checkReuse() error {
	text, err := os.ReadFile(b.spec)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrReuse, err)
	}
	var s Spec
	if err := json.Unmarshal(text, &s); err != nil {
		return fmt.Errorf("%s: %w: %w", b.spec, ErrReuse, err)
	}
	if s != b.o.Spec {
		return fmt.Errorf("%s: %w: made for %+v, asked for %+v", b.spec, ErrReuse, s, b.o.Spec)
	}
	return nil
}
