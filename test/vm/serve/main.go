// Command serve serves a file as a block device through a transport, for
// measurements in a virtual machine.
//
// Usage: serve TRANSPORT FILE LINK [native]
//
// When the device is in service LINK is a symbolic link to it. SIGTERM ends it. With
// "native" it is under a table of device-mapper, which is handed over to the file;
// each SIGUSR1 has it come back, or be handed over again. How long that took is logged.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"k8s.io/klog/v2"

	"github.com/snapmerge/snapmerge/pkg/transport"
	"github.com/snapmerge/snapmerge/pkg/transport/choose"
	"github.com/snapmerge/snapmerge/pkg/transport/handover"
	"github.com/snapmerge/snapmerge/test/devicetest"
)

func main() {
	if len(os.Args) != 4 && (len(os.Args) != 5 || os.Args[4] != "native") {
		fmt.Fprintln(os.Stderr, "usage: serve TRANSPORT FILE LINK [native]")
		os.Exit(2)
	}
	if err := serve(os.Args[1], os.Args[2], os.Args[3], len(os.Args) == 5); err != nil {
		fmt.Println("serve:", err)
		os.Exit(1)
	}
}

// stateDir is where transports note their devices.
const stateDir = "/tmp"

func serve(name, file, link string, native bool) error {
	swap := make(chan os.Signal, 1)
	signal.Notify(swap, syscall.SIGUSR1)
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	set, err := choose.Open(ctx, name, stateDir, nil)
	if err != nil {
		return err
	}
	var t transport.Transport = set
	if native {
		if t, err = wrap(set); err != nil {
			return err
		}
	}
	b, err := devicetest.OpenFile(file)
	if err != nil {
		return err
	}
	d, err := t.Create(ctx, file, b, transport.Options{})
	if err != nil {
		return err
	}
	if native {
		swap <- syscall.SIGUSR1
		err = swaps(ctx, d, file, link, swap)
	} else if err = os.Symlink(d.Path(), link); err == nil {
		<-ctx.Done()
	}
	if err != nil {
		return errors.Join(err, d.Abort())
	}
	return d.Close(context.Background())
}

// wrap has devices handed over, and logs how long that takes.
func wrap(t transport.Transport) (transport.Transport, error) {
	flags := flag.NewFlagSet("", flag.ContinueOnError)
	klog.InitFlags(flags)
	if err := flags.Set("v", "2"); err != nil {
		return nil, err
	}
	return handover.New(t, stateDir+"/native", nil), handover.Available()
}

// swaps changes the table at each signal until ctx ends.
func swaps(ctx context.Context, d transport.Device, file, link string, swap <-chan os.Signal) error {
	h, ok := d.(*handover.Device)
	if !ok {
		return errors.New("the device cannot be handed over")
	}
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-swap:
		}
		var err error
		if h.Native() {
			err = h.Back(ctx, func() {})
		} else {
			err = h.ToBase(file, func() error { return nil })
		}
		if err != nil {
			return err
		}
		if _, err := os.Lstat(link); err == nil {
			continue
		}
		if err := os.Symlink(d.Path(), link); err != nil {
			return err
		}
	}
}
