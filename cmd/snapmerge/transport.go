package main

import (
	"github.com/spf13/cobra"

	"github.com/snapmerge/snapmerge/pkg/keeper"
	"github.com/snapmerge/snapmerge/pkg/transport"
	"github.com/snapmerge/snapmerge/pkg/transport/fuseloop"
)

const autoTransport = "auto"

// addTransport adds the choice of the transport.
func addTransport(c *cobra.Command, name *string) {
	*name = autoTransport
	c.Flags().Var(&choice{name, []string{autoTransport, "dm-user", "ublk", "fuse", "nbd"}}, "transport",
		"how the device is made: auto takes the best that this machine has; this build has fuse alone (see snapmerge probe)")
}

// openTransport makes the transport of that name; k may be nil.
func openTransport(name string, k *keeper.Client) (transport.Transport, error) {
	switch name {
	case autoTransport, "fuse":
		return fuseloop.New(k), nil
	}
	return nil, wrong("this build has no %s transport, only fuse", name)
}
