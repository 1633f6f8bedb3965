package main

import (
	"os"
	"path/filepath"

	"github.com/spf13/cobra"
	"k8s.io/klog/v2"

	"github.com/snapmerge/snapmerge/pkg/keeper"
	"github.com/snapmerge/snapmerge/pkg/transport/fuseloop"
)

// defaultKeeperSocket is where a keeper listens unless it is told otherwise.
const defaultKeeperSocket = "/run/snapmerge/keeper.sock"

// prepareChild lets the program do for its keeper or node plugin, in a process of
// its own, what may wait for a device. It comes before all else.
func prepareChild() { keeper.Child(fuseloop.Tasks()) }

func newKeeper() *cobra.Command {
	var socket string
	c := &cobra.Command{
		Use:   "keeper",
		Short: "Hold devices in service while the node plugin restarts",
		Long: `Hold the descriptors of devices while the node plugin restarts, so that no I/O
fails, and thaw file systems that it has frozen if it dies. Runs until interrupted;
the devices of volumes in use end with it unless the node plugin runs.`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			outliveReaders()
			if socket == "" { // the kernel would choose a name that nobody knows
				return wrong("--socket must not be empty")
			}
			if err := os.MkdirAll(filepath.Dir(socket), 0o700); err != nil {
				return err
			}
			if err := keeper.LockMemory(); err != nil {
				klog.ErrorS(err, "Memory is not locked: thawing a file system may have to wait for a disk")
			}
			return keeper.Serve(c.Context(), socket, fuseloop.Tasks())
		},
	}
	c.Flags().StringVar(&socket, "socket", defaultKeeperSocket, "unix socket to listen at")
	return c
}
