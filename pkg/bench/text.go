package bench

import (
	"fmt"
	"io"
	"text/tabwriter"

	"github.com/dustin/go-humanize"
)

// WriteText writes results for a person to read.
func WriteText(w io.Writer, results []Result) error {
	if len(results) == 0 {
		return nil
	}
	r := results[0]
	progress := "journal"
	if r.InPlace {
		progress = "in place"
	}
	fmt.Fprintf(w, "%s: %d ops, %s of the base written, image of %s, COW of %s (%s), %s, windows of %s; every byte is as expected\n\n",
		r.Workload, r.MergeResult.Ops, humanize.IBytes(r.Blocks*bs), humanize.IBytes(uint64(r.Size)), humanize.IBytes(uint64(r.COWBytes)), r.Compression,
		progress, humanize.IBytes(uint64(r.WindowBytes)))
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprint(t, "\tseconds\tmin\tmax\tratio\tflushes\tscratch\tread\tcpu s\tswitches\tpeak RSS\t\n")
	for _, r := range results {
		fmt.Fprintf(t, "snapmerge %s\t%.3f\t%.3f\t%.3f\t\t%d\t%s\t%s\t%.2f\t%d\t%s\t\n", r.IO, r.Seconds, r.SecondsMin, r.SecondsMax,
			r.Flushes, humanize.IBytes(r.ScratchBytes), humanize.IBytes(r.BytesRead), r.CPUSeconds, r.ContextSwitches, humanize.IBytes(uint64(r.PeakRSS)))
		if r.FloorSeconds > 0 {
			fmt.Fprintf(t, "floor\t%.3f\t%.3f\t%.3f\t%.2f\t\t\t\t\t\t\t\n", r.FloorSeconds, r.FloorSecondsMin, r.FloorSecondsMax, r.FloorRatio)
		}
		if r.QemuSeconds > 0 {
			fmt.Fprintf(t, "qemu-img\t%.3f\t%.3f\t%.3f\t%.2f\t\t\t\t\t\t\t\n", r.QemuSeconds, r.QemuSecondsMin, r.QemuSecondsMax, r.QemuRatio)
		}
	}
	if err := t.Flush(); err != nil {
		return err
	}
	for _, r := range results {
		if r.Scaling > 0 {
			fmt.Fprintf(w, "\n%s: %.3f s on one processor, all are %.2f times as fast; bare unpacking %.2f times: ratio %.2f\n",
				r.IO, r.OneProcessorSeconds, r.Scaling, r.BareScaling, r.ScalingRatio)
		}
	}
	return nil
}
