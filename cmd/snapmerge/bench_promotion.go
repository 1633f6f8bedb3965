package main

import (
	"errors"
	"time"

	"github.com/spf13/cobra"

	"github.com/snapmerge/snapmerge/pkg/bench"
	"github.com/snapmerge/snapmerge/pkg/blockio"
	"github.com/snapmerge/snapmerge/pkg/volume/pacing"
)

func newBenchPromotion() *cobra.Command {
	o := bench.PromotionOptions{Hot: 16 << 20, Warm: 10 * time.Second, Time: 3 * time.Second, Floor: pacing.DefaultFloor, Pairs: 5}
	var asJSON, quiet bool
	c := &cobra.Command{
		Use:   "promotion",
		Short: "Measure reads of a hot set without and with read promotion",
		Long: `Read 4 KiB at random places of a hot set, one request at a time, while the volume
merges at its floor because of that: without read promotion, with it, and without it
once more, which shows the noise. The hot set is read for --warm before the time is
taken. A fresh volume is made for each. All is done --pairs times in turn; values are
medians, ratios medians of the ratios to the first of the same turn.

The volume is read by the code that serves devices, without one. Without --dir files
lie in a new directory in TMPDIR, or else in /tmp.`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) (err error) {
			if err := o.Complete(); err != nil {
				return wrong("%v", err)
			}
			switch {
			case o.Pairs < 1 || o.Pairs > 100:
				return wrong("--pairs %d is not 1 to 100", o.Pairs)
			case o.Time <= 0 || o.Time > time.Hour || o.Warm < 0 || o.Warm > time.Hour:
				return wrong("--time and --warm are at most 1h")
			case o.Hot < 16*blockio.BlockSize:
				return wrong("--hot is at least 64KiB")
			case o.Floor < 1:
				return wrong("--merge-floor %d is not at least 1", o.Floor)
			}
			o.Note = benchNote(c, quiet)
			done, err := benchDir(&o.Dir, false)
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, done()) }()
			results, err := bench.MeasurePromotion(c.Context(), o)
			if err != nil {
				return err
			}
			if asJSON {
				return printEach(c.OutOrStdout(), results)
			}
			return bench.WritePromotion(c.OutOrStdout(), results)
		},
	}
	f := c.Flags()
	o.Workload, o.Size, o.MaxBlock = bench.Full, 512<<20, 16*blockio.BlockSize
	f.Var(workloadFlag{&o.Workload}, "workload", "what the COW does, as in bench merge")
	f.Var(bytesFlag{&o.Size}, "size", "size of the image")
	f.Int64Var(&o.Ops, "ops", 0, "blocks that change, for full: replace ops (default: as for bench merge)")
	f.Uint64Var(&o.Seed, "seed", 1, "the same seed makes the same files")
	f.StringVar(&o.Compression, "compression", bench.DefaultCompression, "none, gz, lz4 or zstd, with \",LEVEL\" if not the default")
	f.Var(bytesFlag{&o.MaxBlock}, "max-block", "largest replace op, 4KiB to 256KiB")
	f.Var(bytesFlag{&o.Hot}, "hot", "how much is read again and again")
	f.DurationVar(&o.Warm, "warm", o.Warm, "how long it is read before")
	f.DurationVar(&o.Time, "time", o.Time, "of each measurement")
	f.Var(rateFlag{&o.Floor}, "merge-floor", "MiB/s that a merge gets done at least while it yields")
	f.IntVar(&o.Pairs, "pairs", o.Pairs, "how often everything is measured, 1 to 100")
	f.StringVar(&o.Dir, "dir", "", "where to make files")
	addJSON(c, &asJSON)
	addQuiet(c, &quiet)
	return c
}
