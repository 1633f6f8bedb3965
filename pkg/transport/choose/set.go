package choose

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"

	"k8s.io/klog/v2"

	"github.com/snapmerge/snapmerge/pkg/transport"
)

// Set is the transports of a machine as one. New devices are of the transport that
// their options name, or else of the initial one; those of an earlier process stay
// with the one that made them. It implements transport.Transport.
type Set struct {
	all     []Transport
	initial Transport
}

var _ Transport = (*Set)(nil)

// Name is that of the initial transport.
func (s *Set) Name() string { return s.initial.Name() }

// Probe is that of the initial transport.
func (s *Set) Probe() error { return s.initial.Probe() }

// SurvivesRestart is that of the initial transport.
func (s *Set) SurvivesRestart() error { return s.initial.SurvivesRestart() }

// MaxVolumes is that of the initial transport.
func (s *Set) MaxVolumes() (int64, error) { return s.initial.MaxVolumes() }

// named returns the transport of that name.
func (s *Set) named(name string) (Transport, error) {
	i := slices.IndexFunc(s.all, func(t Transport) bool { return t.Name() == name })
	if i < 0 {
		return nil, fmt.Errorf("%w: %q; there are %s", ErrUnknown, name, strings.Join(Names(), ", "))
	}
	return s.all[i], nil
}

// Create makes a device of the transport that the options name.
func (s *Set) Create(ctx context.Context, volume string, b transport.Backend, o transport.Options) (transport.Device, error) {
	t := s.initial
	if o.Transport != "" && o.Transport != Auto {
		var err error
		if t, err = s.named(o.Transport); err != nil {
			return nil, err
		}
	}
	if left := s.leftOf(ctx, volume); left != nil {
		return nil, fmt.Errorf("%s: an earlier process has left a device of volume %q; it must be adopted", left.Name(), volume)
	}
	d, err := t.Create(ctx, volume, b, o)
	if err != nil && t != s.initial {
		if why := t.Probe(); why != nil {
			err = fmt.Errorf("%w: %w", ErrUnavailable, why)
		}
	}
	return d, err
}

// leftOf returns the transport that an earlier process left a device of the volume
// of, or nil.
func (s *Set) leftOf(ctx context.Context, volume string) Transport {
	for _, t := range s.all {
		if slices.Contains(s.leftoversOf(ctx, t), volume) {
			return t
		}
	}
	return nil
}

// leftoversOf lists what it can.
func (s *Set) leftoversOf(ctx context.Context, t Transport) []string {
	volumes, err := t.Leftovers(ctx)
	if err != nil {
		klog.ErrorS(err, "Cannot tell whether there are devices of an earlier process", "transport", t.Name())
	}
	return volumes
}

// Adopt takes over the device of the transport that made it.
func (s *Set) Adopt(ctx context.Context, volume string, b transport.Backend) (transport.Device, error) {
	t := s.leftOf(ctx, volume)
	if t == nil {
		return nil, fmt.Errorf("adopt device of volume %q: %w", volume, transport.ErrNotFound)
	}
	return t.Adopt(ctx, volume, b)
}

// Leftovers are those of all transports.
func (s *Set) Leftovers(ctx context.Context) ([]string, error) {
	var all []string
	var errs []error
	for _, t := range s.all {
		volumes, err := t.Leftovers(ctx)
		all, errs = append(all, volumes...), append(errs, err)
	}
	slices.Sort(all)
	return slices.Compact(all), errors.Join(errs...)
}

// Discard is that of all transports which this machine has.
func (s *Set) Discard(volumes []string) error {
	var errs []error
	for _, t := range s.all {
		if err := t.Discard(volumes); !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}
