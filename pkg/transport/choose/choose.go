// Package choose finds the transport for this machine among those that are built
// in.
package choose

import (
	"context"
	"errors"
	"path/filepath"

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

// ErrUnavailable says that the transport which was asked for does not work on this
// machine.
var ErrUnavailable = errors.New("transport does not work here")

// Transport is a transport with what a node plugin wants to know of it.
type Transport interface {
	transport.Transport
	// SurvivesRestart says why devices would not survive a restart of the process
	// that serves them, or nil.
	SurvivesRestart() error
	// MaxVolumes is how many devices this process could have at a time.
	MaxVolumes() (int64, error)
}

// Names are those of all transports, the best first.
func Names() []string { return []string{"dm-user", "ublk", "fuse", "nbd"} }

// Open returns the transports of this machine, of which the one of that name, or
// the best one that works (see best), is for new devices. dir is the directory of
// the volumes, in which a transport may keep what the next process needs in a
// directory of its own; k is the keeper, or nil. With Auto, a transport that an
// earlier process has left devices of stays the one for new devices.
func Open(ctx context.Context, name, dir string, k *keeper.Client) (*Set, error) {
	return open(ctx, name, transports(dir, k))
}

func transports(dir string, k *keeper.Client) []Transport {
	return []Transport{
		dmuser.New(k).Within(dir),
		ublk.New(filepath.Join(dir, "ublk")),
		fuseloop.New(k).Within(dir),
		nbd.New(filepath.Join(dir, "nbd")),
	}
}

// open chooses among all, the best first.
func open(ctx context.Context, name string, all []Transport) (*Set, error) {
	s := &Set{all: all}
	var err error
	if name != Auto {
		if s.initial, err = s.named(name); err != nil {
			return nil, err
		}
		if len(s.leftoversOf(ctx, s.initial)) == 0 { // else it works, and its guests wait
			err = s.initial.Probe()
		}
		if err != nil {
			return nil, err
		}
		return s, nil
	}
	for _, t := range all {
		if volumes := s.leftoversOf(ctx, t); len(volumes) > 0 {
			klog.InfoS("Transport stays that of the devices in service", "transport", t.Name(), "devices", len(volumes))
			s.initial = t
			return s, nil
		}
	}
	if s.initial, err = best(all); err != nil {
		return nil, err
	}
	return s, nil
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
