package bench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"sync"
	"text/tabwriter"
	"time"

	"github.com/dustin/go-humanize"

	"github.com/snapmerge/snapmerge/pkg/blockio"
	"github.com/snapmerge/snapmerge/pkg/readahead"
)

// Readers of a mixed load.
const (
	mixedSequential = 8
	mixedRandom     = 4
)

// MixedResult is what was measured with one mode and one length of requests while
// mixedSequential readers each read in sequence, from places as far apart as can be,
// and mixedRandom readers blocks of 4 KiB anywhere, each one request at a time. Values
// are medians over the runs, ratios medians of those within a run.
type MixedResult struct {
	Spec
	Mode      string `json:"mode"` // of read-ahead, or Again
	Request   int64  `json:"request"`
	Transport string `json:"transport"`
	Runs      int    `json:"runs"`

	// Of all requests; in microseconds.
	P99 float64 `json:"p99_us"`
	// Of all sequential readers, and of all random ones; times in microseconds.
	SequentialMiBPerSec float64 `json:"sequential_mib_s"`
	SequentialP50       float64 `json:"sequential_p50_us"`
	SequentialP99       float64 `json:"sequential_p99_us"`
	RandomPerSec        float64 `json:"random_s"`
	RandomP50           float64 `json:"random_p50_us"`
	RandomP99           float64 `json:"random_p99_us"`

	VersusNone           float64 `json:"p99_versus_none"`
	VersusSync           float64 `json:"p99_versus_sync"`
	SequentialVersusNone float64 `json:"sequential_p99_versus_none"`
	SequentialVersusSync float64 `json:"sequential_p99_versus_sync"`
	RandomVersusNone     float64 `json:"random_p99_versus_none"`
}

// mixedModes are what is measured, in the order of a run.
var mixedModes = []string{string(readahead.None), string(readahead.Sync), string(readahead.Async), Again}

// mixedRun is one measurement; times in seconds.
type mixedRun struct{ all, sequential, random loadTimes }

func (m mixedRun) String() string {
	return fmt.Sprintf("p99 %.0f µs, %.0f µs in sequence, %.0f µs anywhere", m.all.p99*1e6, m.sequential.p99*1e6, m.random.p99*1e6)
}

// loadTimes are those of the requests of readers of one kind.
type loadTimes struct{ perSec, p50, p99 float64 }

// MeasureMixed makes the volume that Read does, and for each length of requests and
// each mode loads it for o.Mixed. What is read is not compared.
func MeasureMixed(ctx context.Context, o ReadOptions) ([]MixedResult, error) {
	return inTurn(ctx, o, mixedModes, (*reads).measureMixed, (*reads).mixedResult)
}

// measureMixed loads the volume; nothing is verified.
func (r *reads) measureMixed(ctx context.Context, mode string, request int64, _ bool) (run mixedRun, err error) {
	err = r.with(ctx, mode, func(source blockSource, _ *readahead.Manager) (err error) {
		if source.device != "" {
			run, err = r.loadDevice(ctx, source.device, request)
		} else {
			run, err = r.load(ctx, source, request)
		}
		return err
	})
	return run, err
}

// loadDevice has fio be the readers.
func (r *reads) loadDevice(ctx context.Context, name string, request int64) (run mixedRun, err error) {
	apart := r.o.Size / mixedSequential / bs * bs
	jobs, err := fio(ctx, "--filename="+name, "--time_based", fmt.Sprintf("--runtime=%dms", r.o.Mixed.Milliseconds()), fmt.Sprintf("--randseed=%d", r.o.Seed+1),
		"--name=sequential", "--rw=read", fmt.Sprintf("--bs=%d", request), fmt.Sprintf("--numjobs=%d", mixedSequential), fmt.Sprintf("--offset_increment=%d", apart),
		"--name=random", "--new_group", "--rw=randread", fmt.Sprintf("--bs=%d", bs), fmt.Sprintf("--numjobs=%d", mixedRandom), "--offset_increment=0", "--norandommap")
	if err != nil {
		return run, err
	}
	if len(jobs) != 2 || jobs[0].Read.IOPS == 0 || jobs[1].Read.IOPS == 0 {
		return run, fmt.Errorf("what fio says: not all readers have read something in %v", r.o.Mixed)
	}
	sequential, random := jobs[0].Read, jobs[1].Read
	of := func(perSec float64, l ...fioLatency) loadTimes {
		return loadTimes{perSec, fioTime(0.5, l...), fioTime(0.99, l...)}
	}
	run.all = of(sequential.IOPS+random.IOPS, sequential.Latency, random.Latency)
	run.sequential = of(sequential.IOPS, sequential.Latency)
	run.random = of(random.IOPS, random.Latency)
	return run, nil
}

// load is the readers, in this process.
func (r *reads) load(ctx context.Context, source io.ReaderAt, request int64) (run mixedRun, err error) {
	ctx, cancel := context.WithTimeout(ctx, r.o.Mixed)
	defer cancel()
	var wg sync.WaitGroup
	took := make([][]time.Duration, mixedSequential+mixedRandom)
	errs := make([]error, len(took))
	for i := range took {
		n, next := request, func(off int64) int64 {
			if off += request; off > r.o.Size-request {
				off = 0
			}
			return off
		}
		off := r.o.Size / mixedSequential * int64(i) / bs * bs
		if i >= mixedSequential {
			rng := rand.New(rand.NewPCG(r.o.Seed, uint64(i)))
			n, off, next = bs, 0, func(int64) int64 { return rng.Int64N(r.o.Size/bs) * bs }
		}
		wg.Go(func() { took[i], errs[i] = reader(ctx, source, n, off, next) })
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		return run, err
	}
	run.all = r.times(slices.Concat(took...))
	run.sequential = r.times(slices.Concat(took[:mixedSequential]...))
	run.random = r.times(slices.Concat(took[mixedSequential:]...))
	return run, nil
}

// reader reads n bytes at a time, from off on where next says, until the time is over, but
// once at least: who got no processor in time has waited, too.
func reader(ctx context.Context, source io.ReaderAt, n, off int64, next func(int64) int64) (took []time.Duration, err error) {
	arena, err := blockio.NewArena(int(n))
	if err != nil {
		return nil, err
	}
	defer arena.Close()
	for {
		start := time.Now()
		if k, err := source.ReadAt(arena.Bytes(), off); k < int(n) {
			return took, fmt.Errorf("read of %d bytes at %d: %w", n, off, err)
		}
		took = append(took, time.Since(start))
		if ctx.Err() != nil {
			return took, nil
		}
		off = next(off)
	}
}

// times sums up the requests of readers.
func (r *reads) times(took []time.Duration) loadTimes {
	p50, p99 := percentiles(took)
	return loadTimes{float64(len(took)) / r.o.Mixed.Seconds(), p50, p99}
}

// mixedResult sums up the runs of a mode.
func (r *reads) mixedResult(mode string, request int64, runs map[string][]mixedRun) MixedResult {
	of := func(value func(m mixedRun) float64) float64 { return Median(runs[mode], value) }
	versus := func(other readahead.Mode, value func(m mixedRun) float64) float64 {
		_, ratio := Compare(runs[mode], runs[string(other)], value)
		return ratio
	}
	allP99 := func(m mixedRun) float64 { return m.all.p99 * 1e6 }
	sequentialP99 := func(m mixedRun) float64 { return m.sequential.p99 * 1e6 }
	randomP99 := func(m mixedRun) float64 { return m.random.p99 * 1e6 }
	return MixedResult{
		Spec: r.o.Spec, Mode: mode, Request: request, Transport: r.transport(), Runs: len(runs[mode]),
		P99:                 of(allP99),
		SequentialMiBPerSec: of(func(m mixedRun) float64 { return m.sequential.perSec * float64(request) / mib }),
		SequentialP50:       of(func(m mixedRun) float64 { return m.sequential.p50 * 1e6 }),
		SequentialP99:       of(sequentialP99),
		RandomPerSec:        of(func(m mixedRun) float64 { return m.random.perSec }),
		RandomP50:           of(func(m mixedRun) float64 { return m.random.p50 * 1e6 }),
		RandomP99:           of(randomP99),

		VersusNone:           versus(readahead.None, allP99),
		VersusSync:           versus(readahead.Sync, allP99),
		SequentialVersusNone: versus(readahead.None, sequentialP99),
		SequentialVersusSync: versus(readahead.Sync, sequentialP99),
		RandomVersusNone:     versus(readahead.None, randomP99),
	}
}

// WriteMixedText writes results for a person to read.
func WriteMixedText(w io.Writer, results []MixedResult) error {
	for i, r := range results {
		if i > 0 && r.Request == results[i-1].Request {
			continue
		}
		fmt.Fprintf(w, "%s: image of %s, ops of up to %s, %s; %d readers in sequence with requests of %s, %d anywhere with 4 KiB, transport %s\n\n",
			r.Workload, humanize.IBytes(uint64(r.Size)), humanize.IBytes(uint64(r.MaxBlock)), r.Compression, mixedSequential,
			humanize.IBytes(uint64(r.Request)), mixedRandom, r.Transport)
		t := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
		fmt.Fprint(t, "\tp99 µs\tx none\tx sync\tseq. MiB/s\tp50 µs\tp99 µs\tx none\tx sync\trandom/s\tp50 µs\tp99 µs\tx none\t\n")
		for _, m := range results[i:] {
			if m.Request == r.Request {
				fmt.Fprintf(t, "%s\t%.0f\t%.2f\t%.2f\t%.0f\t%.0f\t%.0f\t%.2f\t%.2f\t%.0f\t%.0f\t%.0f\t%.2f\t\n", m.Mode, m.P99, m.VersusNone, m.VersusSync, m.SequentialMiBPerSec, m.SequentialP50, m.SequentialP99,
					m.SequentialVersusNone, m.SequentialVersusSync, m.RandomPerSec, m.RandomP50, m.RandomP99, m.RandomVersusNone)
			}
		}
		fmt.Fprintln(t)
		if err := t.Flush(); err != nil {
			return err
		}
	}
	return nil
}
