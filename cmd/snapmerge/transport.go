package main

import (
	"context"
	"errors"

	"github.com/spf13/cobra"

	"github.com/snapmerge/snapmerge/pkg/transport"
	"github.com/snapmerge/snapmerge/pkg/transport/choose"
)

// addTransport adds the choice of the transport.
func addTransport(c *cobra.Command, name *string) {
	*name = choose.Auto
	c.Flags().Var(&choice{name, append([]string{choose.Auto}, choose.Names()...)}, "transport",
		"how the device is made: auto takes the best that this machine has; see snapmerge probe")
}

// openTransport makes the transport of that name, without a keeper; dir is that of
// the volumes.
func openTransport(ctx context.Context, name, dir string) (transport.Transport, error) {
	t, err := choose.Open(ctx, name, dir, nil)
	if errors.Is(err, choose.ErrUnknown) {
		return nil, wrong("%v", err)
	}
	return t, err
}
