package main

import (
	"bufio"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/snapmerge/snapmerge/pkg/offline"
)

func newCOW() *cobra.Command {
	c := &cobra.Command{
		Use:   "cow",
		Short: "Look at, check and apply COW files",
		Args:  cobra.NoArgs,
		RunE:  needsSubcommand,
	}
	c.AddCommand(newInspect(), newVerify(), newExtract())
	return c
}

func newInspect() *cobra.Command {
	var (
		o           offline.InspectOptions
		asJSON, ops bool
	)
	c := &cobra.Command{
		Use:   "inspect FILE",
		Short: "Show what a COW file holds and how far it is merged",
		Long: `Check the structure of a COW file and show its header, op counts by type,
compression, payload and image sizes (bytes), labels, sequence, merge state and
scratch state. The data of ops is not read.

With --ops every op follows, in the order of the file; with --json as well, one
object a line after the one that describes the file.`,
		Args: cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) (err error) {
			o.COW = args[0]
			s, err := offline.Inspect(o)
			if err != nil {
				return err
			}
			out := bufio.NewWriter(c.OutOrStdout())
			if asJSON {
				err = printJSON(out, s)
			} else {
				err = s.WriteText(out)
			}
			if err == nil && ops {
				err = offline.WalkOps(o, opPrinter(out, asJSON))
			}
			if err != nil {
				return err
			}
			return out.Flush()
		},
	}
	addJSON(c, &asJSON)
	c.Flags().BoolVar(&ops, "ops", false, "list all ops")
	addLabel(c, &o.Label)
	return c
}

func opPrinter(w io.Writer, asJSON bool) func(offline.OpInfo) error {
	if asJSON {
		return func(op offline.OpInfo) error { return printJSON(w, op) }
	}
	fmt.Fprintf(w, "\n%12s  %-8s  %10s  %6s  %15s  %12s  %7s  %s\n", "offset", "type", "new block", "blocks", "source", "data at", "bytes", "compression")
	return func(op offline.OpInfo) error {
		_, err := fmt.Fprintf(w, "%12d  %-8s  %10d  %6d  %15d  %12d  %7d  %s\n",
			op.Offset, op.Type, op.NewBlock, op.Blocks, op.Source, op.DataOffset, op.DataLength, op.Compression)
		return err
	}
}

func newVerify() *cobra.Command {
	var (
		o             offline.VerifyOptions
		asJSON, quiet bool
	)
	c := &cobra.Command{
		Use:   "verify FILE [--base OLD --target NEW]",
		Short: "Check a COW file, and that it turns OLD into NEW",
		Long: `Check the structure of a COW file and, if a .sum file lies beside it, its
checksums. With --base and --target, compare the view over OLD with NEW byte for
byte; of a half-merged file OLD is the half-merged base. A difference gives exit
code 4.`,
		Args: cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			o.COW = args[0]
			bar := newReporter(c, "verifying", quiet)
			o.Progress = bar.Update
			v, err := offline.Verify(c.Context(), o)
			bar.End()
			if err != nil {
				return err
			}
			if asJSON {
				return printJSON(c.OutOrStdout(), struct {
					OK   bool   `json:"ok"`
					File string `json:"file"`
					offline.Verified
				}{true, o.COW, v})
			}
			_, err = fmt.Fprintln(c.OutOrStdout(), verdict(o, v))
			return err
		},
	}
	c.Flags().StringVar(&o.Base, "base", "", `image below the COW, or "none" if the COW needs none`)
	c.Flags().StringVar(&o.Target, "target", "", "image that the view must equal")
	c.MarkFlagsRequiredTogether("base", "target")
	addLabel(c, &o.Label)
	addJSON(c, &asJSON)
	addQuiet(c, &quiet)
	return c
}

func verdict(o offline.VerifyOptions, v offline.Verified) string {
	text := o.COW + ": good structure"
	if v.Sums {
		text += ", checksums match"
	}
	if v.View {
		text += fmt.Sprintf(", the view over %s equals %s", o.Base, o.Target)
	}
	return text
}

func newExtract() *cobra.Command {
	o := offline.ExtractOptions{Base: offline.NoBase}
	var quiet, asJSON bool
	c := &cobra.Command{
		Use:   "extract --cow FILE [--base OLD] --out NEW",
		Short: "Write the image that a COW makes to a new file",
		Long: `Write the view of a COW over OLD to the file NEW, which must not exist. Blocks of
zeros become holes. Neither OLD nor FILE is changed. NEW gets its name when it is
complete. What a killed run leaves is NEW.snapmerge-extract, which the next run
replaces.`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			bar := newReporter(c, "extracting", quiet)
			size := int64(0)
			o.Progress = func(done, total int64) {
				size = total
				bar.Update(done, total)
			}
			err := offline.Extract(c.Context(), o)
			bar.End()
			if err != nil {
				return err
			}
			if asJSON {
				return printJSON(c.OutOrStdout(), struct {
					File  string `json:"file"`
					Bytes int64  `json:"bytes"`
				}{o.Out, size})
			}
			_, err = fmt.Fprintf(c.OutOrStdout(), "%s: %d bytes\n", o.Out, size)
			return err
		},
	}
	c.Flags().StringVar(&o.COW, "cow", "", "COW file")
	c.Flags().StringVar(&o.Base, "base", o.Base, `image below the COW, or "none" if the COW needs none`)
	c.Flags().StringVar(&o.Out, "out", "", "file to make")
	required(c, "cow", "out")
	addLabel(c, &o.Label)
	addJSON(c, &asJSON)
	addQuiet(c, &quiet)
	return c
}
