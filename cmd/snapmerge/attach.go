package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/snapmerge/snapmerge/pkg/attach"
	"github.com/snapmerge/snapmerge/pkg/blockio"
	"github.com/snapmerge/snapmerge/pkg/progress"
	"github.com/snapmerge/snapmerge/pkg/volume"
)

func newAttach() *cobra.Command {
	var (
		cfg             attach.Config
		transport, kind string
		asJSON, quiet   bool
	)
	c := &cobra.Command{
		Use:   "attach --base B --cow C... --state DIR",
		Short: "Serve the view of a base and COWs as a block device, and merge meanwhile",
		Long: `Serve the view of a base and COWs as a block device, print the device's path, and
merge the COWs into the base in the background, until interrupted. The merge goes
on under writes to the device; when it is done the device stays in service.

DIR is made if it is missing. It keeps progress and what is written to the device:
run the same command again after any interruption, and do not remove it before the
merge is done. The COWs are never changed.

With --read-only the device refuses writes and no log is kept. The COWs are merged
into the base all the same, which no reader can see; add --no-merge to leave the
content of the base alone. It must be possible to write to the base in any case: it
is marked and locked for as long as it is served.

An interrupt (SIGINT, SIGTERM) detaches the device once nobody uses it any more; a
second one takes it away from its users, a third one ends the command at once. A lost
terminal (SIGHUP, unless started with nohup) detaches it, too, but hurries nobody. The
exit code is 5 if there is something left to merge, else 0, and 0 with --no-merge.

With --json the status is written as one object a line, the first one when the
device is there: the same keys as those of snapmerge status.`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) (err error) {
			if err := checkAttach(cfg); err != nil {
				return err
			}
			if cfg.Transport, err = openTransport(c.Context(), transport, cfg.StateDir); err != nil {
				return err
			}
			outliveReaders()
			warnUnprepared()
			cfg.IO = blockio.Kind(kind)
			var stop func()
			cfg.Force, stop = secondSignal()
			defer stop()
			ctx, stop := untilHangUp(c.Context())
			defer stop()
			p := newAttachPrinter(c, asJSON, quiet)
			cfg.Report, cfg.Notify = p.report, p.notify
			err = attach.Run(ctx, cfg)
			p.bar.End()
			return err
		},
	}
	f := c.Flags()
	f.StringVar(&cfg.Base, "base", "", "file or block device below the COWs")
	f.StringArrayVar(&cfg.COWs, "cow", nil, "COW file; given more than once the lowest comes first")
	f.StringVar(&cfg.StateDir, "state", "", "directory for progress and the write log")
	f.BoolVar(&cfg.ReadOnly, "read-only", false, "a device that refuses writes")
	f.BoolVar(&cfg.NoMerge, "no-merge", false, "do not merge")
	f.Var(rateFlag{&cfg.Rate}, "rate", "most MiB/s to merge; 0: no limit")
	required(c, "base", "cow", "state")
	addTransport(c, &transport)
	addIO(c, &kind)
	f.Var(labelFlag{&cfg.Label}, "label", "open the topmost COW, whose writing was cut off, at this label (default: it must be finished)")
	addJSON(c, &asJSON)
	addQuiet(c, &quiet)
	return c
}

func checkAttach(cfg attach.Config) error {
	if cfg.StateDir == "" {
		return wrong("--state needs the name of a directory")
	}
	files := map[string]string{"--base": cfg.Base}
	for i, name := range cfg.COWs {
		files[fmt.Sprintf("--cow %d", i+1)] = name
	}
	return distinct(files)
}

// untilHangUp ends the context when the terminal is lost, unless the process was
// started to outlive that.
func untilHangUp(ctx context.Context) (context.Context, context.CancelFunc) {
	if signal.Ignored(syscall.SIGHUP) {
		return context.WithCancel(ctx)
	}
	return signal.NotifyContext(ctx, syscall.SIGHUP)
}

// secondSignal is closed at the second signal to end; stop ends the watch. A third
// one ends the process at once, for what the second one sets going may hang.
func secondSignal() (second <-chan struct{}, stop func()) {
	signals, closed, done := make(chan os.Signal, 2), make(chan struct{}), make(chan struct{})
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	go func() {
		for range 2 {
			select {
			case <-signals:
			case <-done:
				return
			}
		}
		signal.Stop(signals)
		close(closed)
	}()
	return closed, func() {
		signal.Stop(signals)
		close(done)
	}
}

// attachPrinter writes what happens to an attached volume. Its methods are
// called one after another.
type attachPrinter struct {
	c             *cobra.Command
	asJSON, quiet bool
	bar           *progress.Reporter

	shown bool // the device's path
}

func newAttachPrinter(c *cobra.Command, asJSON, quiet bool) *attachPrinter {
	return &attachPrinter{c: c, asJSON: asJSON, quiet: quiet, bar: newReporter(c, "merging", quiet)}
}

func (p *attachPrinter) report(s volume.Status) {
	switch {
	case p.asJSON:
		_ = printJSON(p.c.OutOrStdout(), s)
	case !p.shown:
		fmt.Fprintln(p.c.OutOrStdout(), s.Device)
	}
	p.shown = true
	if s.State == volume.Merging {
		p.bar.Update(s.BytesDone, s.BytesTotal)
	}
}

func (p *attachPrinter) notify(text string) {
	if p.quiet {
		return
	}
	p.bar.End()
	fmt.Fprintf(p.c.ErrOrStderr(), "%s\n", text)
}
