package nodebench

import (
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/snapmerge/snapmerge/pkg/bench"
)

// Foreground is a load beside one thing. Values are medians of all measurements,
// ratios medians of the ratios to what it is compared with, in the same turn.
type Foreground struct {
	Kind      string `json:"beside"`
	With      string `json:"compared_with"`
	Neighbour bool   `json:"neighbour"` // the merge is of another volume than the load's
	Pairs     int    `json:"pairs"`

	Rate      float64            `json:"rate"` // requests or transactions per second
	RateRatio float64            `json:"rate_ratio"`
	P99       map[string]float64 `json:"p99_us"`
	P99Ratio  map[string]float64 `json:"p99_ratio"`

	Moved float64 `json:"moved_mib_s"` // by the merge, or the stream
	Ended int     `json:"ended"`       // measurements whose merge was over before they were
	// Met says of Merge whether the limits are, which the noise may widen.
	Met *bool `json:"met,omitempty"`
}

// The limits of what a pod may feel of a merge, and what noise is allowed for.
const (
	MostP99   = 1.5
	LeastRate = 0.85
	slack     = 1.15
)

func where(neighbour bool) string {
	if neighbour {
		return " in a neighbour"
	}
	return ""
}

func (f *foreground) results(samples map[string][]sample, neighbour bool) (out []Foreground) {
	for _, k := range kinds {
		list := samples[k.kind]
		if len(list) == 0 {
			continue
		}
		values := func(of func(s sample) float64) (mid, ratio float64) { return bench.Compare(list, samples[k.with], of) }
		r := Foreground{Kind: k.kind, With: k.with, Neighbour: neighbour, Pairs: f.o.Pairs, P99: map[string]float64{}, P99Ratio: map[string]float64{}}
		r.Rate, r.RateRatio = values(func(s sample) float64 { return s.rate })
		for name := range list[0].p99 {
			r.P99[name], r.P99Ratio[name] = values(func(s sample) float64 { return s.p99[name] })
		}
		r.Moved = bench.Median(list, func(s sample) float64 { return s.moved })
		for _, s := range list {
			if s.ended {
				r.Ended++
			}
		}
		out = append(out, r)
	}
	judge(out)
	return out
}

// judge says whether the limits are met.
func judge(results []Foreground) {
	find := func(kind string) *Foreground {
		i := slices.IndexFunc(results, func(r Foreground) bool { return r.Kind == kind })
		return &results[i]
	}
	merge, noise := find(Merge), find(NoMergeAgain)
	met := merge.RateRatio >= min(LeastRate, noise.RateRatio/slack)
	for name, ratio := range merge.P99Ratio {
		met = met && ratio <= max(MostP99, slack*noise.P99Ratio[name])
	}
	merge.Met = &met
}

// text is the times for a note.
func (s sample) text() string {
	var parts []string
	for _, name := range slices.Sorted(maps.Keys(s.p99)) {
		parts = append(parts, fmt.Sprintf("%s %.0f", name, s.p99[name]))
	}
	return strings.Join(parts, ", ")
}

// WriteForeground writes the results of a load for a person to read.
func WriteForeground(w io.Writer, load string, results []Foreground, ended time.Duration) error {
	names := slices.Sorted(maps.Keys(results[0].P99))
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintf(t, "%s beside\tof\ta second\tratio\t", load)
	for _, name := range names {
		fmt.Fprintf(t, "%s p99, µs\tratio\t", name)
	}
	fmt.Fprint(t, "moved, MiB/s\tlimits\t\n")
	for _, r := range results {
		volume, met := "the volume", ""
		if r.Neighbour {
			volume = "a neighbour"
		}
		if r.Met != nil {
			met = map[bool]string{true: "met", false: "not met"}[*r.Met]
		}
		fmt.Fprintf(t, "%s\t%s\t%.0f\t%.2f\t", r.Kind, volume, r.Rate, r.RateRatio)
		for _, name := range names {
			fmt.Fprintf(t, "%.0f\t%.2f\t", r.P99[name], r.P99Ratio[name])
		}
		fmt.Fprintf(t, "%.1f\t%s\t\n", r.Moved, met)
	}
	if err := t.Flush(); err != nil {
		return err
	}
	_, err := fmt.Fprintf(w, "A merge under the load ended after %.1f s.\n", ended.Seconds())
	return err
}
