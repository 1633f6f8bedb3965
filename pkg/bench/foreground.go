package bench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"text/tabwriter"
	"time"

	"k8s.io/klog/v2"

	"github.com/snapmerge/snapmerge/pkg/blockio"
	"github.com/snapmerge/snapmerge/pkg/merge"
	"github.com/snapmerge/snapmerge/pkg/transport"
	"github.com/snapmerge/snapmerge/pkg/volume"
	"github.com/snapmerge/snapmerge/pkg/volume/pacing"
)

// ForegroundOptions say what a pod's load on a volume is measured beside.
type ForegroundOptions struct {
	// Spec is of the COW that is merged; complete. There are Layers of it, one above
	// the other, so that a merge lasts for as long as it is looked at.
	Spec
	Layers int
	// Dir takes the files; it must be there and have none of their names.
	Dir       string
	Transport transport.Transport
	// Neighbour has the load on one volume and the merge in another; else it is one
	// volume.
	Neighbour bool
	Floor     int           // MiB/s of a merge that yields; 0: the default
	Time      time.Duration // of one slice; whole seconds
	Pairs     int           // how often everything is measured, in turn
	Note      func(format string, args ...any)
}

// The merges that a load is measured beside. Everything is compared with NoMerge, and
// so is that itself, once more: what is found there is noise.
const (
	NoMerge      = "none"
	NoMergeAgain = "none again"
	PacedMerge   = "paced"
	UnpacedMerge = "unpaced"
)

// Foreground is a load of random reads and writes of 4 KiB, a flush after each write,
// one request at a time. Values are medians of all slices, ratios medians of the ratios
// to NoMerge in the same turn.
type Foreground struct {
	Merge     string  `json:"merge"`
	Neighbour bool    `json:"neighbour"`
	Pairs     int     `json:"pairs"`
	Seconds   float64 `json:"seconds"` // of a slice
	IOPS      float64 `json:"iops"`    // reads and writes
	ReadP99   float64 `json:"read_p99_us"`
	WriteP99  float64 `json:"write_p99_us"`
	FlushP99  float64 `json:"flush_p99_us"`

	IOPSRatio     float64 `json:"iops_ratio"`
	ReadP99Ratio  float64 `json:"read_p99_ratio"`
	WriteP99Ratio float64 `json:"write_p99_ratio"`
	FlushP99Ratio float64 `json:"flush_p99_ratio"`

	MergeRate float64 `json:"merge_mib_s"`
	// Ended counts the slices whose merge was over before they were: their load was
	// beside no merge for a part of the time.
	Ended int `json:"ended"`
}

// foreground is the state of one call of MeasureForeground.
type foreground struct {
	o         ForegroundOptions
	images    *images
	base, cow string
	quiet     string // base of the volume beside which another is merged
}

// MeasureForeground measures a load on a volume without a merge, and beside merges
// that yield and that don't.
func MeasureForeground(ctx context.Context, o ForegroundOptions) (_ []Foreground, err error) {
	if err := FindFio(); err != nil {
		return nil, err
	}
	if o.Dir, err = filepath.Abs(o.Dir); err != nil {
		return nil, err
	}
	f := &foreground{o: o, images: newImages(o.Spec), base: filepath.Join(o.Dir, "base.img"), cow: filepath.Join(o.Dir, "cow.img"),
		quiet: filepath.Join(o.Dir, "quiet.img")}
	made := []string{f.base, f.cow, f.quiet, f.dir("load"), f.dir("merge")}
	if err := wantAbsent(f.images.fs, made...); err != nil {
		return nil, err
	}
	defer func() {
		for _, p := range made {
			err = errors.Join(err, f.images.fs.RemoveAll(p))
		}
	}()
	o.Note("making %s: %d MiB, %d layers", o.Workload, o.Size/mib, o.Layers)
	if err := errors.Join(f.images.writeCOW(ctx, f.cow), f.images.writeBase(ctx, f.base)); err != nil {
		return nil, err
	}
	if o.Neighbour {
		if err := f.images.writeBase(ctx, f.quiet); err != nil {
			return nil, err
		}
	}
	return f.measure(ctx)
}

func (f *foreground) dir(name string) string { return filepath.Join(f.o.Dir, name) }

func (f *foreground) measure(ctx context.Context) ([]Foreground, error) {
	// The order has either merge beside a slice without one.
	kinds := []string{NoMerge, PacedMerge, NoMergeAgain, UnpacedMerge}
	slices := map[string][]slice{}
	for i := range f.o.Pairs {
		for _, kind := range kinds {
			s, err := f.slice(ctx, kind)
			if err != nil {
				return nil, fmt.Errorf("load with merge %s: %w", kind, err)
			}
			f.o.Note("%d of %d, merge %s: %.0f IOPS, p99 of flushes %.0f µs, merged %.1f MiB/s", i+1, f.o.Pairs, kind, s.IOPS, s.Flush, s.merged)
			slices[kind] = append(slices[kind], s)
		}
	}
	var out []Foreground
	for _, kind := range kinds {
		out = append(out, f.result(kind, slices[kind], slices[NoMerge]))
	}
	return out, nil
}

func (f *foreground) result(kind string, list, without []slice) Foreground {
	r := Foreground{Merge: kind, Neighbour: f.o.Neighbour, Pairs: f.o.Pairs, Seconds: f.o.Time.Seconds()}
	for _, s := range list {
		if s.ended {
			r.Ended++
		}
	}
	r.IOPS, r.IOPSRatio = Compare(list, without, func(s slice) float64 { return s.IOPS })
	r.ReadP99, r.ReadP99Ratio = Compare(list, without, func(s slice) float64 { return s.Read })
	r.WriteP99, r.WriteP99Ratio = Compare(list, without, func(s slice) float64 { return s.Write })
	r.FlushP99, r.FlushP99Ratio = Compare(list, without, func(s slice) float64 { return s.Flush })
	r.MergeRate = Median(list, func(s slice) float64 { return s.merged })
	return r
}

// slice is one run of the load.
type slice struct {
	FioLoad
	merged float64 // MiB/s
	ended  bool
}

// slice makes a fresh volume, serves it, and measures.
func (f *foreground) slice(ctx context.Context, kind string) (s slice, err error) {
	var node *pacing.Node
	if kind == PacedMerge {
		node = pacing.NewNode(f.o.Dir, f.o.Floor)
	}
	merging, closeMerging, err := f.open("merge", f.base, f.o.Layers, node)
	if err != nil {
		return s, err
	}
	defer func() { err = errors.Join(err, closeMerging()) }()
	loaded := merging
	if f.o.Neighbour {
		v, closeLoaded, err := f.open("load", f.quiet, 0, node)
		if err != nil {
			return s, err
		}
		defer func() { err = errors.Join(err, closeLoaded()) }()
		loaded = v
	}
	dev, err := f.o.Transport.Create(ctx, loaded.ID(), loaded, transport.Options{})
	if err != nil {
		return s, err
	}
	defer func() {
		merging.Stop()
		err = errors.Join(err, dev.Close(context.WithoutCancel(ctx)))
	}()
	if kind == PacedMerge || kind == UnpacedMerge {
		merging.Start()
	}
	begin := time.Now()
	if s.FioLoad, err = Fio(ctx, dev.Path(), 0, f.o.Time); err != nil {
		return s, err
	}
	st := merging.Status()
	s.merged, s.ended = float64(st.BytesDone)/mib/time.Since(begin).Seconds(), st.BytesDone == st.BytesTotal
	return s, nil
}

// open makes a volume over a base, which may be used again after done.
func (f *foreground) open(name, base string, layers int, node *pacing.Node) (v *volume.Volume, done func() error, err error) {
	fsys := blockio.OS()
	spec := volume.Spec{ID: "bench-" + name, Size: f.o.Size, Base: base, Limits: volume.DefaultLimits}
	for range layers {
		spec.COWs = append(spec.COWs, volume.COWSource{Path: f.cow})
	}
	if err := volume.Create(fsys, f.dir(name), spec); err != nil {
		return nil, nil, err
	}
	v, err = volume.Open(volume.Config{FS: fsys, Dir: f.dir(name), IO: blockio.Auto, Pacing: node, Log: klog.Background()})
	if err != nil {
		return nil, nil, errors.Join(err, fsys.RemoveAll(f.dir(name)))
	}
	return v, func() error {
		err := errors.Join(v.Close(), fsys.RemoveAll(f.dir(name)))
		b, oerr := fsys.Open(base, 0)
		if oerr != nil {
			return errors.Join(err, oerr)
		}
		return errors.Join(err, merge.ReleaseBase(b), b.Close())
	}, nil
}

// WriteForeground writes results for a person to read.
func WriteForeground(w io.Writer, results []Foreground) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprint(t, "merge\tIOPS\tratio\tread p99, µs\tratio\twrite p99, µs\tratio\tflush p99, µs\tratio\tmerged, MiB/s\t\n")
	for _, r := range results {
		fmt.Fprintf(t, "%s\t%.0f\t%.2f\t%.0f\t%.2f\t%.0f\t%.2f\t%.0f\t%.2f\t%.1f\t\n", r.Merge, r.IOPS, r.IOPSRatio, r.ReadP99, r.ReadP99Ratio,
			r.WriteP99, r.WriteP99Ratio, r.FlushP99, r.FlushP99Ratio, r.MergeRate)
	}
	return t.Flush()
}
