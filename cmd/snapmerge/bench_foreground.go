package main

import (
	"errors"
	"time"

	"github.com/spf13/cobra"

	"github.com/snapmerge/snapmerge/pkg/bench"
	"github.com/snapmerge/snapmerge/pkg/blockio"
	"github.com/snapmerge/snapmerge/pkg/volume/pacing"
)

func newBenchForeground() *cobra.Command {
	o := bench.ForegroundOptions{Layers: 8, Floor: pacing.DefaultFloor, Time: 3 * time.Second, Pairs: 5}
	o.Workload, o.Seed, o.MaxBlock = bench.Full, 1, 16*blockio.BlockSize
	var (
		transport     string
		asJSON, quiet bool
	)
	c := &cobra.Command{
		Use:   "foreground",
		Short: "Measure what pods feel of a merge",
		Long: `Measure random reads and writes of 4 KiB with a flush after each write (by fio, one
request at a time) on a volume with --layers COWs, through its device: while nothing
is merged, beside a merge that yields to the pods, again while nothing is merged,
which shows the noise, and beside a merge that does not yield. A fresh volume is made
for each. All is done --pairs times in turn; values are medians, ratios medians of the
ratios to the first of the same turn.

With --neighbour the load is on another volume than the merge.

Root only: devices are made. Without --dir files lie in a new directory in TMPDIR, or
else in /tmp.`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) (err error) {
			if err := checkBenchForeground(&o); err != nil {
				return err
			}
			o.Note = benchNote(c, quiet)
			done, err := benchDir(&o.Dir, false)
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, done()) }()
			if o.Transport, err = openTransport(c.Context(), transport, o.Dir); err != nil {
				return err
			}
			results, err := bench.MeasureForeground(c.Context(), o)
			if err != nil {
				return err
			}
			if asJSON {
				return printEach(c.OutOrStdout(), results)
			}
			return bench.WriteForeground(c.OutOrStdout(), results)
		},
	}
	f := c.Flags()
	f.Var(workloadFlag{&o.Workload}, "workload", "what the COWs do, as in bench merge")
	f.Var(bytesFlag{&o.Size}, "size", "size of the volume (default: what the ops need; 1 GiB for full)")
	f.IntVar(&o.Layers, "layers", o.Layers, "COWs above each other, 1 to 100, so that merges last longer than the load")
	f.BoolVar(&o.Neighbour, "neighbour", false, "the load is on a volume beside the one that merges")
	f.Var(rateFlag{&o.Floor}, "merge-floor", "MiB/s that a merge gets done at least while it yields")
	f.DurationVar(&o.Time, "time", o.Time, "of each measurement, whole seconds")
	f.IntVar(&o.Pairs, "pairs", o.Pairs, "how often everything is measured, 1 to 100")
	f.StringVar(&o.Dir, "dir", "", "where the files and volumes lie")
	addTransport(c, &transport)
	addJSON(c, &asJSON)
	addQuiet(c, &quiet)
	return c
}

func checkBenchForeground(o *bench.ForegroundOptions) error {
	if err := o.Complete(); err != nil {
		return wrong("%v", err)
	}
	switch {
	case o.Layers < 1 || o.Layers > 100:
		return wrong("--layers %d is not 1 to 100", o.Layers)
	case o.Pairs < 1 || o.Pairs > 100:
		return wrong("--pairs %d is not 1 to 100", o.Pairs)
	case o.Time < time.Second || o.Time%time.Second != 0 || o.Time > time.Hour:
		return wrong("--time %v is not 1s to 1h in whole seconds", o.Time)
	case o.Floor < 1:
		return wrong("--merge-floor %d is not at least 1", o.Floor)
	}
	return nil
}
