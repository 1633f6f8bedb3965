package bench

import (
	"fmt"
	"io"
	"text/tabwriter"

	"github.com/dustin/go-humanize"
)

// WriteReadText writes results for a person to read.
func WriteReadText(w io.Writer, results []ReadResult) error {
	for i, r := range results {
		if i > 0 && r.Request == results[i-1].Request {
			continue
		}
		fmt.Fprintf(w, "%s: image of %s, ops of up to %s, %s; requests of %s, transport %s; every byte is as expected\n\n",
			r.Workload, humanize.IBytes(uint64(r.Size)), humanize.IBytes(uint64(r.MaxBlock)), r.Compression, humanize.IBytes(uint64(r.Request)), r.Transport)
		t := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
		fmt.Fprint(t, "\tMiB/s\tseconds\tmin\tmax\tp50 µs\tp99 µs\tx none\tx sync\tx merged\t\n")
		for _, m := range results[i:] {
			if m.Request == r.Request {
				fmt.Fprintf(t, "%s\t%.0f\t%.3f\t%.3f\t%.3f\t%.0f\t%.0f\t%.2f\t%.2f\t%.2f\t\n", m.Mode, m.MiBPerSec, m.Seconds, m.SecondsMin, m.SecondsMax,
					m.P50, m.P99, m.VersusNone, m.VersusSync, m.VersusMerged)
			}
		}
		fmt.Fprintln(t)
		if err := t.Flush(); err != nil {
			return err
		}
	}
	return nil
}
