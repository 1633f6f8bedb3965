package main

import (
	goflag "flag"
	"fmt"
	"io"
	"log/slog"
	"strconv"

	"github.com/spf13/cobra"
	"k8s.io/klog/v2"
)

// addLogFlags adds the flags that say how and how much is logged.
func addLogFlags(root *cobra.Command) {
	var all goflag.FlagSet
	klog.InitFlags(&all)
	verbosity := all.Lookup("v")
	format := "text"
	flags := root.PersistentFlags()
	flags.AddGoFlag(verbosity)
	flags.Lookup("v").Usage = "how much is logged to stderr: 0 what matters, up to 6 every step"
	flags.Var(&choice{&format, []string{"text", "json"}}, "log-format", "format of the log on stderr: text or json")
	root.PersistentPreRunE = func(c *cobra.Command, _ []string) error {
		v, err := strconv.Atoi(verbosity.Value.String())
		if err != nil {
			return fmt.Errorf("flag -v: %w", err)
		}
		if format == "json" {
			logJSON(c.ErrOrStderr(), v)
		}
		return nil
	}
}

// logJSON has klog write one JSON object a line. klog itself decides by its
// verbosity what is logged; the handler must not drop any of that.
func logJSON(w io.Writer, verbosity int) {
	h := slog.NewJSONHandler(w, &slog.HandlerOptions{Level: slog.Level(-verbosity)})
	klog.SetSlogLogger(slog.New(h))
}
