package bench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"path/filepath"
	"text/tabwriter"
	"time"

	"k8s.io/klog/v2"

	"github.com/snapmerge/snapmerge/pkg/blockio"
	"github.com/snapmerge/snapmerge/pkg/merge"
	"github.com/snapmerge/snapmerge/pkg/volume"
	"github.com/snapmerge/snapmerge/pkg/volume/pacing"
)

// PromotionOptions say how read promotion is measured.
type PromotionOptions struct {
	Spec // of the COW; complete
	// Dir takes the files; it must be there and have none of their names.
	Dir string
	// Hot is how much of the image is read again and again, in bytes: 64 KiB here and
	// there.
	Hot int64
	// Warm is for how long it is read before, Time for how long while it is measured.
	Warm, Time time.Duration
	Floor      int // MiB/s of the merge, which yields to the reads; 0: the default
	Pairs      int // how often everything is measured, in turn
	Note       func(format string, args ...any)
}

// What is compared with PromotionOff: reads with promotion, and PromotionOff once more,
// which shows the noise.
const (
	PromotionOff      = "off"
	PromotionOn       = "on"
	PromotionOffAgain = "off again"
)

// Promotion is what random reads of 4 KiB, one at a time, of a hot set were like while
// its volume merges at its floor. Values are medians, ratios medians of the ratios to
// PromotionOff in the same turn.
type Promotion struct {
	Promotion string  `json:"promotion"`
	Pairs     int     `json:"pairs"`
	IOPS      float64 `json:"iops"`
	P50       float64 `json:"p50_us"`
	P99       float64 `json:"p99_us"`
	FromBase  float64 `json:"from_base"` // part of the bytes read
	Promoted  float64 `json:"promoted_mib"`
	Merged    float64 `json:"merged_mib"` // promoted or in turn

	IOPSRatio float64 `json:"iops_ratio"`
	P50Ratio  float64 `json:"p50_ratio"`
	P99Ratio  float64 `json:"p99_ratio"`
}

// promotion is the state of one call of MeasurePromotion.
type promotion struct {
	o              PromotionOptions
	images         *images
	base, cow, dir string
	hot            []int64 // offsets of 64 KiB
}

const hotBytes = merge.DefaultChunkBlocks * blockio.BlockSize

// MeasurePromotion measures reads of a hot set without and with read promotion.
func MeasurePromotion(ctx context.Context, o PromotionOptions) (_ []Promotion, err error) {
	if o.Dir, err = filepath.Abs(o.Dir); err != nil {
		return nil, err
	}
	m := &promotion{o: o, images: newImages(o.Spec), base: filepath.Join(o.Dir, "base.img"), cow: filepath.Join(o.Dir, "cow.img"), dir: filepath.Join(o.Dir, "volume")}
	made := []string{m.base, m.cow, m.dir}
	if err := wantAbsent(m.images.fs, made...); err != nil {
		return nil, err
	}
	defer func() {
		for _, p := range made {
			err = errors.Join(err, m.images.fs.RemoveAll(p))
		}
	}()
	o.Note("making %s: %d MiB", o.Workload, o.Size/mib)
	if err := m.images.writeCOW(ctx, m.cow); err != nil {
		return nil, err
	}
	for _, i := range rand.New(rand.NewPCG(o.Seed, 1)).Perm(int(o.Size / hotBytes))[:min(o.Hot, o.Size)/hotBytes] {
		m.hot = append(m.hot, int64(i)*hotBytes)
	}
	kinds := []string{PromotionOff, PromotionOn, PromotionOffAgain}
	runs := map[string][]Promotion{}
	for i := range o.Pairs {
		for _, kind := range kinds {
			r, err := m.run(ctx, kind)
			if err != nil {
				return nil, fmt.Errorf("promotion %s: %w", kind, err)
			}
			o.Note("%d of %d, promotion %s: %.0f IOPS, p99 %.0f µs, %.0f %% from the base, %.0f MiB promoted", i+1, o.Pairs, kind, r.IOPS, r.P99, r.FromBase*100, r.Promoted)
			runs[kind] = append(runs[kind], r)
		}
	}
	var out []Promotion
	for _, kind := range kinds {
		out = append(out, sumPromotion(runs[kind], runs[PromotionOff]))
	}
	return out, nil
}

// run makes a fresh volume, reads its hot set while it merges, and measures.
func (m *promotion) run(ctx context.Context, kind string) (r Promotion, err error) {
	fsys := m.images.fs
	if err := m.images.writeBase(ctx, m.base); err != nil {
		return r, err
	}
	defer func() { err = errors.Join(err, fsys.RemoveAll(m.base), fsys.RemoveAll(m.dir)) }()
	spec := volume.Spec{ID: "bench", Size: m.o.Size, Base: m.base, Limits: volume.DefaultLimits, COWs: []volume.COWSource{{Path: m.cow}}}
	if err := volume.Create(fsys, m.dir, spec); err != nil {
		return r, err
	}
	v, err := volume.Open(volume.Config{FS: fsys, Dir: m.dir, IO: blockio.Auto, Pacing: pacing.NewNode(m.o.Dir, m.o.Floor),
		ReadPromotion: kind == PromotionOn, Log: klog.Background()})
	if err != nil {
		return r, err
	}
	defer func() { err = errors.Join(err, v.Close()) }()
	v.Start()
	if _, err := m.read(ctx, v, m.o.Warm); err != nil {
		return r, err
	}
	before := v.Counters()
	took, err := m.read(ctx, v, m.o.Time)
	if err != nil {
		return r, err
	}
	c := v.Counters()
	p50, p99 := percentiles(took)
	return Promotion{
		Promotion: kind, IOPS: float64(len(took)) / m.o.Time.Seconds(), P50: p50 * 1e6, P99: p99 * 1e6,
		FromBase: float64(c.FromBase-before.FromBase) / float64(c.Read.Bytes-before.Read.Bytes),
		Promoted: float64(c.MergePromoted) / mib, Merged: float64(v.Status().BytesDone) / mib,
	}, nil
}

// read reads for that long and returns how long each read took, at least one.
func (m *promotion) read(ctx context.Context, v *volume.Volume, span time.Duration) (took []time.Duration, err error) {
	arena, err := blockio.NewArena(blockio.BlockSize)
	if err != nil {
		return nil, err
	}
	defer arena.Close()
	rng := rand.New(rand.NewPCG(m.o.Seed, uint64(len(m.hot))))
	for start, last := time.Now(), time.Now(); len(took) == 0 || last.Sub(start) < span; {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		off := m.hot[rng.IntN(len(m.hot))] + rng.Int64N(hotBytes/blockio.BlockSize)*blockio.BlockSize
		if _, err := v.ReadAt(arena.Bytes()[:blockio.BlockSize], off); err != nil {
			return nil, err
		}
		now := time.Now()
		took, last = append(took, now.Sub(last)), now
	}
	return took, nil
}

func sumPromotion(runs, off []Promotion) Promotion {
	p := Promotion{Promotion: runs[0].Promotion, Pairs: len(runs)}
	p.IOPS, p.IOPSRatio = Compare(runs, off, func(r Promotion) float64 { return r.IOPS })
	p.P50, p.P50Ratio = Compare(runs, off, func(r Promotion) float64 { return r.P50 })
	p.P99, p.P99Ratio = Compare(runs, off, func(r Promotion) float64 { return r.P99 })
	p.FromBase = Median(runs, func(r Promotion) float64 { return r.FromBase })
	p.Promoted = Median(runs, func(r Promotion) float64 { return r.Promoted })
	p.Merged = Median(runs, func(r Promotion) float64 { return r.Merged })
	return p
}

// WritePromotion writes results for a person to read.
func WritePromotion(w io.Writer, results []Promotion) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprint(t, "promotion\tIOPS\tratio\tp50, µs\tratio\tp99, µs\tratio\tfrom base, %\tpromoted, MiB\tmerged, MiB\t\n")
	for _, r := range results {
		fmt.Fprintf(t, "%s\t%.0f\t%.2f\t%.0f\t%.2f\t%.0f\t%.2f\t%.0f\t%.1f\t%.1f\t\n", r.Promotion, r.IOPS, r.IOPSRatio, r.P50, r.P50Ratio, r.P99, r.P99Ratio,
			r.FromBase*100, r.Promoted, r.Merged)
	}
	return t.Flush()
}
