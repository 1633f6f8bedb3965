package driver

import (
	"context"
	"sync"
	"time"

	"k8s.io/klog/v2"

	"github.com/snapmerge/snapmerge/pkg/keeper"
	"github.com/snapmerge/snapmerge/pkg/transport"
)

const (
	// keeperLimit is how long to look whether the keeper ends as well. It was told so at
	// the same time if the node goes down. Devices are in service meanwhile.
	keeperLimit = 2 * time.Second
	// keeperBefore is how much earlier than this process a keeper may end with the node.
	keeperBefore = 5 * time.Second
	// shutdownLimit is how long devices are served on when the node goes down. With all
	// that comes before and after it is well below the grace of a pod, of 60 s.
	shutdownLimit = 30 * time.Second
	shutdownPoll  = 200 * time.Millisecond
	// abortLimit is how long taking a device away by force may take.
	abortLimit = 15 * time.Second
)

// keeperStays tells whether this process, which was told to end at a time, ends alone: an
// upgrade, or the like. It does if the keeper was gone long before.
func keeperStays(k *keeper.Client, told time.Time) bool {
	for end := time.Now().Add(keeperLimit); time.Now().Before(end); time.Sleep(shutdownPoll) {
		if lost := k.Lost(); !lost.IsZero() {
			return told.Sub(lost) > keeperBefore
		}
	}
	return true
}

// serveOut lets the file systems on our devices be synced and unmounted when the node
// goes down: it serves on until nobody uses the devices, for shutdownLimit at most. Then
// it takes away what is left, for the kernel would keep some of them waiting for another
// node plugin, and who syncs or unmounts would wait with them.
func (p *plugin) serveOut(k *keeper.Client) error {
	left := p.inService()
	klog.InfoS("The keeper ends as well: the node goes down. Devices are served until nobody uses them", "volumes", left, "limit", p.shutdownLimit)
	err := k.Close() // it is not coming back
	ctx, cancel := context.WithTimeout(context.Background(), p.shutdownLimit)
	defer cancel()
	done := make(chan struct{})
	go func() {
		defer close(done)
		var ends sync.WaitGroup
		for _, id := range left {
			ends.Go(func() { p.serveOutOne(ctx, id) })
		}
		ends.Wait()
	}()
	select {
	case <-done:
	case <-time.After(p.shutdownLimit + abortLimit):
	}
	return err
}

// serveOutOne is serveOut of one volume. Its device is not closed but aborted: the keeper,
// which would help to close it, is gone.
func (p *plugin) serveOutOne(ctx context.Context, id string) {
	used, err := true, error(nil)
	for ; used && ctx.Err() == nil; time.Sleep(shutdownPoll) {
		if used, err = transport.InUse(p.volumes.Device(id)); err != nil {
			used = true
		}
	}
	if used {
		klog.ErrorS(err, "Device is in use and is taken away, as the node goes down; what was not flushed is lost", "volume", id)
	} else if err := p.flush([]string{id}); err != nil {
		klog.ErrorS(err, "The last flush has failed", "volume", id)
	}
	if err := p.volumes.Abort(id); err != nil {
		klog.ErrorS(err, "Device cannot be taken away", "volume", id)
	}
}
