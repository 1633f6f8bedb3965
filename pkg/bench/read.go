package bench

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"time"

	"k8s.io/klog/v2"

	"github.com/snapmerge/snapmerge/pkg/blockio"
	"github.com/snapmerge/snapmerge/pkg/offline"
	"github.com/snapmerge/snapmerge/pkg/readahead"
	"github.com/snapmerge/snapmerge/pkg/snapshot"
	"github.com/snapmerge/snapmerge/pkg/transport"
	"github.com/snapmerge/snapmerge/pkg/volume"
)

// ReadOptions say what to read and how.
type ReadOptions struct {
	Spec
	// Dir takes the files; it must be there and have none of their names.
	Dir string
	// Requests lists the lengths of the reads in bytes, each measured.
	Requests []int64
	// ReadAhead is that of a node but for the mode.
	ReadAhead readahead.Config
	// Transport makes the device that fio reads; nil: the volume is read without one.
	Transport transport.Transport
	// Runs is how often everything is measured, in turn.
	Runs int
	// Mixed is for how long MeasureMixed has each load go on.
	Mixed time.Duration
	// Note, if set, is told about every step.
	Note func(format string, args ...any)
}

// Reads that are measured beside those of the modes of read-ahead.
const (
	// Merged is the same data in a volume without layers, and MergedAsync that with its
	// base read ahead.
	Merged      = "merged"
	MergedAsync = "merged-async"
	// Again is mode none once more: how far its time is from the other's is noise.
	Again = "none-again"
)

// ReadResult is what was measured with one mode and one length of requests, one
// at a time from the first byte to the last. Times are medians over the runs, the
// counts those of the run with the median time. The JSON keys are those of the
// command.
type ReadResult struct {
	Spec
	Mode      string `json:"mode"` // of read-ahead, or Merged, or Again
	Request   int64  `json:"request"`
	Transport string `json:"transport"`
	Verified  bool   `json:"verified"`
	Runs      int    `json:"runs"`

	Seconds    float64 `json:"seconds"`
	SecondsMin float64 `json:"seconds_min"`
	SecondsMax float64 `json:"seconds_max"`
	MiBPerSec  float64 `json:"mib_s"`
	// Of single requests, in microseconds.
	P50 float64 `json:"p50_us"`
	P99 float64 `json:"p99_us"`

	// Speed divided by that of the other reads of the same run; the median.
	VersusNone   float64 `json:"versus_none"`
	VersusSync   float64 `json:"versus_sync"`
	VersusMerged float64 `json:"versus_merged"`

	Hits        uint64 `json:"hits"`
	Misses      uint64 `json:"misses"`
	AheadBytes  uint64 `json:"read_ahead_bytes"`
	WastedBytes uint64 `json:"wasted_bytes"`
}

// readRun is one measurement.
type readRun struct {
	seconds  float64
	p50, p99 float64 // seconds
	stats    readahead.Stats
}

func (r readRun) String() string { return fmt.Sprintf("%.3f s", r.seconds) }

// reads is the state of one call of Read.
type reads struct {
	*bench
	o                ReadOptions
	unmerged, merged string // directories of volumes
}

// readModes are what is measured, in the order of a run.
var readModes = []string{string(readahead.None), string(readahead.Sync), string(readahead.Async), Merged, MergedAsync, Again}

// Read makes a base, a COW and a volume of them, which is not merged, and one of
// the image that the COW makes, and reads them from the first byte to the last. All
// bytes are compared, not while the time is taken. There is one ReadResult for each
// length of requests and each mode. A difference is an *offline.DifferenceError.
// o.Spec is complete.
func Read(ctx context.Context, o ReadOptions) ([]ReadResult, error) {
	return inTurn(ctx, o, readModes, (*reads).measure, (*reads).result)
}

// inTurn makes the volumes, measures each length of requests with each mode, o.Runs
// times in turn, and sums up the runs of each mode.
func inTurn[Run fmt.Stringer, Result any](ctx context.Context, o ReadOptions, modes []string,
	measure func(r *reads, ctx context.Context, mode string, request int64, first bool) (Run, error),
	sumUp func(r *reads, mode string, request int64, runs map[string][]Run) Result,
) (results []Result, err error) {
	r, err := newReads(o)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, r.clean()) }()
	if err := r.make(ctx); err != nil {
		return nil, err
	}
	for _, request := range o.Requests {
		runs := map[string][]Run{}
		for round := range o.Runs {
			for _, mode := range modes {
				run, err := measure(r, ctx, mode, request, round == 0)
				if err != nil {
					return nil, err
				}
				r.o.Note("run %d of %d: requests of %d bytes, %s: %v", round+1, o.Runs, request, mode, run)
				runs[mode] = append(runs[mode], run)
			}
		}
		for _, mode := range modes {
			results = append(results, sumUp(r, mode, request, runs))
		}
	}
	return results, nil
}

func newReads(o ReadOptions) (*reads, error) {
	if o.Note == nil {
		o.Note = func(string, ...any) {}
	}
	if o.Transport != nil {
		if err := FindFio(); err != nil {
			return nil, err
		}
	}
	var err error
	if o.Dir, err = filepath.Abs(o.Dir); err != nil {
		return nil, err
	}
	b := newBench(MergeOptions{Spec: o.Spec, Dir: o.Dir, Note: o.Note})
	return &reads{bench: b, o: o, unmerged: filepath.Join(o.Dir, "unmerged"), merged: filepath.Join(o.Dir, "merged")}, nil
}

// make makes files and volumes.
func (r *reads) make(ctx context.Context) error {
	if err := wantAbsent(r.images.fs, r.unmerged, r.merged); err != nil {
		return err
	}
	if err := r.generate(ctx); err != nil {
		return err
	}
	index := snapshot.IndexPath(r.COW)
	r.remove = append(r.remove, r.unmerged, r.merged, index)
	if err := r.images.writeBase(ctx, r.Base); err != nil {
		return err
	}
	if err := snapshot.BuildIndex(ctx, r.images.fs, r.COW); err != nil {
		return err
	}
	spec := volume.Spec{ID: "unmerged", Size: r.o.Size, Base: r.Base, COWs: []volume.COWSource{{Path: r.COW}}, ReadOnly: true, Paused: true}
	if err := volume.Create(r.images.fs, r.unmerged, spec); err != nil {
		return err
	}
	return volume.Create(r.images.fs, r.merged, volume.Spec{ID: "merged", Size: r.o.Size, Base: r.Expected, ReadOnly: true})
}

// measure reads all of a volume, and verifies it when asked to.
func (r *reads) measure(ctx context.Context, mode string, request int64, verify bool) (run readRun, err error) {
	err = r.with(ctx, mode, func(source blockSource, ahead *readahead.Manager) (err error) {
		if source.device != "" {
			run, err = readDevice(ctx, source.device, r.o.Size, request)
		} else {
			run, err = readThrough(ctx, source, r.o.Size, request)
		}
		if err != nil {
			return err
		}
		if run.stats = ahead.Stats(); verify {
			return r.verify(ctx, source)
		}
		return nil
	})
	return run, err
}

// with opens what is to be read, with nothing of it in memory, for as long as use
// lasts.
func (r *reads) with(ctx context.Context, mode string, use func(source blockSource, ahead *readahead.Manager) error) (err error) {
	cfg, dir := r.o.ReadAhead, r.unmerged
	switch mode {
	case Merged:
		dir = r.merged
	case MergedAsync:
		dir, cfg.Mode = r.merged, readahead.Async
	case Again:
		cfg.Mode = readahead.None
	default:
		cfg.Mode = readahead.Mode(mode)
	}
	ahead := readahead.NewManager(cfg)
	defer func() { err = errors.Join(err, ahead.Close()) }()
	v, err := volume.Open(volume.Config{FS: r.images.fs, Dir: dir, IO: blockio.Auto, ReadAhead: ahead, Log: klog.Background()})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, v.Close()) }()
	source, done, err := r.source(ctx, v)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, done()) }()
	if err := r.dropCaches(r.Base, r.COW, r.Expected); err != nil {
		return err
	}
	return use(source, ahead)
}

// blockSource is what is read: a volume, or its device.
type blockSource struct {
	io.ReaderAt
	// device is its path; "": there is none. Who times reads of it is a process of its
	// own, as pods are: in ours readers would wait for those that serve them to leave
	// them a place in Go's scheduler, and the other way round.
	device string
}

func (r *reads) source(ctx context.Context, v *volume.Volume) (source blockSource, done func() error, err error) {
	if r.o.Transport == nil {
		return blockSource{ReaderAt: v}, func() error { return nil }, nil
	}
	dev, err := r.o.Transport.Create(ctx, v.ID(), v, transport.Options{ReadOnly: true})
	if err != nil {
		return source, nil, err
	}
	f, err := blockio.OS().Open(dev.Path(), blockio.ReadOnly|blockio.Direct)
	if err != nil {
		return source, nil, errors.Join(err, dev.Abort())
	}
	return blockSource{f, dev.Path()}, func() error {
		err := f.Close()
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
		defer cancel()
		if cerr := dev.Close(ctx); cerr != nil {
			err = errors.Join(err, cerr, dev.Abort())
		}
		return err
	}, nil
}

// readDevice has fio read from the first byte to the last.
func readDevice(ctx context.Context, name string, size, request int64) (run readRun, err error) {
	jobs, err := fio(ctx, "--filename="+name, "--name=read", "--rw=read", fmt.Sprintf("--bs=%d", request), fmt.Sprintf("--size=%d", size))
	if err != nil {
		return run, err
	}
	// What fio does between requests does not count; the time of all it rounds to ms.
	l := jobs[0].Read.Latency
	run.seconds, run.p50, run.p99 = l.Mean*l.N/1e9, fioTime(0.5, l), fioTime(0.99, l)
	if run.seconds == 0 {
		return run, errors.New("what fio says: it has read nothing")
	}
	return run, nil
}

// readThrough reads from the first byte to the last and takes the time.
func readThrough(ctx context.Context, source io.ReaderAt, size, request int64) (run readRun, err error) {
	arena, err := blockio.NewArena(int(request))
	if err != nil {
		return run, err
	}
	defer arena.Close()
	took := make([]time.Duration, 0, size/request+1)
	start := time.Now()
	last := start
	for off := int64(0); off < size; off += request {
		if err := ctx.Err(); err != nil {
			return run, err
		}
		p := arena.Bytes()[:min(request, size-off)]
		if n, err := source.ReadAt(p, off); n < len(p) {
			return run, fmt.Errorf("read of %d bytes at %d: %w", len(p), off, err)
		}
		now := time.Now()
		took = append(took, now.Sub(last))
		last = now
	}
	run.seconds = last.Sub(start).Seconds()
	run.p50, run.p99 = percentiles(took)
	return run, nil
}

// verify compares what is read with the image that it must be.
func (r *reads) verify(ctx context.Context, source io.ReaderAt) (err error) {
	want, err := r.images.fs.Open(r.Expected, blockio.ReadOnly)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, want.Close()) }()
	arena, err := blockio.NewArena(2 * chunkBytes)
	if err != nil {
		return err
	}
	defer arena.Close()
	for off := int64(0); off < r.o.Size; off += chunkBytes {
		if err := ctx.Err(); err != nil {
			return err
		}
		n := min(chunkBytes, r.o.Size-off)
		got, exp := arena.Bytes()[:n], arena.Bytes()[chunkBytes:][:n]
		if k, err := source.ReadAt(got, off); k < len(got) {
			return fmt.Errorf("read of %d bytes at %d: %w", len(got), off, err)
		}
		if k, err := want.ReadAt(exp, off); k < len(exp) {
			return err
		}
		if !bytes.Equal(got, exp) {
			return &offline.DifferenceError{Off: off, What: "the volume does not read as " + r.Expected}
		}
	}
	return nil
}

// result sums up the runs of a mode.
func (r *reads) result(mode string, request int64, runs map[string][]readRun) ReadResult {
	seconds := make([]float64, len(runs[mode]))
	for i, run := range runs[mode] {
		seconds[i] = run.seconds
	}
	versus := func(other string) float64 {
		_, ratio := Compare(runs[mode], runs[other], func(r readRun) float64 { return 1 / r.seconds })
		return ratio
	}
	s, mid := median(seconds)
	st := runs[mode][mid].stats
	res := ReadResult{
		Spec: r.o.Spec, Mode: mode, Request: request, Verified: true, Runs: len(runs[mode]),
		Seconds: s.mid, SecondsMin: s.min, SecondsMax: s.max, MiBPerSec: float64(r.o.Size) / mib / s.mid,
		P50: Median(runs[mode], func(r readRun) float64 { return r.p50 * 1e6 }), P99: Median(runs[mode], func(r readRun) float64 { return r.p99 * 1e6 }),
		VersusNone: versus(string(readahead.None)), VersusSync: versus(string(readahead.Sync)), VersusMerged: versus(Merged),
		Hits: st.Hits, Misses: st.Misses, AheadBytes: st.Bytes, WastedBytes: st.Wasted,
	}
	res.Transport = r.transport()
	return res
}

// transport is the name of what makes the device, "none" if there is none.
func (r *reads) transport() string {
	if r.o.Transport == nil {
		return "none"
	}
	return r.o.Transport.Name()
}
