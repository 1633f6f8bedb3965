package main

import (
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"

	"github.com/snapmerge/snapmerge/pkg/blockio"
	"github.com/snapmerge/snapmerge/pkg/exitcode"
	"github.com/snapmerge/snapmerge/pkg/merge"
	"github.com/snapmerge/snapmerge/pkg/offline"
)

func newMerge() *cobra.Command {
	var (
		o                      offline.MergeOptions
		kind                   string
		readAhead              = "on"
		inPlace, asJSON, quiet bool
	)
	c := &cobra.Command{
		Use:   "merge --base B --cow C (--in-place | --journal J)",
		Short: "Merge a COW into a base, files or devices",
		Long: `Merge a COW into a base. After any interruption, a crash included, the same
command goes on where it stopped; exit code 5 says that this is so.

With --journal progress is kept in a file of its own, and the COW is not changed.
The journal is made if it is missing, and seeded from a COW that is half merged
already. It must not be removed before the merge is done: a half-merged base is
refused without it.

With --in-place progress is kept in the COW itself, exactly as Android does. The
COW must have one name only.

A base that is a block device must not be mounted or otherwise in use.`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			o.IO, o.NoReadAhead = blockio.Kind(kind), readAhead == "off"
			if err := checkMerge(c, o); err != nil {
				return err
			}
			bar := newReporter(c, "merging", quiet)
			o.Progress = func(s merge.Stats) { bar.Update(int64(s.Bytes), int64(s.BytesTotal)) }
			res, err := offline.Merge(c.Context(), o)
			bar.End()
			if err != nil && exitcode.Of(err) == exitcode.Resumable {
				state := "merged in part"
				if res.Blocks == 0 && res.Resumes == 0 {
					state = "not merged yet"
				}
				err = fmt.Errorf("%s is %s, the same command goes on: %w", o.Base, state, err)
			}
			return errors.Join(err, printMerge(c.OutOrStdout(), res, asJSON))
		},
	}
	c.Flags().StringVar(&o.Base, "base", "", "file or block device to merge into")
	c.Flags().StringVar(&o.COW, "cow", "", "COW file")
	c.Flags().BoolVar(&inPlace, "in-place", false, "keep progress in the COW itself")
	c.Flags().StringVar(&o.Journal, "journal", "", "keep progress in this file")
	c.Flags().BoolVar(&o.Verify, "verify", false, "compare the merged base with the view that there was before (reads both in full)")
	c.Flags().Var(&choice{&readAhead, []string{"on", "off"}}, "read-ahead",
		"off: no scratch space; windows are cut wherever redoing one would be unsafe, each with flushes of its own")
	o.Window = merge.DefaultWindowBlocks * blockio.BlockSize
	c.Flags().Var(bytesFlag{&o.Window}, "window", fmt.Sprintf("most data of a merge window, where a journal is made: %s to %s",
		humanize.IBytes(minWindow), humanize.IBytes(maxWindow)))
	c.Flags().BoolVar(&o.Reflink, "reflink", false, reflinkUsage)
	c.Flags().Var(rateFlag{&o.Rate}, "rate", "most MiB/s to write to the base; 0: no limit")
	required(c, "base", "cow")
	c.MarkFlagsOneRequired("in-place", "journal")
	c.MarkFlagsMutuallyExclusive("in-place", "journal")
	c.MarkFlagsMutuallyExclusive("in-place", "window")
	addIO(c, &kind)
	addLabel(c, &o.Label)
	addJSON(c, &asJSON)
	addQuiet(c, &quiet)
	return c
}

const reflinkUsage = "let long copies share space with their source where the base's file system can (xfs, btrfs); writing them later needs space anew"

// Bounds of a merge window in bytes.
const (
	minWindow = blockio.BlockSize
	maxWindow = 1 << 30
)

func checkMerge(c *cobra.Command, o offline.MergeOptions) error {
	if o.Window < minWindow || o.Window > maxWindow || o.Window%blockio.BlockSize != 0 {
		return wrong("--window %d is not %d to %d and a multiple of %d", o.Window, minWindow, maxWindow, blockio.BlockSize)
	}
	if c.Flags().Changed("journal") && o.Journal == "" {
		return wrong("--journal needs the name of a file")
	}
	return distinct(map[string]string{"--base": o.Base, "--cow": o.COW, "--journal": o.Journal})
}

// distinct refuses flags that name the same file.
func distinct(files map[string]string) error {
	for a, name := range files {
		for b, other := range files {
			if a >= b {
				continue
			}
			x, errX := os.Stat(name)
			y, errY := os.Stat(other)
			if errX == nil && errY == nil && os.SameFile(x, y) {
				return wrong("%s and %s are the same file, %s", a, b, name)
			}
		}
	}
	return nil
}

// printMerge writes the result. Of a merge that was not even opened there is
// nothing to say.
func printMerge(w io.Writer, r offline.MergeResult, asJSON bool) error {
	if r.IO == "" {
		return nil
	}
	if asJSON {
		return printJSON(w, r)
	}
	state := "merged"
	if !r.Done {
		state = "not done"
	}
	_, err := fmt.Fprintf(w, "%s: %d ops, %d blocks in %.2f s; %s read, %s written, %s scratch, %d flushes, io %s, %d resumes\n",
		state, r.Ops, r.Blocks, r.Seconds, humanize.IBytes(r.BytesRead), humanize.IBytes(r.BytesWritten),
		humanize.IBytes(r.ScratchBytes), r.Flushes, r.IO, r.Resumes)
	return err
}
