package main

import (
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/snapmerge/snapmerge/pkg/admin"
	"github.com/snapmerge/snapmerge/pkg/progress"
	"github.com/snapmerge/snapmerge/pkg/volume"
)

// watchEvery is how often status --watch looks.
const watchEvery = time.Second

func addSocket(c *cobra.Command, socket *string) {
	c.Flags().StringVar(socket, "socket", admin.DefaultSocket, "where the node plugin listens for commands")
}

func newStatus() *cobra.Command {
	var (
		socket        string
		watch, asJSON bool
	)
	c := &cobra.Command{
		Use:   "status [VOLUME]",
		Short: "Show the volumes of this node and how far their merges are",
		Long: `Ask the node plugin for the state of one volume or all: how much of its COWs is
merged (percent of the bytes they write), the rate of the merge (MiB/s), the time
to its end, the layers above the base, the disk space of the write log, transport,
device, and the last error.

With --json each volume is one object on a line of its own.`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			fetch := fetchStatus(admin.NewClient(socket), args)
			out := c.OutOrStdout()
			if watch {
				tick := time.NewTicker(watchEvery)
				defer tick.Stop()
				return admin.Watch(c.Context(), fetch, out, admin.WatchOptions{Terminal: progress.IsTerminal(out), JSON: asJSON, Tick: tick.C})
			}
			all, err := fetch(c.Context())
			if err != nil {
				return err
			}
			if !asJSON {
				return admin.WriteTable(out, all)
			}
			for _, s := range all {
				if err := printJSON(out, s); err != nil {
					return err
				}
			}
			return nil
		},
	}
	addSocket(c, &socket)
	c.Flags().BoolVarP(&watch, "watch", "w", false, "go on until interrupted: redraw every second on a terminal, elsewhere write what has changed")
	addJSON(c, &asJSON)
	return c
}

// fetchStatus asks for the one volume that args name, or for all.
func fetchStatus(client *admin.Client, args []string) func(context.Context) ([]volume.Status, error) {
	if len(args) == 0 {
		return client.List
	}
	return func(ctx context.Context) ([]volume.Status, error) {
		s, err := client.Get(ctx, args[0])
		return []volume.Status{s}, err
	}
}

// control is a command that changes a volume and shows its status then.
func control(use, short, long string, args int, change func(ctx context.Context, c *admin.Client, args []string) (volume.Status, error)) *cobra.Command {
	var (
		socket string
		asJSON bool
	)
	c := &cobra.Command{
		Use: use, Short: short, Long: long, Args: cobra.ExactArgs(args),
		RunE: func(c *cobra.Command, args []string) error {
			s, err := change(c.Context(), admin.NewClient(socket), args)
			if err != nil {
				return err
			}
			if asJSON {
				return printJSON(c.OutOrStdout(), s)
			}
			_, err = fmt.Fprintf(c.OutOrStdout(), "%s: %s, %.1f %%\n", s.ID, s.State, s.Percent)
			return err
		},
	}
	addSocket(c, &socket)
	addJSON(c, &asJSON)
	return c
}

func newPause() *cobra.Command {
	return control("pause VOLUME", "Pause the merge of a volume",
		"Pause merging and folding of a volume, over restarts of the node plugin too. The volume\nstays in service.",
		1, func(ctx context.Context, c *admin.Client, args []string) (volume.Status, error) {
			return c.SetPaused(ctx, args[0], true)
		})
}

func newResume() *cobra.Command {
	return control("resume VOLUME", "Let a paused merge go on", "Let merging and folding of a paused volume go on.",
		1, func(ctx context.Context, c *admin.Client, args []string) (volume.Status, error) {
			return c.SetPaused(ctx, args[0], false)
		})
}

func newRate() *cobra.Command {
	return control("rate VOLUME RATE", "Limit the merge of a volume",
		"Limit merging and folding of a volume to RATE, a whole number of MiB/s, over restarts of\nthe node plugin too; 0 stands for the node's default.",
		2, func(ctx context.Context, c *admin.Client, args []string) (volume.Status, error) {
			mib, err := parseRate(args[1])
			if err != nil {
				return volume.Status{}, wrong("%w", err)
			}
			return c.SetRate(ctx, args[0], mib)
		})
}
