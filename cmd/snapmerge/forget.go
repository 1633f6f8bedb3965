package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"text/tabwriter"

	"github.com/spf13/cobra"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/snapmerge/snapmerge/pkg/forget"
)

func newForget() *cobra.Command {
	var (
		rules       = clientcmd.NewDefaultClientConfigLoadingRules()
		overrides   clientcmd.ConfigOverrides
		yes, claims bool
	)
	c := &cobra.Command{
		Use:   "forget NODE",
		Short: "Remove from Kubernetes what is left of a node that is gone for good",
		Long: `List the PersistentVolumes and VolumeSnapshotContents of a node that has been deleted
from the cluster (kubectl delete node), which nobody else would ever delete, and with
--yes remove them. Their data is gone with the node's disk.

What a claim or a VolumeSnapshot still refers to is left alone, unless --claims has
these deleted, too; pods that use such a claim have to be deleted first.

It takes the cluster from KUBECONFIG or ~/.kube/config, as kubectl does, and needs
leave to get nodes, and to list, delete and patch those objects.`,
		Args: cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			config, err := clientcmd.NewNonInteractiveDeferredLoadingClientConfig(rules, &overrides).ClientConfig()
			if err != nil {
				return fmt.Errorf("kubeconfig: %w", err)
			}
			client, err := dynamic.NewForConfig(config)
			if err != nil {
				return err
			}
			return forgetNode(c.Context(), client, args[0], yes, claims, c.OutOrStdout())
		},
	}
	f := c.Flags()
	f.StringVar(&rules.ExplicitPath, "kubeconfig", "", "file with the way to the cluster (default: KUBECONFIG, ~/.kube/config)")
	f.StringVar(&overrides.CurrentContext, "context", "", "context of that file (default: the current one)")
	f.BoolVar(&yes, "yes", false, "remove what is listed, rather than only listing it")
	f.BoolVar(&claims, "claims", false, "also what claims and VolumeSnapshots refer to, and those themselves")
	return c
}

// forgetNode lists what is left of the node, and removes it if yes says so.
func forgetNode(ctx context.Context, client dynamic.Interface, node string, yes, claims bool, out io.Writer) error {
	items, err := forget.Find(ctx, client, node)
	if err != nil {
		return err
	}
	if len(items) == 0 {
		_, err := fmt.Fprintf(out, "nothing is left of node %s\n", node)
		return err
	}
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "KIND\tNAME\tUSED BY\tACTION")
	var errs []error
	kept := 0
	for _, i := range items {
		user, action := "-", "remove"
		if i.User != "" {
			user = i.UserKind() + " " + i.User
		}
		switch {
		case i.User != "" && !claims:
			action = "keep"
			kept++
		case yes:
			action = "removed"
			if err := i.Remove(ctx, client); err != nil {
				errs, action = append(errs, err), "failed"
			}
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\n", i.Kind, i.Name, user, action)
	}
	errs = append(errs, w.Flush())
	if !yes {
		fmt.Fprintln(out, "\nNothing has been changed; --yes removes what says remove.")
	}
	if kept > 0 {
		fmt.Fprintf(out, "\n%d are kept since they are used; --claims removes them with what uses them.\n", kept)
	}
	return errors.Join(errs...)
}
