package nodebench

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/snapmerge/snapmerge/pkg/admin"
	"github.com/snapmerge/snapmerge/pkg/bench"
	"github.com/snapmerge/snapmerge/pkg/localnode"
	"github.com/snapmerge/snapmerge/pkg/volume"
)

// ForegroundOptions say what a pod does beside a merge.
type ForegroundOptions struct {
	Load string // Fio or Pgbench
	// Size is that of the volumes in bytes. Fill is how much more data there is to be
	// merged than the load needs, so that a merge lasts for as long as it is looked at.
	Size, Fill int64
	Time       time.Duration // of one measurement; whole seconds
	Pairs      int           // how often everything is measured, in turn
	// Peer measures block-stream of qemu-storage-daemon, too.
	Peer bool
	// Binary is the snapmerge program, Args are more arguments of its node plugin.
	Binary string
	Args   []string
	// Dir takes the files; it must be there.
	Dir  string
	Note func(format string, args ...any)
}

// What a load is measured beside.
const (
	NoMerge      = "none"
	Merge        = "merge"
	NoMergeAgain = "none again" // compared with NoMerge, that shows the noise
	NoStream     = "qemu, none"
	Stream       = "qemu, block-stream" // compared with NoStream
)

// kinds are all of them, with what each is compared with. Those that are compared
// are measured one after the other.
var kinds = []struct{ kind, with string }{
	{NoMerge, NoMerge}, {Merge, NoMerge}, {NoMergeAgain, NoMerge}, {NoStream, NoStream}, {Stream, NoStream},
}

// foreground is the state of one call of MeasureForeground.
type foreground struct {
	o    ForegroundOptions
	load load
	node *localnode.Node
	qemu *qemu

	source string // volume, with nothing to be merged
	// Snapshots: small has what the load needs, large also what is only merged.
	small, large string
	made         int // volumes
}

// load is what a pod does.
type load interface {
	// prepare makes its files in a volume that is mounted at dir.
	prepare(ctx context.Context, dir string) error
	// run does it for that time, there or where a copy is mounted. begin is called once,
	// when it has started or is about to.
	run(ctx context.Context, dir string, d time.Duration, begin func() error) (sample, error)
}

// sample is what was measured once.
type sample struct {
	rate float64 // requests or transactions per second
	// p99 is what all but one in a hundred took at most, in µs, for each name of the
	// load's.
	p99 map[string]float64

	moved float64 // by the merge, MiB/s
	ended bool    // the merge was over before the load was
}

// MeasureForeground measures a load in the file system of a restored volume while
// nothing is merged, while that volume is merged, and while another one is; with Peer
// likewise on disks of qemu-storage-daemon. At last a volume is merged to its end under
// the load.
func MeasureForeground(ctx context.Context, o ForegroundOptions) (results []Foreground, ended time.Duration, err error) {
	if o.Dir, err = os.MkdirTemp(o.Dir, "foreground-"); err != nil {
		return nil, 0, err
	}
	f := &foreground{o: o}
	defer func() { err = errors.Join(err, f.cleanUp(err)) }()
	// The load may be another user's.
	if err := os.Chmod(o.Dir, 0o711); err != nil {
		return nil, 0, err
	}
	if err := f.prepare(ctx); err != nil {
		return nil, 0, err
	}
	for _, neighbour := range []bool{false, true} {
		r, err := f.measure(ctx, neighbour)
		if err != nil {
			return nil, 0, err
		}
		results = append(results, r...)
	}
	ended, err = f.untilMerged(ctx)
	return results, ended, err
}

func (f *foreground) cleanUp(failed error) error {
	var err error
	if f.qemu != nil {
		err = f.qemu.close()
	}
	return errors.Join(err, cleanUp(f.node, f.o.Dir, errors.Join(failed, err)))
}

// prepare makes the source, the snapshots, and the peer's image.
func (f *foreground) prepare(ctx context.Context) (err error) {
	if f.load, err = newLoad(f.o); err != nil {
		return err
	}
	if f.o.Peer {
		if f.qemu, err = newQemu(f.o.Dir); err != nil {
			return err
		}
	}
	if f.node, err = localnode.Open(ctx, f.o.Binary, f.o.Dir, f.o.Args...); err != nil {
		return err
	}
	if err := os.Chmod(f.node.Path("pods"), 0o711); err != nil {
		return err
	}
	f.o.Note("making what %s works on, and %d MiB more", f.o.Load, f.o.Fill/mib)
	if f.source, err = f.node.Create(ctx, "source", f.o.Size, "", localnode.Ext4(), nil); err != nil {
		return err
	}
	if f.small, err = f.change(ctx, "small", func(dir string) error { return f.load.prepare(ctx, dir) }); err != nil {
		return err
	}
	f.large, err = f.change(ctx, "large", func(dir string) error { return fill(ctx, filepath.Join(dir, "fill"), f.o.Fill) })
	if err != nil || f.qemu == nil {
		return err
	}
	return f.qemu.prepare(ctx, f.node.Path("state", "volumes", f.source, "base.img"))
}

// change changes what is in the source and makes a snapshot of it.
func (f *foreground) change(ctx context.Context, name string, do func(dir string) error) (snapshot string, err error) {
	dir, err := f.node.Use(ctx, f.source, localnode.Ext4())
	if err != nil {
		return "", err
	}
	if err := errors.Join(do(dir), f.node.Leave(ctx, f.source)); err != nil {
		return "", err
	}
	if snapshot, err = f.node.Snapshot(ctx, name, f.source); err != nil {
		return "", err
	}
	// What was written meanwhile is folded before the volume is used again.
	_, err = f.wait(ctx, f.source, time.Minute, func(s volume.Status) bool { return s.Layers == 0 })
	return snapshot, err
}

func (f *foreground) admin() *admin.Client { return admin.NewClient(f.node.AdminSocket()) }

// wait waits until the status of a volume is as wanted.
func (f *foreground) wait(ctx context.Context, id string, limit time.Duration, ok func(s volume.Status) bool) (took time.Duration, err error) {
	for start := time.Now(); ; {
		s, err := f.admin().Get(ctx, id)
		took := time.Since(start)
		switch {
		case err != nil || ok(s):
			return took, err
		case s.Error != "" || took > limit:
			return took, fmt.Errorf("volume %s is %s at %.1f %% after %v, with %d layers: %s", id, s.State, s.Percent, took.Round(time.Second), s.Layers, s.Error)
		}
		select {
		case <-ctx.Done():
			return took, ctx.Err()
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// restore makes a volume of a snapshot, with its merge paused.
func (f *foreground) restore(ctx context.Context, snapshot string) (id string, err error) {
	f.made++
	// At the lowest rate next to nothing is merged before it is paused.
	id, err = f.node.Create(ctx, fmt.Sprintf("restored-%d", f.made), f.o.Size, snapshot, localnode.Ext4(), map[string]string{"mergeRate": "1"})
	if err == nil {
		_, err = f.admin().SetPaused(ctx, id, true)
	}
	if err == nil {
		_, err = f.admin().SetRate(ctx, id, 0)
	}
	return id, err
}

// resume lets a merge go on.
func (f *foreground) resume(ctx context.Context, id string) error {
	_, err := f.admin().SetPaused(ctx, id, false)
	return err
}

// measure measures everything in turn.
func (f *foreground) measure(ctx context.Context, neighbour bool) ([]Foreground, error) {
	samples := map[string][]sample{}
	for i := range f.o.Pairs {
		for _, k := range kinds {
			var (
				s   sample
				err error
			)
			switch k.kind {
			case NoStream, Stream:
				if f.qemu == nil {
					continue
				}
				s, err = f.qemu.slice(ctx, f.load, f.o.Time, k.kind == Stream, neighbour)
			default:
				s, err = f.slice(ctx, k.kind == Merge, neighbour)
			}
			if err != nil {
				return nil, fmt.Errorf("%s: %w", k.kind, err)
			}
			f.o.Note("%d of %d, %s%s: %.0f a second, p99 %s µs, moved %.1f MiB/s", i+1, f.o.Pairs, k.kind, where(neighbour), s.rate, s.text(), s.moved)
			samples[k.kind] = append(samples[k.kind], s)
		}
	}
	return f.results(samples, neighbour), nil
}

// slice measures the load once, on a volume that was just restored or beside one.
func (f *foreground) slice(ctx context.Context, merge, neighbour bool) (s sample, err error) {
	restored, err := f.restore(ctx, f.large)
	if err != nil {
		return s, err
	}
	used := restored
	if neighbour {
		used = f.source
	}
	dir, err := f.node.Use(ctx, used, localnode.Ext4())
	if err != nil {
		return s, err
	}
	var begun time.Time
	s, err = f.load.run(ctx, dir, f.o.Time, func() error {
		begun = time.Now()
		if !merge {
			return nil
		}
		return f.resume(ctx, restored)
	})
	if err != nil {
		return s, err
	}
	st, err := f.admin().Get(ctx, restored)
	if err != nil {
		return s, err
	}
	s.moved, s.ended = float64(st.BytesDone)/mib/time.Since(begun).Seconds(), merge && st.BytesDone == st.BytesTotal
	// A guest that waits for its last writes need not wait for the merge, too.
	if _, err := f.admin().SetPaused(ctx, restored, true); err != nil {
		return s, err
	}
	return s, errors.Join(f.node.Leave(ctx, used), f.node.Delete(ctx, restored))
}

// mergeLimit is how long a merge to the end may take under the load.
const mergeLimit = 5 * time.Minute

// untilMerged tells how long the merge of a small volume takes, from its first byte
// to the last layer being gone, while the load never ends.
func (f *foreground) untilMerged(ctx context.Context) (took time.Duration, err error) {
	id, err := f.restore(ctx, f.small)
	if err != nil {
		return 0, err
	}
	dir, err := f.node.Use(ctx, id, localnode.Ext4())
	if err != nil {
		return 0, err
	}
	loaded, endLoad := context.WithCancel(ctx)
	defer endLoad()
	merged := make(chan error, 1)
	_, err = f.load.run(loaded, dir, 2*mergeLimit, func() error {
		go func() {
			var err error
			took, err = f.wait(ctx, id, mergeLimit, func(s volume.Status) bool { return s.BytesDone == s.BytesTotal && s.Layers == 0 })
			merged <- err
			endLoad()
		}()
		return f.resume(ctx, id)
	})
	if loaded.Err() == nil {
		return 0, fmt.Errorf("load beside a merge: %w", err) // it ends after the merge
	}
	err = <-merged
	if err != nil {
		return 0, fmt.Errorf("merge under the load: %w", err)
	}
	f.o.Note("merged to the end under the load in %v", took.Round(100*time.Millisecond))
	return took, errors.Join(f.node.Leave(ctx, id), f.node.Delete(ctx, id))
}

// fill makes a file of data that hardly packs, and makes it durable.
func fill(ctx context.Context, name string, size int64) (err error) {
	f, err := os.Create(name)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	p := make([]byte, mib)
	for n := int64(0); n < size; n += mib {
		if err := ctx.Err(); err != nil {
			return err
		}
		randomize(p, uint64(n))
		if _, err := f.Write(p); err != nil {
			return err
		}
	}
	return unix.Fsync(int(f.Fd()))
}

// MinSize is the least size of a volume beyond what it is filled with, in bytes.
const MinSize = 1 << 30

// newLoad makes the load of that name.
func newLoad(o ForegroundOptions) (load, error) {
	if o.Load == Fio {
		return fio{}, bench.FindFio()
	}
	return newPostgres(o.Dir)
}
