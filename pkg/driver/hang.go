package driver

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"k8s.io/klog/v2"

	"github.com/snapmerge/snapmerge/pkg/transport"
	"github.com/snapmerge/snapmerge/pkg/volume"
)

const (
	// hangLimit is how long an operation may wait for a device that does not
	// complete any request. A slow one completes some.
	hangLimit = 18 * time.Second
	hangPoll  = 500 * time.Millisecond
)

// completed is what the kernel has counted of a device; it changes with each
// request that ends.
func completed(dev string) string {
	b, err := os.ReadFile(filepath.Join("/sys/class/block", filepath.Base(dev), "stat"))
	if err != nil {
		return ""
	}
	f := strings.Fields(string(b))
	// Reads, writes, discards and flushes that are completed; the other fields
	// count bytes and time.
	var c []string
	for _, i := range []int{0, 4, 11, 15} {
		if i < len(f) {
			c = append(c, f[i])
		}
	}
	return strings.Join(c, " ")
}

// unlessHung waits for fn, which waits for the volume's device. If the device
// hangs it is taken away, so that fn comes to an end.
func (p *plugin) unlessHung(id, dev string, fn func() error) error {
	if dev == "" {
		return fn()
	}
	done := make(chan error, 1)
	go func() { done <- guard("operation on volume "+id, fn) }()
	tick := time.NewTicker(hangPoll)
	defer tick.Stop()
	last, since := completed(dev), time.Now()
	for aborted := false; ; {
		select {
		case err := <-done:
			return err
		case <-tick.C:
		}
		if now := completed(dev); now != last {
			last, since = now, time.Now()
		}
		if !aborted && time.Since(since) > p.hangLimit {
			aborted = true
			p.abort(id, dev)
		}
	}
}

// abort takes a device away that hangs.
func (p *plugin) abort(id, dev string) {
	klog.ErrorS(nil, "Device hangs and is taken away; what was not flushed is lost", "volume", id, "device", dev)
	if err := p.volumes.Abort(id); err != nil && !errors.Is(err, volume.ErrNotFound) {
		klog.ErrorS(err, "Device cannot be taken away", "volume", id, "device", dev)
	}
}

// detach takes the device out of service; one that hangs is taken away by force.
func (p *plugin) detach(ctx context.Context, id, dev string) error {
	for {
		before := completed(dev)
		err := p.detachOnce(ctx, id)
		var t interface{ Timeout() bool }
		switch {
		case err == nil, errors.Is(err, volume.ErrNotFound):
			return nil
		case errors.Is(err, transport.ErrBusy):
			users, merr := p.mountsOf(dev)
			if len(users) == 0 {
				return errors.Join(fmt.Errorf("%w (not by a mount here: by a process, or by a mount in another mount namespace)", err), merr)
			}
			return errors.Join(fmt.Errorf("%w (mounted at %q)", err, pathsOf(users)), merr)
		case !errors.As(err, &t) || !t.Timeout() || ctx.Err() != nil:
			return err
		}
		if completed(dev) == before {
			p.abort(id, dev)
			return nil
		}
	}
}

func (p *plugin) detachOnce(ctx context.Context, id string) error {
	ctx, cancel := context.WithTimeout(ctx, p.hangLimit)
	defer cancel()
	return p.volumes.Detach(ctx, id)
}
