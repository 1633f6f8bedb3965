package main

import (
	"github.com/go-logr/logr"
	"github.com/spf13/cobra"
	"k8s.io/klog/v2"

	"github.com/snapmerge/snapmerge/pkg/probe"
)

func newProbe() *cobra.Command {
	var (
		stateDir string
		asJSON   bool
	)
	c := &cobra.Command{
		Use:   "probe",
		Short: "Show what this machine can do, and why not",
		Long: `Try what snapmerge needs from the kernel: transports, io_uring, reflinks,
device-mapper, loop devices, capabilities. Run it as the node plugin would run: the
same user, capabilities and seccomp profile. What is missing is no failure; the
exit code is 0.`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			klog.SetLogger(logr.Discard()) // the report says it all
			r := probe.Run(stateDir)
			if asJSON {
				return printJSON(c.OutOrStdout(), r)
			}
			return r.WriteText(c.OutOrStdout())
		},
	}
	c.Flags().StringVar(&stateDir, "state-dir", "", "try reflinks in this directory (default: not tried)")
	addJSON(c, &asJSON)
	return c
}
