package main

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"

	"github.com/snapmerge/snapmerge/pkg/bench"
	"github.com/snapmerge/snapmerge/pkg/blockio"
	"github.com/snapmerge/snapmerge/pkg/transport/choose"
)

// noTransport is for reading a volume without a device.
const noTransport = "none"

func newBenchRead() *cobra.Command {
	var (
		o             = bench.ReadOptions{Requests: []int64{4 << 10, 128 << 10}}
		through       = noTransport
		asJSON, quiet bool
	)
	c := &cobra.Command{
		Use:   "read",
		Short: "Measure sequential reads of a volume that is not merged yet",
		Long: `Make a base and a COW, put them together to a volume that is not merged, and read
it from the first byte to the last, one request at a time: without read-ahead, with
the two modes of read-ahead, then the same data in a volume without layers, that with
its base read ahead, and without read-ahead once more, which shows the noise. Caches are dropped before each
(all of them as root, else those of the files). Every byte is checked, not while the
time is taken. Exit code 4: there is a difference.

"x none" is the speed divided by that without read-ahead in the same run, and so
on; medians over --runs. The workloads are those of bench merge.

With --mixed it is not read once from end to end, but for that time by 8 readers in
sequence and 4 that read blocks of 4 KiB anywhere; what is said is how long requests
took, "x" are ratios of the p99, and nothing is compared.

With --transport the volume's device is read, with direct I/O, by fio, which has to be
installed; without it the volume itself, by the code that serves devices. Without
--dir files lie in a new directory in TMPDIR, or else in /tmp.`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			if o.Runs < 1 || o.Runs > 100 {
				return wrong("--runs %d is not 1 to 100", o.Runs)
			}
			if o.Mixed != 0 && (o.Mixed < 10*time.Millisecond || o.Mixed > time.Hour) {
				return wrong("--mixed %v is not 10ms to 1h", o.Mixed)
			}
			if err := o.Complete(); err != nil {
				return wrong("%v", err)
			}
			o.Note = benchNote(c, quiet)
			done, err := benchDir(&o.Dir, false)
			if err != nil {
				return err
			}
			if through != noTransport {
				t, terr := openTransport(c.Context(), through, o.Dir)
				if terr != nil {
					return errors.Join(terr, done())
				}
				o.Transport = t
			}
			if o.Mixed > 0 {
				results, err := bench.MeasureMixed(c.Context(), o)
				if err = errors.Join(err, done()); err != nil {
					return err
				}
				if asJSON {
					return printEach(c.OutOrStdout(), results)
				}
				return bench.WriteMixedText(c.OutOrStdout(), results)
			}
			results, err := bench.Read(c.Context(), o)
			if err = errors.Join(err, done()); err != nil {
				return err
			}
			if asJSON {
				return printEach(c.OutOrStdout(), results)
			}
			return bench.WriteReadText(c.OutOrStdout(), results)
		},
	}
	f := c.Flags()
	o.Workload = bench.Full
	f.Var(workloadFlag{&o.Workload}, "workload", "what the COW does; see bench merge --help")
	o.Size = 256 << 20
	f.Var(bytesFlag{&o.Size}, "size", "size of the image")
	f.Int64Var(&o.Ops, "ops", 0, "blocks that change, for full: replace ops (default: as for bench merge)")
	f.Uint64Var(&o.Seed, "seed", 1, "the same seed makes the same files")
	f.StringVar(&o.Compression, "compression", bench.DefaultCompression, "none, gz, lz4 or zstd, with \",LEVEL\" if not the default")
	o.MaxBlock = 64 << 10
	f.Var(bytesFlag{&o.MaxBlock}, "max-block", "largest replace op, 4KiB to 256KiB")
	f.Var(sizeList{&o.Requests}, "request", "lengths of the requests, each measured, with commas between")
	addReadAheadSizes(c, &o.ReadAhead)
	f.Var(&choice{&through, append([]string{noTransport, choose.Auto}, choose.Names()...)}, "transport", "read the volume's device, made by this transport; none: the volume itself")
	f.DurationVar(&o.Mixed, "mixed", 0, "load it with many readers for that time instead, 10ms at least")
	f.IntVar(&o.Runs, "runs", 1, "how often everything is measured, in turn, 1 to 100")
	f.StringVar(&o.Dir, "dir", "", "where to make files")
	addJSON(c, &asJSON)
	addQuiet(c, &quiet)
	return c
}

// sizeList is one size of whole sectors or some.
type sizeList struct{ value *[]int64 }

func (l sizeList) Type() string { return "SIZE[,SIZE]" }

func (l sizeList) String() string {
	var names []string
	for _, n := range *l.value {
		names = append(names, strings.ReplaceAll(humanize.IBytes(uint64(n)), " ", ""))
	}
	return strings.Join(names, ",")
}

func (l sizeList) Set(s string) error {
	var list []int64
	for part := range strings.SplitSeq(s, ",") {
		n, err := parseBytes(part)
		if err != nil {
			return err
		}
		if n < blockio.SectorSize || n%blockio.SectorSize != 0 || n > 64<<20 || slices.Contains(list, n) {
			return fmt.Errorf("%q: want different multiples of %d up to 64 MiB", s, blockio.SectorSize)
		}
		list = append(list, n)
	}
	*l.value = list
	return nil
}
