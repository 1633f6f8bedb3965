// Command serve serves a file as a block device through a transport, for
// measurements in a virtual machine.
//
// Usage: serve TRANSPORT FILE LINK
//
// When the device is in service LINK is a symbolic link to it. SIGTERM ends it.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/snapmerge/snapmerge/pkg/transport"
	"github.com/snapmerge/snapmerge/pkg/transport/choose"
	"github.com/snapmerge/snapmerge/test/devicetest"
)

func main() {
	if len(os.Args) != 4 {
		fmt.Fprintln(os.Stderr, "usage: serve TRANSPORT FILE LINK")
		os.Exit(2)
	}
	if err := serve(os.Args[1], os.Args[2], os.Args[3]); err != nil {
		fmt.Println("serve:", err)
		os.Exit(1)
	}
}

func serve(name, file, link string) error {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	t, err := choose.Open(ctx, name, "/tmp", nil)
	if err != nil {
		return err
	}
	b, err := devicetest.OpenFile(file)
	if err != nil {
		return err
	}
	d, err := t.Create(ctx, file, b, transport.Options{})
	if err != nil {
		return err
	}
	if err := os.Symlink(d.Path(), link); err != nil {
		return errors.Join(err, d.Abort())
	}
	<-ctx.Done()
	return d.Close(context.Background())
}
