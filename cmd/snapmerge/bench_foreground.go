package main

import (
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/spf13/cobra"

	"github.com/snapmerge/snapmerge/pkg/bench"
	"github.com/snapmerge/snapmerge/pkg/blockio"
	"github.com/snapmerge/snapmerge/pkg/nodebench"
	"github.com/snapmerge/snapmerge/pkg/volume/pacing"
)

func newBenchForeground() *cobra.Command {
	o := bench.ForegroundOptions{Layers: 8, Floor: pacing.DefaultFloor, Time: 3 * time.Second, Pairs: 5}
	o.Workload, o.Seed, o.MaxBlock = bench.Full, 1, 16*blockio.BlockSize
	var (
		transport     string
		load          = deviceLoad
		peer          = "on"
		asJSON, quiet bool
	)
	pods := nodebench.ForegroundOptions{Fill: 2 << 30}
	c := &cobra.Command{
		Use:   "foreground",
		Short: "Measure what pods feel of a merge",
		Long: `With --load fio or pgbench, start a keeper and a node plugin, and measure the load in
the file system of a volume that was just restored: while nothing is merged, while
that volume is merged, and again while nothing is merged, which shows the noise; then
on a volume whose neighbour is merged. Beside that the same on disks of
qemu-storage-daemon, without and with block-stream. All is done --pairs times in turn;
values are medians, ratios medians of the ratios to the first of the same turn. At last
a volume is merged to its end while the load goes on. fio reads and writes 4 KiB at
random places of a file, with fsync after each write; pgbench runs its default
transactions on PostgreSQL. Limits are 1.5 times the p99 latency and 0.85 of the
rate, or 1.15 times the noise.

With --load device measure random reads and writes of 4 KiB with a flush after each write (by fio, one
request at a time) on a volume with --layers COWs, through its device: while nothing
is merged, beside a merge that yields to the pods, again while nothing is merged,
which shows the noise, and beside a merge that does not yield. A fresh volume is made
for each. All is done --pairs times in turn; values are medians, ratios medians of the
ratios to the first of the same turn.

With --neighbour the load is on another volume than the merge.

--fill, --peer and --node-arg are for fio and pgbench, --workload, --layers,
--neighbour and --transport for device.

Root only: devices are made. Without --dir files lie in a new directory in TMPDIR, or
else in /tmp.`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) (err error) {
			if err := checkBenchForeground(&o); err != nil {
				return err
			}
			if load != deviceLoad {
				pods.Load, pods.Size, pods.Time, pods.Pairs, pods.Peer = load, pods.Fill+nodebench.MinSize, o.Time, o.Pairs, peer == "on"
				pods.Dir, pods.Note = o.Dir, benchNote(c, quiet)
				pods.Args = append(pods.Args, fmt.Sprintf("--merge-floor=%d", o.Floor))
				return runBenchPods(c, pods, asJSON)
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
	f.Var(&choice{&load, append([]string{deviceLoad}, nodebench.Loads...)}, "load", "what reads and writes: fio on the device of a volume in this process, or fio or pgbench in the file system of a volume of a node plugin")
	f.Var(bytesFlag{&pods.Fill}, "fill", "how much there is to be merged beyond what the load works on")
	f.Var(&choice{&peer, []string{"on", "off"}}, "peer", "measure qemu-storage-daemon, too")
	f.StringArrayVar(&pods.Args, "node-arg", nil, "another argument for snapmerge node, such as --merge-pacing=off; may be repeated")
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

// deviceLoad is the load of pkg/bench.
const deviceLoad = "device"

// runBenchPods measures with a node plugin.
func runBenchPods(c *cobra.Command, o nodebench.ForegroundOptions, asJSON bool) (err error) {
	if o.Binary, err = os.Executable(); err != nil {
		return err
	}
	temporary := o.Dir == ""
	done, err := benchDir(&o.Dir, false)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, done()) }()
	if temporary { // another user's load has to get through
		if err := os.Chmod(o.Dir, 0o711); err != nil {
			return err
		}
	}
	results, ended, err := nodebench.MeasureForeground(c.Context(), o)
	switch {
	case err != nil:
		return err
	case asJSON:
		return printEach(c.OutOrStdout(), results)
	}
	return nodebench.WriteForeground(c.OutOrStdout(), o.Load, results, ended)
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
