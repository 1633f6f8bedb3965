package main

import (
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"

	"github.com/snapmerge/snapmerge/pkg/bench"
	"github.com/snapmerge/snapmerge/pkg/blockio"
	"github.com/snapmerge/snapmerge/pkg/nodebench"
)

func newBenchMemory() *cobra.Command {
	o := nodebench.MemoryOptions{Volumes: 50, Time: 30 * time.Second, Args: []string{"--read-ahead", "async"}}
	o.Workload, o.Size, o.Ops, o.Seed, o.MaxBlock = bench.Incremental, 10<<30, 100000, 1, blockio.BlockSize
	var (
		snapshots     = "both"
		limit         int64
		args          []string
		asJSON, quiet bool
	)
	c := &cobra.Command{
		Use:   "memory",
		Short: "Measure the memory of a node with many volumes",
		Long: `Start a keeper and a node plugin with asynchronous read-ahead, restore --volumes
volumes at once, of one snapshot and of as many different ones, put them all into
service as block devices, and tell how much memory the two processes had resident at
the most: until all were there, while all were read in sequence and written at
random for --time, and while nothing but the merges went on for as long. The
snapshots change --ops blocks of each volume, as in bench merge --workload.

Root only: devices are made. Files lie in a new directory in TMPDIR, or else in
/tmp: some 100 MiB for each volume, and what is merged.`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) (err error) {
			if err := checkBenchMemory(&o); err != nil {
				return err
			}
			if o.Binary, err = os.Executable(); err != nil {
				return err
			}
			o.Note, o.Args = benchNote(c, quiet), append(o.Args, args...)
			done, err := benchDir(&o.Dir, false)
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, done()) }()
			var results []nodebench.Memory
			for _, different := range map[string][]bool{"one": {false}, "different": {true}, "both": {false, true}}[snapshots] {
				o.Different = different
				r, err := nodebench.MeasureMemory(c.Context(), o)
				if err != nil {
					return err
				}
				results = append(results, r)
			}
			if asJSON {
				err = printEach(c.OutOrStdout(), results)
			} else {
				err = nodebench.WriteMemory(c.OutOrStdout(), results)
			}
			for _, r := range results {
				if limit > 0 && r.Total > limit {
					err = errors.Join(err, fmt.Errorf("%s resident, more than %s", humanize.IBytes(uint64(r.Total)), humanize.IBytes(uint64(limit))))
				}
			}
			return err
		},
	}
	f := c.Flags()
	f.IntVar(&o.Volumes, "volumes", o.Volumes, "volumes that are staged at once, 1 to 1000")
	f.Var(&choice{&snapshots, []string{"one", "different", "both"}}, "snapshots", "what the volumes are restored from: one, different, or first one and then different")
	f.Var(workloadFlag{&o.Workload}, "workload", "what the snapshots' COWs do, as in bench merge")
	f.Var(bytesFlag{&o.Size}, "size", "size of each volume")
	f.Int64Var(&o.Ops, "ops", o.Ops, "blocks of each volume that change")
	f.DurationVar(&o.Time, "time", o.Time, "of the load, and of the merges without it, 1s to 1h")
	f.Var(bytesFlag{&limit}, "limit", "fail if it is more than that (default: no limit)")
	f.StringArrayVar(&args, "node-arg", nil, "another argument for snapmerge node, such as --merge-concurrency=0; may be repeated")
	f.StringVar(&o.Dir, "dir", "", "where the files lie")
	addJSON(c, &asJSON)
	addQuiet(c, &quiet)
	return c
}

func checkBenchMemory(o *nodebench.MemoryOptions) error {
	if err := o.Complete(); err != nil {
		return wrong("%v", err)
	}
	switch {
	case o.Volumes < 1 || o.Volumes > 1000:
		return wrong("--volumes %d is not 1 to 1000", o.Volumes)
	case o.Time < time.Second || o.Time > time.Hour:
		return wrong("--time %v is not 1s to 1h", o.Time)
	}
	return nil
}
