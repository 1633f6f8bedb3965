package driver

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"

	"github.com/snapmerge/snapmerge/pkg/keeper"
)

const noFollow = unix.O_NOFOLLOW

// freezeLimit is how long a freeze may take, with the writing of all that is
// dirty that goes before it.
const freezeLimit = time.Minute

// freezer freezes the file system of an open directory for at most
// keeper.DefaultFreeze and returns how to thaw it; the error of that is
// keeper.ErrBroken if it was not frozen to the end.
type freezer func(ctx context.Context, volume string, dir int) (thaw func() error, err error)

// freezeByKeeper leaves the freezing to the keeper.
func freezeByKeeper(k *keeper.Client) freezer {
	return func(ctx context.Context, volume string, dir int) (func() error, error) {
		f, err := k.Freeze(ctx, volume, dir, keeper.DefaultFreeze)
		return thawer(f), err
	}
}

// freezeHere freezes without a keeper.
func freezeHere(ctx context.Context, volume string, dir int) (func() error, error) {
	f, err := keeper.FreezeHere(ctx, volume, dir, keeper.DefaultFreeze)
	return thawer(f), err
}

func thawer(f *keeper.Frozen) func() error {
	return func() error {
		ctx, cancel := context.WithTimeout(context.Background(), keeper.DefaultFreeze)
		defer cancel()
		return f.Thaw(ctx)
	}
}

// freezeGuest freezes the volume's file system if it is mounted, so that the cut
// that follows has a clean one. Where it was broken early the cut is what a power
// failure would leave, which the file system can cope with.
func (p *plugin) freezeGuest(ctx context.Context, id string) (thaw func(), err error) {
	dir, err := p.openMounted(id)
	if err != nil {
		return nil, fmt.Errorf("freeze: %w", err)
	}
	if dir == nil {
		return func() {}, nil
	}
	defer dir.Close()
	ctx, cancel := context.WithTimeout(ctx, freezeLimit)
	defer cancel()
	start := time.Now()
	end, err := p.freezeUnlessHung(ctx, id, dir)
	if err != nil {
		return nil, fmt.Errorf("freeze of the file system of volume %s: %w", id, err)
	}
	frozen := time.Now()
	return func() {
		switch err := end(); {
		case errors.Is(err, keeper.ErrBroken):
			klog.InfoS("File system was thawed early: the snapshot is as after a power failure", "volume", id)
		case err != nil:
			klog.ErrorS(err, "Thaw", "volume", id)
		default:
			klog.V(2).InfoS("File system was frozen", "volume", id, "sync", frozen.Sub(start), "frozen", time.Since(frozen))
		}
	}, nil
}

// freezeUnlessHung gives up where the device hangs. It does not take the device
// away, for that may yet come back, and a snapshot is not worth what its pods have
// not flushed.
func (p *plugin) freezeUnlessHung(ctx context.Context, id string, dir *os.File) (thaw func() error, err error) {
	dev := p.volumes.Device(id)
	ctx, cancel := p.endsIfHung(ctx, dev)
	defer cancel(nil)
	thaw, err = p.freeze(ctx, id, int(dir.Fd()))
	if err != nil && errors.Is(context.Cause(ctx), errHangs) {
		go p.abortUnused(id, dev)
		err = fmt.Errorf("%w: %v", errHangs, err) // nobody has cancelled the call
	}
	return thaw, err
}

// openMounted opens a directory where the volume's file system is mounted; nil
// if it is not.
func (p *plugin) openMounted(id string) (*os.File, error) {
	dev := p.volumes.Device(id)
	if dev == "" {
		return nil, nil
	}
	all, err := p.mountsOf(dev)
	if err != nil {
		return nil, err
	}
	number, err := blockNumber(dev)
	if err != nil {
		return nil, err
	}
	for _, m := range all {
		if m.Device != dev {
			continue
		}
		dir, err := os.OpenFile(m.Path, os.O_RDONLY|unix.O_DIRECTORY|noFollow, 0)
		if err != nil {
			continue // a file that was bind mounted, or covered by another mount
		}
		var st unix.Stat_t
		if err := unix.Fstat(int(dir.Fd()), &st); err == nil && st.Dev == number {
			return dir, nil
		}
		dir.Close()
	}
	if len(all) > 0 && all[0].Device == dev {
		return nil, fmt.Errorf("none of the mounts of %s at %q can be opened", dev, pathsOf(all))
	}
	return nil, nil
}
