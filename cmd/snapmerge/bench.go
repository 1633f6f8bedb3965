package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"

	"github.com/snapmerge/snapmerge/pkg/bench"
	"github.com/snapmerge/snapmerge/pkg/blockio"
	"github.com/snapmerge/snapmerge/pkg/merge"
)

func newBench() *cobra.Command {
	c := &cobra.Command{
		Use:   "bench",
		Short: "Measure, reproducibly",
		Args:  cobra.NoArgs,
		RunE:  needsSubcommand,
	}
	c.AddCommand(newBenchMerge(), newBenchRead(), newBenchForeground(), newBenchPromotion(), newBenchMemory(), newBenchTable())
	return c
}

func newBenchMerge() *cobra.Command {
	var (
		o             = bench.MergeOptions{Runs: 1, IO: []blockio.Kind{blockio.Auto}}
		readAhead     = "on"
		compare       string
		asJSON, quiet bool
	)
	c := &cobra.Command{
		Use:   "merge --workload W",
		Short: "Measure merges of made-up COWs, every byte checked",
		Long: `Make a base, a COW and the image that must come of them, merge, compare every
byte, and print how long the merge took, from the opening to the last commit
being durable. Caches are dropped before (all of them as root, else those of the
files). Exit code 4: the merged base is not the expected image.

Workloads:
  copyshift       blocks move up by --distance, from the highest on
  copyshift-down  blocks move down by --distance, from the lowest on
  incremental     extents all over the image: 60 % copied, 15 % xor, 20 % replaced,
                  5 % zeroed
  full            the whole image replaced by ops of --max-block
  randcopy        blocks copied from random places to random other places

--floor measures plain loops that read, log and write the same bytes with windows
of the same size and as many flushes. --compare qemu-img measures qemu-img commit
of the same changed blocks with a flush at the end. Ratios are ours divided by
theirs, medians over --runs, for which all is run in turn. --scaling measures how
much faster all processors are than one, for the merge and for a bare loop that
unpacks the same data.

Without --dir files lie in a new directory in TMPDIR, or else in /tmp.`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			o.NoReadAhead, o.QemuImg = readAhead == "off", compare != ""
			for _, name := range []string{"ops", "distance"} {
				if f := c.Flags().Lookup(name); f.Changed && f.Value.String() == "0" { // else it would stand for the default
					return wrong("--%s is 0", name)
				}
			}
			if err := checkBenchMerge(&o); err != nil {
				return err
			}
			o.Note = benchNote(c, quiet)
			done, err := benchDir(&o.Dir, o.Keep || o.GenerateOnly)
			if err != nil {
				return err
			}
			results, err := bench.Merge(c.Context(), o)
			if errors.Is(err, bench.ErrReuse) {
				err = wrong("%v", err)
			}
			if err = errors.Join(err, done()); err != nil {
				return err
			}
			return printBenchMerge(c.OutOrStdout(), o, results, asJSON)
		},
	}
	f := c.Flags()
	f.Var(workloadFlag{&o.Workload}, "workload", "what the COW does (see above)")
	f.Var(bytesFlag{&o.Size}, "size", "size of the image (default: what the ops need; 2 GiB for incremental, else 1 GiB)")
	f.Int64Var(&o.Ops, "ops", 0, "blocks that change, for full: replace ops (default: 235000 for shifts, 300 of 2048 for incremental, a quarter for randcopy, all for full)")
	f.Int64Var(&o.Distance, "distance", 0, "how far shifts move, in blocks (default 1)")
	f.Uint64Var(&o.Seed, "seed", 1, "the same seed makes the same files")
	f.IntVar(&o.Format, "format", bench.DefaultFormat, "version of the COW format, 2 or 3")
	f.StringVar(&o.Compression, "compression", bench.DefaultCompression, "none, gz, lz4 or zstd, with \",LEVEL\" if not the default")
	o.MaxBlock = blockio.BlockSize
	f.Var(bytesFlag{&o.MaxBlock}, "max-block", "largest replace op, 4KiB to 256KiB")
	f.StringVar(&o.Dir, "dir", "", "where to make base.img, cow.img and expected.img")
	f.Var(ioList{&o.IO}, "io", "back ends for I/O on the base, each measured: uring, sync, auto, or some with commas between")
	f.Var(&choice{&readAhead, []string{"on", "off"}}, "read-ahead", "off: no scratch space, windows cut wherever redoing one would be unsafe")
	f.BoolVar(&o.Reflink, "reflink", false, reflinkUsage)
	f.BoolVar(&o.InPlace, "in-place", false, "keep progress in (a copy of) the COW, windows of 2 MiB")
	o.Window = merge.DefaultWindowBlocks * blockio.BlockSize
	f.Var(bytesFlag{&o.Window}, "window", fmt.Sprintf("most data of a merge window: %s to %s", humanize.IBytes(minWindow), humanize.IBytes(maxWindow)))
	f.Var(rateFlag{&o.Rate}, "rate", "most MiB/s to write to the base; 0: no limit")
	f.DurationVar(&o.FlushDelay, "flush-delay", 0, "makes every flush take so much longer, such as 5ms")
	f.IntVar(&o.Runs, "runs", 1, "how often everything is measured, 1 to 100")
	f.BoolVar(&o.Floor, "floor", false, "measure plain loops too")
	f.BoolVar(&o.Scaling, "scaling", false, "measure on one processor too, and a bare loop that unpacks the same data")
	f.Var(&choice{&compare, []string{"qemu-img"}}, "compare", "measure this tool too: qemu-img")
	f.Var(bytesFlag{&o.QemuCluster}, "qemu-cluster", "cluster size for qemu-img, 4KiB to 2MiB (default: 4KiB for incremental and randcopy, else 64KiB)")
	f.BoolVar(&o.GenerateOnly, "generate-only", false, "make the files in --dir, keep them and stop")
	f.BoolVar(&o.Keep, "keep", false, "keep base, COW and expected image")
	f.BoolVar(&o.Reuse, "reuse", false, "take COW and expected image that --keep or --generate-only left in --dir for the same workload; the base is made anew")
	required(c, "workload")
	c.MarkFlagsMutuallyExclusive("in-place", "window")
	c.MarkFlagsMutuallyExclusive("in-place", "read-ahead")
	c.MarkFlagsMutuallyExclusive("generate-only", "reuse")
	addJSON(c, &asJSON)
	addQuiet(c, &quiet)
	return c
}

// workloadFlag is the name of a workload.
type workloadFlag struct{ value *bench.Workload }

func (w workloadFlag) String() string { return string(*w.value) }
func (w workloadFlag) Type() string   { return "W" }

func (w workloadFlag) Set(s string) error {
	*w.value = bench.Workload(s)
	if !slices.Contains(bench.Workloads, *w.value) {
		return fmt.Errorf("want one of %q", bench.Workloads)
	}
	return nil
}

// ioList is one back end or some.
type ioList struct{ value *[]blockio.Kind }

func (l ioList) Type() string { return "uring|sync|auto" }

func (l ioList) String() string {
	var names []string
	for _, k := range *l.value {
		names = append(names, string(k))
	}
	return strings.Join(names, ",")
}

func (l ioList) Set(s string) error {
	var list []blockio.Kind
	for name := range strings.SplitSeq(s, ",") {
		k := blockio.Kind(name)
		if !slices.Contains([]blockio.Kind{blockio.URing, blockio.Sync, blockio.Auto}, k) || slices.Contains(list, k) {
			return errors.New("want uring, sync, auto, or some of them with commas between")
		}
		list = append(list, k)
	}
	*l.value = list
	return nil
}

// Bounds of a qcow2 cluster in bytes: below a block it means nothing here, and
// qemu-img takes none above.
const (
	minCluster = blockio.BlockSize
	maxCluster = 2 << 20
)

func checkBenchMerge(o *bench.MergeOptions) error {
	if err := o.Complete(); err != nil {
		return wrong("%v", err)
	}
	switch {
	case o.Window < minWindow || o.Window > maxWindow || o.Window%blockio.BlockSize != 0:
		return wrong("--window %d is not %d to %d and a multiple of %d", o.Window, minWindow, maxWindow, blockio.BlockSize)
	case o.Runs < 1 || o.Runs > 100:
		return wrong("--runs %d is not 1 to 100", o.Runs)
	case o.FlushDelay < 0 || o.FlushDelay > time.Minute:
		return wrong("--flush-delay %v is not 0 to 1m", o.FlushDelay)
	case o.Reuse && o.Dir == "":
		return wrong("--reuse needs --dir")
	case o.Floor && o.NoReadAhead:
		return wrong("--floor is that of a merge with read-ahead")
	case o.Scaling && o.Workload != bench.Full:
		return wrong("--scaling is of the workload %s, whose data is all to be unpacked", bench.Full)
	case o.QemuCluster != 0 && (o.QemuCluster < minCluster || o.QemuCluster > maxCluster || o.QemuCluster&(o.QemuCluster-1) != 0):
		return wrong("--qemu-cluster %d is not %d to %d and a power of two", o.QemuCluster, minCluster, maxCluster)
	}
	return nil
}

// benchNote writes notes to stderr, or nowhere.
func benchNote(c *cobra.Command, quiet bool) func(format string, args ...any) {
	return func(format string, args ...any) {
		if !quiet {
			fmt.Fprintf(c.ErrOrStderr(), "snapmerge: "+format+"\n", args...)
		}
	}
}

// benchDir makes the directory, or a new one, which done takes away unless its files
// are to be kept.
func benchDir(dir *string, keep bool) (done func() error, err error) {
	if *dir != "" {
		return func() error { return nil }, os.MkdirAll(*dir, 0o700)
	}
	if *dir, err = os.MkdirTemp("", "snapmerge-bench-"); err != nil {
		return nil, err
	}
	if keep {
		return func() error { return nil }, nil
	}
	return func() error { return os.RemoveAll(*dir) }, nil
}

// printEach writes each result as JSON.
func printEach[T any](w io.Writer, results []T) error {
	for _, r := range results {
		if err := printJSON(w, r); err != nil {
			return err
		}
	}
	return nil
}

// generated is what is printed of files that were only made.
type generated struct {
	bench.Spec
	bench.Files
}

func printBenchMerge(w io.Writer, o bench.MergeOptions, results []bench.Result, asJSON bool) error {
	files := bench.Names(o.Dir)
	switch {
	case o.GenerateOnly && asJSON:
		return printJSON(w, generated{o.Spec, files})
	case o.GenerateOnly:
		_, err := fmt.Fprintf(w, "made %s, %s and %s\n", files.Base, files.COW, files.Expected)
		return err
	case asJSON:
		return printEach(w, results)
	}
	if o.Keep {
		fmt.Fprintf(w, "kept %s, %s and %s\n", files.Base, files.COW, files.Expected)
	}
	return bench.WriteText(w, results)
}

func newBenchTable() *cobra.Command {
	return &cobra.Command{
		Use:   "table",
		Short: "Write the JSON results of bench merge on stdin as a table in Markdown",
		Args:  cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			results, err := bench.ReadResults(c.InOrStdin())
			if err != nil {
				return fmt.Errorf("stdin: %w", err)
			}
			return bench.WriteMarkdown(c.OutOrStdout(), results)
		},
	}
}
