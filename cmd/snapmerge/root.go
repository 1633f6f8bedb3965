package main

import (
	"encoding/json"
	"io"

	"github.com/spf13/cobra"

	"github.com/snapmerge/snapmerge/pkg/progress"
)

func newRoot() *cobra.Command {
	root := &cobra.Command{
		Use:   "snapmerge",
		Short: "Node-local volumes whose snapshots are restored instantly and merged in the background",
		Long: `snapmerge serves restored volumes at once through a copy-on-write layer and merges
that layer into the volume's base in the background.

Exit codes: 0 done; 1 failed (I/O, environment, a second owner); 2 wrong usage;
3 bad input file; 4 verification found a difference; 5 stopped but resumable
(interrupted, out of space): run the same command again.

Sizes take KiB, MiB or GiB; rates are in MiB/s. With --json stdout carries JSON
alone: one object, or one object a line. Progress goes to stderr.`,
		SilenceErrors: true,
		SilenceUsage:  true,
		RunE:          needsSubcommand, // Args is not set: so an unknown command is found before its --help
	}
	root.CompletionOptions.HiddenDefaultCmd = true
	addLogFlags(root)
	root.AddCommand(newCOW(), newMerge(), newAttach(), newKeeper(), newNode(), newStatus(), newPause(), newResume(), newRate(), newForget(), newProbe(), newDemo(), newBench(), newVersion())
	return root
}

// needsSubcommand is what a command does that only groups others.
func needsSubcommand(*cobra.Command, []string) error { return wrong("a command is missing") }

// printJSON writes one object on a line of its own.
func printJSON(w io.Writer, v any) error {
	enc := json.NewEncoder(w)
	enc.SetEscapeHTML(false)
	return enc.Encode(v)
}

// newReporter shows progress on stderr.
func newReporter(c *cobra.Command, what string, quiet bool) *progress.Reporter {
	w := c.ErrOrStderr()
	return progress.New(w, progress.Options{What: what, Quiet: quiet, Terminal: progress.IsTerminal(w)})
}
