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
	// hangLimit is how long an operation may wait for a device that has requests
	// in flight and does not complete any. A slow one completes some.
	hangLimit = 18 * time.Second
	hangPoll  = 500 * time.Millisecond
	// hangLate is the time between two looks above which this process itself has
	// not run: that a device did nothing meanwhile says nothing about it.
	hangLate = 4 * hangPoll
)

// errHung says that the device was taken away because it hung.
var errHung = errors.New("its device hangs and was taken away")

// pulse tells since when a device hangs.
type pulse struct {
	done        string // requests completed, as last seen
	since, last time.Time
}

// hangs takes a look at what the kernel counts of the device and returns for how
// long there have been requests in flight without one being completed.
func (p *pulse) hangs(now time.Time, stat string) time.Duration {
	done, inFlight := counts(stat)
	if done != p.done || !inFlight || now.Sub(p.last) > hangLate {
		p.since = now
	}
	p.done, p.last = done, now
	return now.Sub(p.since)
}

// counts takes what matters out of /sys/block/*/stat (Documentation/block/stat.rst
// of the kernel): what changes with each request that ends, and whether any is in
// flight. The other fields count bytes and time.
func counts(stat string) (done string, inFlight bool) {
	f := strings.Fields(stat)
	if len(f) < 9 {
		return "", false // the device is gone
	}
	c := []string{f[0], f[4]} // reads and writes
	for _, i := range []int{11, 15} {
		if i < len(f) {
			c = append(c, f[i]) // discards and flushes
		}
	}
	return strings.Join(c, " "), f[8] != "0"
}

func statOf(dev string) string {
	b, err := os.ReadFile(filepath.Join("/sys/class/block", filepath.Base(dev), "stat"))
	if err != nil {
		return ""
	}
	return string(b)
}

// unlessHung waits for fn, which waits for the volume's device. If the device
// hangs, fn's context ends and the device is taken away, so that fn comes to an
// end; the error is errHung then, unless fn succeeds all the same.
func (p *plugin) unlessHung(ctx context.Context, id, dev string, fn func(ctx context.Context) error) error {
	if dev == "" {
		return fn(ctx)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- guard("operation on volume "+id, func() error { return fn(ctx) }) }()
	tick := time.NewTicker(hangPoll)
	defer tick.Stop()
	var d pulse
	d.hangs(time.Now(), statOf(dev))
	for hung := false; ; {
		select {
		case err := <-done:
			if hung && err != nil {
				err = fmt.Errorf("volume %s: %w: %w", id, errHung, err)
			}
			return err
		case <-tick.C:
		}
		if d.hangs(time.Now(), statOf(dev)) > p.hangsAfter() && !hung {
			hung = true
			cancel()
			p.abort(id, dev)
		}
	}
}

// errHangs says that an operation was given up, and the device left as it is.
var errHangs = errors.New("its device hangs")

// endsIfHung returns a context that ends, with errHangs as the cause, if the device
// hangs. cancel must be called.
func (p *plugin) endsIfHung(ctx context.Context, dev string) (_ context.Context, cancel context.CancelCauseFunc) {
	ctx, cancel = context.WithCancelCause(ctx)
	go func() {
		tick := time.NewTicker(hangPoll)
		defer tick.Stop()
		for d := (pulse{}); d.hangs(time.Now(), statOf(dev)) <= p.hangsAfter(); {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
		}
		cancel(errHangs)
	}()
	return ctx, cancel
}

// abortUnused takes a device that hangs, and for which an operation was given up, away
// once no pod uses it any more. The operation has a directory open, so that who unstages
// the volume would find it busy for ever, instead of hanging. It returns when the device
// has done all that it was asked to, and at once if somebody watches the volume already.
func (p *plugin) abortUnused(id, dev string) {
	if _, already := p.watched.LoadOrStore(id, nil); already {
		return
	}
	defer p.watched.Delete(id)
	tick := time.NewTicker(hangPoll)
	defer tick.Stop()
	for d := (pulse{}); p.volumes.Device(id) == dev; <-tick.C {
		stat := statOf(dev)
		if _, inFlight := counts(stat); !inFlight {
			return
		}
		if d.hangs(time.Now(), stat) <= p.hangsAfter() {
			continue
		}
		// One is where it is staged.
		if users, err := p.mountsOf(dev); err == nil && len(users) <= 1 {
			p.abort(id, dev)
			return
		}
	}
}

// hangsAfter is hangLimit, unless a test has set another.
func (p *plugin) hangsAfter() time.Duration { return time.Duration(p.hangLimit.Load()) }

// abort takes a device away that hangs.
func (p *plugin) abort(id, dev string) {
	klog.ErrorS(nil, "Device hangs and is taken away; what was not flushed is lost", "volume", id, "device", dev)
	if err := p.volumes.Abort(id); err != nil && !errors.Is(err, volume.ErrNotFound) {
		klog.ErrorS(err, "Device cannot be taken away", "volume", id, "device", dev)
	}
}

// detach takes the device out of service; one that hangs is taken away by force.
func (p *plugin) detach(ctx context.Context, id, dev string) error {
	err := p.unlessHung(ctx, id, dev, func(ctx context.Context) error { return p.volumes.Detach(ctx, id) })
	switch {
	case err == nil, errors.Is(err, volume.ErrNotFound), errors.Is(err, errHung):
		return nil
	case errors.Is(err, transport.ErrBusy):
		users, merr := p.mountsOf(dev)
		if len(users) == 0 {
			return errors.Join(fmt.Errorf("%w (not by a mount here: by a process, or by a mount in another mount namespace)", err), merr)
		}
		return errors.Join(fmt.Errorf("%w (mounted at %q)", err, pathsOf(users)), merr)
	}
	return err
}
