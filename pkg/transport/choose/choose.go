// Package choose finds the transport for this machine among those that are built
// in.
package choose

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"k8s.io/klog/v2"

	"github.com/snapmerge/snapmerge/pkg/keeper"
	"github.com/snapmerge/snapmerge/pkg/transport"
	"github.com/snapmerge/snapmerge/pkg/transport/dmuser"
	"github.com/snapmerge/snapmerge/pkg/transport/fuseloop"
	"github.com/snapmerge/snapmerge/pkg/transport/nbd"
	"github.com/snapmerge/snapmerge/pkg/transport/ublk"
)

// Auto is the name that leaves the choice to Open.
const Auto = "auto"

// ErrUnknown says that there is no transport of that name in this build.
var ErrUnknown = errors.New("transport is not built in")

// ErrOther says that an earlier process left devices of another transport, which
// would be left without a server.
var ErrOther = errors.New("devices of another transport are in service")

// Transport is a transport with what a node plugin wants to know of it.
type Transport interface {
	transport.Transport
	// SurvivesRestart says why devices would not survive a restart of the process
	// that serves them, or nil.
	SurvivesRestart() error
	// MaxVolumes is how many devices this process could have at a time.
	MaxVolumes() (int64, error)
}

// Open returns the transport of that name, or the best one that works: see best. dir is that of the
// volumes, in which a transport may keep what the next process needs in a directory
// of its own; k is the keeper, or nil. A transport that an earlier process has left
// devices of goes before any other, for nothing else can serve them.
func Open(ctx context.Context, name, dir string, k *keeper.Client) (Transport, error) {
	return open(ctx, name, []Transport{
		dmuser.New(k).Within(dir),
		ublk.New(filepath.Join(dir, "ublk")),
		fuseloop.New(k).Within(dir),
		nbd.New(filepath.Join(dir, "nbd")),
	})
}

// open chooses among all, the best first.
func open(ctx context.Context, name string, all []Transport) (Transport, error) {
	forced := slices.IndexFunc(all, func(t Transport) bool { return t.Name() == name })
	if forced < 0 && name != Auto {
		var names []string
		for _, t := range all {
			names = append(names, t.Name())
		}
		return nil, fmt.Errorf("%w: %q; there are %s", ErrUnknown, name, strings.Join(names, ", "))
	}
	var left Transport
	for _, t := range all {
		volumes, err := t.Leftovers(ctx)
		if err != nil {
			klog.ErrorS(err, "Cannot tell whether there are devices of an earlier process", "transport", t.Name())
		}
		if len(volumes) == 0 {
			continue
		}
		if left != nil || forced >= 0 && t != all[forced] {
			return nil, fmt.Errorf("%w: %s has those of %s; unstage them, or start with --transport %s", ErrOther, t.Name(), strings.Join(volumes, ", "), t.Name())
		}
		left = t
	}
	switch {
	case left != nil:
		klog.InfoS("Transport stays that of the devices in service", "transport", left.Name())
		return left, nil
	case forced >= 0:
		return all[forced], all[forced].Probe()
	}
	return best(all)
}

// best returns the first whose devices survive a restart. If there is none it is
// the last that works at all, which is the plainest.
func best(all []Transport) (Transport, error) {
	var fallback Transport
	var errs []error
	for _, t := range all {
		err := t.Probe()
		if err == nil {
			fallback = t
			err = t.SurvivesRestart()
		}
		if err == nil {
			fallback = t
			break
		}
		errs = append(errs, err)
	}
	if fallback == nil {
		return nil, errors.Join(errs...)
	}
	for _, err := range errs {
		klog.InfoS("Transport is not at its best", "chosen", fallback.Name(), "reason", err.Error())
	}
	return fallback, nil
}
