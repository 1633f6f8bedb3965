// Package attach serves the view of a base and COWs, files or devices, as a
// block device of this machine, and merges meanwhile. It is the node plugin for
// one volume that nobody has put under Kubernetes.
//
// # State directory
//
//	attach.json   what was attached, written first: format, id, base, COWs, readOnly
//	attach.lock   locked by the process that serves
//	volume/       the volume, see package volume: record, journal, write log
//	ublk/         with the transport ublk: which device is ours
package attach

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"time"

	"k8s.io/klog/v2"

	"github.com/snapmerge/snapmerge/pkg/blockio"
	"github.com/snapmerge/snapmerge/pkg/merge"
	"github.com/snapmerge/snapmerge/pkg/offline"
	"github.com/snapmerge/snapmerge/pkg/transport"
	"github.com/snapmerge/snapmerge/pkg/volume"
	"github.com/snapmerge/snapmerge/pkg/volume/pacing"
)

// Config says what to serve and how. The same Base, COWs, Label and ReadOnly
// belong to one StateDir; all else may change from run to run.
type Config struct {
	// Base is a file or block device, COWs are the files above it, the lowest
	// first. Label opens the topmost at a label.
	Base  string
	COWs  []string
	Label *uint64
	// StateDir keeps progress and what is written to the device.
	StateDir string
	// ReadOnly makes a device that refuses writes and keeps no log. It is merged
	// all the same.
	ReadOnly bool
	// NoMerge leaves the COWs where they are.
	NoMerge bool
	// Transport makes the device.
	Transport transport.Transport
	IO        blockio.Kind
	Rate      int // of the merge in MiB/s; 0: no limit
	// Report is called when the device is in service, and after that whenever the
	// status has changed, twice a second at most.
	Report func(volume.Status)
	// Notify is called with sentences for the person who waits.
	Notify func(string)
	// Force, once closed, takes the device away though it is in use.
	Force <-chan struct{}
}

const (
	// look is how often the status is looked at, and whether the device can be
	// detached.
	look = 500 * time.Millisecond
	// detachTime bounds one try to detach a device that is not in use.
	detachTime = 30 * time.Second
)

// session is one run.
type session struct {
	cfg    Config
	lock   blockio.File
	v      *volume.Volume
	dev    transport.Device
	last   volume.Status // reported
	merged bool          // and the person was told
}

// Run serves until ctx ends, and then until nobody uses the device any more. If
// there is something left to merge that it was to merge, the error is
// context.Canceled; Run can be called again to go on. A state directory that is
// of something else gives ErrState, one in use blockio.ErrLocked.
func Run(ctx context.Context, cfg Config) error {
	s := &session{cfg: cfg}
	err := s.open(ctx)
	if err == nil {
		err = s.serve(ctx)
	}
	return errors.Join(err, s.close())
}

func (s *session) open(ctx context.Context) error {
	fsys := blockio.OS()
	if err := fsys.Mkdir(s.cfg.StateDir); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	if err := fsys.SyncDir(filepath.Dir(filepath.Clean(s.cfg.StateDir))); err != nil {
		return err
	}
	var err error
	if s.lock, err = fsys.Open(filepath.Join(s.cfg.StateDir, lockName), blockio.Create); err != nil {
		return err
	}
	if err := offline.WhileLocked(ctx, s.lock.Lock); err != nil {
		return err
	}
	args, err := s.cfg.state()
	if err != nil {
		return err
	}
	if err := s.create(args); err != nil {
		return err
	}
	err = offline.WhileLocked(ctx, func() (err error) {
		s.v, err = volume.Open(volume.Config{FS: fsys, Dir: s.cfg.volumeDir(), IO: s.cfg.IO, Rate: s.cfg.Rate,
			Pacing: pacing.NewNode(s.cfg.StateDir, 0), Log: klog.Background()})
		return err
	})
	if err != nil {
		return err
	}
	if s.v.Record().Paused != s.cfg.NoMerge {
		return s.v.SetPaused(s.cfg.NoMerge)
	}
	return nil
}

// create makes the volume if it is not there yet.
func (s *session) create(args arguments) error {
	_, err := volume.ReadRecord(blockio.OS(), s.cfg.volumeDir())
	if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	base, err := blockio.OS().Open(args.Base, blockio.ReadOnly)
	if err != nil {
		return err
	}
	defer base.Close()
	if err := offline.CheckBase(base, nil); err != nil {
		return err
	}
	spec := volume.Spec{
		ID: args.ID, Size: base.Size(), Base: args.Base, ReadOnly: args.ReadOnly, Limits: volume.DefaultLimits, Paused: s.cfg.NoMerge,
	}
	for _, c := range args.COWs {
		spec.COWs = append(spec.COWs, volume.COWSource{Path: c.Path, Label: c.Label})
	}
	err = volume.Create(blockio.OS(), s.cfg.volumeDir(), spec)
	var small *merge.BaseTooSmallError
	if errors.As(err, &small) {
		return fmt.Errorf("%s: byte %d: %w", args.Base, small.Have, err)
	}
	if err != nil {
		return err
	}
	return blockio.OS().SyncDir(s.cfg.StateDir)
}

func (s *session) serve(ctx context.Context) (err error) {
	// One that was killed may have left its device, and guests wait for it.
	s.dev, err = s.cfg.Transport.Adopt(ctx, s.v.ID(), s.v)
	if errors.Is(err, transport.ErrNotFound) {
		s.dev, err = s.cfg.Transport.Create(ctx, s.v.ID(), s.v, transport.Options{ReadOnly: s.cfg.ReadOnly})
	}
	if err != nil {
		return err
	}
	s.v.Start()
	tick := time.NewTicker(look)
	defer tick.Stop()
	for {
		s.watch()
		select {
		case <-ctx.Done():
			return errors.Join(s.detach(), s.outcome())
		case <-s.dev.Failed():
			return errors.Join(fmt.Errorf("%s has died", s.dev.Path()), s.dev.Abort())
		case <-tick.C:
		}
	}
}

// watch reports what has changed.
func (s *session) watch() {
	st := s.v.Status()
	st.Transport, st.Device = s.dev.Transport(), s.dev.Path()
	if st == s.last {
		return
	}
	if st.Error != "" && st.Error != s.last.Error {
		s.cfg.Notify(st.Error)
	}
	s.last = st
	s.cfg.Report(st)
	if s.v.Idle() && !s.merged {
		s.merged = true
		s.cfg.Notify(fmt.Sprintf("merged; %s stays in service until it is interrupted", st.Device))
	}
}

// detach takes the device out of service when nobody uses it any more, or at
// once if it is forced to.
func (s *session) detach() error {
	force, cancel := context.WithCancel(context.Background())
	defer cancel()
	go func() {
		select {
		case <-s.cfg.Force:
			cancel()
		case <-force.Done():
		}
	}()
	for told := false; ; told = true {
		ctx, done := context.WithTimeout(force, detachTime)
		err := s.dev.Close(ctx)
		done()
		switch {
		case err == nil:
			return nil
		case force.Err() != nil:
			return s.dev.Abort()
		case !errors.Is(err, transport.ErrBusy):
			return errors.Join(err, s.dev.Abort())
		case !told:
			s.cfg.Notify(fmt.Sprintf("waiting for the users of %s; another interrupt takes it away from them", s.dev.Path()))
		}
		s.watch()
		select {
		case <-force.Done():
		case <-s.dev.Failed():
			return s.dev.Abort()
		case <-time.After(look):
		}
	}
}

// outcome says what is left to do.
func (s *session) outcome() error {
	st := s.v.Status()
	switch {
	case s.cfg.NoMerge || s.v.Idle():
		return nil
	case st.Corrupt:
		return s.v.MergeError()
	}
	return fmt.Errorf("%s is merged to %.1f %%, the same command goes on: %w", s.cfg.Base, st.Percent, context.Canceled)
}

func (s *session) close() error {
	var errs []error
	if s.v != nil {
		errs = append(errs, s.v.Close(), s.release())
	}
	if s.lock != nil {
		errs = append(errs, s.lock.Close())
	}
	return errors.Join(errs...)
}

// release takes the mark of an unfinished merge off a base that was only looked
// at, so that other commands may have it.
func (s *session) release() error {
	rec := s.v.Record()
	if !rec.ReadOnly || len(rec.Layers) == 0 || rec.Merged > 0 {
		return nil
	}
	j, err := merge.OpenJournal(blockio.OS(), filepath.Join(s.cfg.volumeDir(), "journal"))
	if err != nil {
		return err
	}
	defer j.Close()
	if j.InProgress() {
		return nil
	}
	base, err := blockio.OS().Open(rec.Base, 0)
	if err != nil {
		return err
	}
	defer base.Close()
	id, err := merge.Claim(base)
	if err != nil || id != j.ID() {
		return err
	}
	return merge.ReleaseBase(base)
}
