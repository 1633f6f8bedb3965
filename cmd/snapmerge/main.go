// Command snapmerge is the CSI driver for node-local volumes with instant
// restores, and its tools.
package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/snapmerge/snapmerge/pkg/exitcode"
)

func main() {
	prepareChild()
	prepare(os.Args[1:])
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	// A second signal ends the process at once; all that it does can be killed.
	context.AfterFunc(ctx, stop)
	os.Exit(run(ctx, os.Args[1:], os.Stdout, os.Stderr))
}

// outliveReaders keeps a process that serves devices in service when nobody reads
// its output any more: what it writes is lost then. All others end at the first
// such write, as programs in a pipe should.
func outliveReaders() { signal.Ignore(syscall.SIGPIPE) }

// run executes a command line until it is done or ctx ends, and returns the exit
// code.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	root := newRoot()
	// Whatever fails before a command starts is a matter of how it was called.
	started := false
	each(root, func(c *cobra.Command) {
		if fn := c.RunE; fn != nil {
			c.RunE = func(c *cobra.Command, args []string) error {
				started = true
				return fn(c, args)
			}
		}
	})
	root.SetArgs(append([]string{}, args...)) // nil would be this process's own arguments
	root.SetOut(stdout)
	root.SetErr(stderr)
	c, err := root.ExecuteContextC(ctx)
	if err != nil && !started {
		err = &exitcode.UsageError{Err: err}
	}
	code := exitcode.Of(err)
	if err != nil {
		text := oneLine(err)
		if code == exitcode.Usage {
			text += fmt.Sprintf(" (see %s --help)", c.CommandPath())
		}
		fmt.Fprintf(stderr, "snapmerge: %s\n", text)
	}
	return code
}

func each(c *cobra.Command, fn func(*cobra.Command)) {
	fn(c)
	for _, sub := range c.Commands() {
		each(sub, fn)
	}
}

// oneLine writes an error in one line.
func oneLine(err error) string {
	lines := strings.FieldsFunc(err.Error(), func(r rune) bool { return r == '\n' })
	return strings.ReplaceAll(strings.Join(lines, "; "), context.Canceled.Error(), "interrupted")
}

// wrong is an error of the command line that only the command can find.
func wrong(format string, args ...any) error {
	return &exitcode.UsageError{Err: fmt.Errorf(format, args...)}
}
