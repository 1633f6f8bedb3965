package main

import (
	"os"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"

	"github.com/snapmerge/snapmerge/pkg/blockio"
	"github.com/snapmerge/snapmerge/pkg/demo"
)

func newDemo() *cobra.Command {
	o := demo.Options{Size: 1 << 30}
	c := &cobra.Command{
		Use:   "demo",
		Short: "Show the main job on this machine, no cluster needed",
		Long: `Start a keeper and a node plugin, and show through the plugin's CSI socket how a
snapshot is restored instantly, used, and merged in the background, with a restart
of the plugin in the middle. Everything is checked; the exit code is 0 only if all
of it is so. It needs root and leaves nothing behind.`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) (err error) {
			if o.Size < demo.MinSize || o.Size > demo.MaxSize || o.Size%blockio.BlockSize != 0 {
				return wrong("--size %d is not %s to %s and a multiple of %d", o.Size, humanize.IBytes(demo.MinSize), humanize.IBytes(demo.MaxSize), blockio.BlockSize)
			}
			if o.Binary, err = os.Executable(); err != nil {
				return err
			}
			o.Out = c.OutOrStdout()
			return demo.Run(c.Context(), o)
		},
	}
	c.Flags().Var(bytesFlag{&o.Size}, "size", "size of the volume, "+humanize.IBytes(demo.MinSize)+" to "+humanize.IBytes(demo.MaxSize))
	c.Flags().BoolVar(&o.Keep, "keep", false, "leave processes, devices and files as they are at the end")
	c.Flags().StringVar(&o.Dir, "dir", "", "directory to make a new one in, for everything (default: /var/tmp)")
	return c
}
