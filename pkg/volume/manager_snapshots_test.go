package volume

import (
	"context"
	"errors"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/snapmerge/snapmerge/pkg/blockio/crashfs"
	"github.com/snapmerge/snapmerge/pkg/snapshot"
)

// TestSnapshotWithoutRoom: an encoder leaves the reserve alone, and nobody is
// frozen again before there is more room than was not enough.
func TestSnapshotWithoutRoom(t *testing.T) {
	const total = 100 << 30
	const reserve = total / 20
	var free, used atomic.Int64 // used by others once the snapshot is being encoded
	cfg := managerConfig(crashfs.New("/n"))
	cfg.Capacity = func() (int64, int64, error) {
		now := free.Load()
		free.Add(-used.Swap(0))
		return now, total, nil
	}
	m, _ := writtenVolume(t, cfg)
	freezes, takes := 0, int64(0)
	spec := SnapshotSpec{ID: "s", Name: "s", Volume: "v", Freeze: func() (func(), error) {
		freezes++
		return func() { used.Store(takes) }, nil
	}}
	snap := func() (snapshot.Record, error) {
		if _, err := m.CreateSnapshot(spec); err != nil {
			return snapshot.Record{}, err
		}
		return m.WaitSnapshot(t.Context(), "s")
	}
	for name, bytes := range map[string]int64{"nothing": 0, "the reserve": reserve + minSnapshotRoom - 1} {
		free.Store(bytes)
		if _, err := snap(); !errors.Is(err, ErrPoolFull) || freezes != 0 {
			t.Errorf("%s is free: %v, %d freezes", name, err, freezes)
		}
	}
	const begin = reserve + 1<<30
	free.Store(begin)
	takes = 1 << 30
	r, err := snap()
	if err != nil || r.State != snapshot.Failed || !strings.Contains(r.Message, ErrPoolFull.Error()) {
		t.Fatalf("%+v, %v", r, err)
	}
	for _, bytes := range []int64{reserve, begin, begin + minSnapshotRoom - 1} {
		free.Store(bytes)
		if _, err := snap(); !errors.Is(err, ErrPoolFull) || freezes != 1 {
			t.Errorf("%d bytes are free: %v, %d freezes", bytes, err, freezes)
		}
	}
	if r, err := m.Snapshot("s"); err != nil || r.State != snapshot.Failed {
		t.Errorf("the record of the failure is gone: %+v, %v", r, err)
	}
	takes = 0
	free.Store(begin + minSnapshotRoom)
	if r, err := snap(); err != nil || r.State != snapshot.Ready || freezes != 2 {
		t.Errorf("%+v, %v, %d freezes", r, err, freezes)
	}
}

// writtenVolume is a manager with a volume "v" that was written to.
func writtenVolume(t *testing.T, cfg ManagerConfig) (*Manager, *Volume) {
	t.Helper()
	m, err := OpenManager(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Close() })
	v, err := m.CreateVolume(t.Context(), VolumeSpec{ID: "v", Size: nodeVolume})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := v.WriteAt(make([]byte, bs), 0); err != nil {
		t.Fatal(err)
	}
	return m, v
}

// TestSnapshotEndsOnFullDisk: how a snapshot has ended is recorded as soon as there is
// room for that, also if it is another's by then, for its volume was deleted.
func TestSnapshotEndsOnFullDisk(t *testing.T) {
	for name, c := range map[string]struct {
		file   string
		skip   int64 // writes to it that succeed
		delete bool  // the volume, before the first failure is over
	}{
		"record of the snapshot": {"/n/snapshots/s/snapshot.json.tmp", 1, false},
		"record of the volume":   {"/n/volumes/v/volume.json.tmp", 1, false},
		"deleted meanwhile":      {"/n/snapshots/s/snapshot.json.tmp", 1, true},
	} {
		t.Run(name, func(t *testing.T) {
			fs := crashfs.New("/n")
			m, v := writtenVolume(t, managerConfig(fs))
			var writes, failed atomic.Int64
			first := make(chan struct{})
			fs.OnStep(func(s crashfs.Step) error {
				if s.Op != crashfs.OpWrite || s.Name != c.file || writes.Add(1) <= c.skip || failed.Load() == 2 {
					return nil
				}
				if failed.Add(1) == 1 {
					close(first)
				}
				return syscall.ENOSPC
			})
			if _, err := m.CreateSnapshot(SnapshotSpec{ID: "s", Name: "s", Volume: "v"}); err != nil {
				t.Fatal(err)
			}
			if c.delete {
				<-first
				if err := m.DeleteVolume("v"); err != nil {
					t.Fatal(err)
				}
			}
			r, err := m.WaitSnapshot(t.Context(), "s")
			if err != nil || r.State != snapshot.Ready || failed.Load() != 2 {
				t.Errorf("%+v, %v after %d failures and %d writes", r, err, failed.Load(), writes.Load())
			}
			if c.delete {
				if found, err := fs.Exists("/n/snapshots/s/" + orphanDir); err != nil || found {
					t.Errorf("the orphan is still there (%v, %v)", found, err)
				}
			} else if cut := v.Record().Cut; cut != nil {
				t.Errorf("the volume is still cut: %+v", cut)
			}
		})
	}
}

// TestFailedSnapshotAgain: a snapshot that has failed is not made anew before its cut is
// ended, which is tried again and again on a full disk. It would be of that cut, and the
// end of it would come while it is encoded.
func TestFailedSnapshotAgain(t *testing.T) {
	fs := crashfs.New("/n")
	m, v := writtenVolume(t, managerConfig(fs))
	var broken, records atomic.Int64
	var full atomic.Bool
	full.Store(true)
	refused := make(chan struct{}, 100)
	fs.OnStep(func(s crashfs.Step) error {
		switch {
		case s.Op != crashfs.OpWrite:
		case strings.Contains(s.Name, "data.cow") && broken.Add(1) == 1:
			return syscall.EIO
		case s.Name == "/n/volumes/v/volume.json.tmp" && records.Add(1) > 1 && full.Load(): // the first is the cut
			refused <- struct{}{}
			return syscall.ENOSPC
		}
		return nil
	})
	freezes := 0
	spec := SnapshotSpec{ID: "s", Name: "s", Volume: "v", Freeze: func() (func(), error) {
		freezes++
		return func() {}, nil
	}}
	if _, err := m.CreateSnapshot(spec); err != nil {
		t.Fatal(err)
	}
	<-refused
	if r, err := m.CreateSnapshot(spec); err != nil || r.State != snapshot.Failed {
		t.Fatalf("before the end of its cut: %+v, %v", r, err)
	}
	full.Store(false)
	if r, err := m.WaitSnapshot(t.Context(), "s"); err != nil || r.State != snapshot.Failed || v.Record().Cut != nil {
		t.Fatalf("%+v, %v, cut %+v", r, err, v.Record().Cut)
	}
	if _, err := m.CreateSnapshot(spec); err != nil {
		t.Fatal(err)
	}
	if r, err := m.WaitSnapshot(t.Context(), "s"); err != nil || r.State != snapshot.Ready || freezes != 2 {
		t.Errorf("made anew: %+v, %v, %d freezes", r, err, freezes)
	}
}

// TestDeletedSnapshotEndsCut: the cut of a snapshot that is deleted is ended as soon as
// there is room for that, and does not outlast its volume.
func TestDeletedSnapshotEndsCut(t *testing.T) {
	for _, deleteVolume := range []bool{false, true} {
		fs := crashfs.New("/n")
		m, v := writtenVolume(t, managerConfig(fs))
		var records, refused atomic.Int64
		var room atomic.Bool
		fs.OnStep(func(s crashfs.Step) error {
			if s.Op == crashfs.OpWrite && s.Name == "/n/volumes/v/volume.json.tmp" && records.Add(1) > 1 && !room.Load() { // the first is the cut
				refused.Add(1)
				return syscall.ENOSPC
			}
			return nil
		})
		var encoded atomic.Bool
		v.onPace = func(ctx context.Context) {
			if !encoded.Load() {
				<-ctx.Done()
			}
		}
		if _, err := m.CreateSnapshot(SnapshotSpec{ID: "s", Name: "s", Volume: "v"}); err != nil {
			t.Fatal(err)
		}
		if err := m.DeleteSnapshot("s"); err != nil || refused.Load() == 0 {
			t.Fatalf("%v after %d failures", err, refused.Load())
		}
		for _, id := range []string{"s", "other"} {
			if r, err := m.CreateSnapshot(SnapshotSpec{ID: id, Name: id, Volume: "v"}); !errors.Is(err, syscall.ENOSPC) {
				t.Errorf("snapshot %s of the old cut: %+v, %v", id, r, err)
			}
		}
		encoded.Store(true)
		if deleteVolume {
			if err := m.DeleteVolume("v"); err != nil {
				t.Fatal(err)
			}
		}
		room.Store(!deleteVolume)
		m.wg.Wait()
		if cut := v.Record().Cut; !deleteVolume && cut != nil {
			t.Errorf("the volume is still cut: %+v", cut)
		}
	}
}

// TestSnapshotGoesOn: a snapshot that an earlier process was at goes on although the
// disk is full at the start, and as soon as a volume can be opened that could not be then.
func TestSnapshotGoesOn(t *testing.T) {
	const base, away = "/n/volumes/v/base.img", "/n/away"
	for name, c := range map[string]struct {
		full, away bool
		delete     bool // the volume before the restart
	}{
		"full disk":                 {full: true},
		"full disk, volume deleted": {full: true, delete: true},
		"opened later":              {away: true},
		"opened later, full disk":   {away: true, full: true},
	} {
		t.Run(name, func(t *testing.T) {
			fs := crashfs.New("/n")
			m, v := writtenVolume(t, managerConfig(fs))
			v.onPace = func(ctx context.Context) { <-ctx.Done() }
			if _, err := m.CreateSnapshot(SnapshotSpec{ID: "s", Name: "s", Volume: "v"}); err != nil {
				t.Fatal(err)
			}
			if c.delete {
				if err := m.DeleteVolume("v"); err != nil {
					t.Fatal(err)
				}
			}
			if err := m.Close(); err != nil {
				t.Fatal(err)
			}
			if c.away {
				if err := fs.Rename(base, away); err != nil {
					t.Fatal(err)
				}
			}
			var refused atomic.Int64
			fs.OnStep(func(s crashfs.Step) error {
				if c.full && s.Op == crashfs.OpWrite && s.Name == "/n/snapshots/s/snapshot.json.tmp" && refused.Add(1) <= 2 {
					return syscall.ENOSPC
				}
				return nil
			})
			m, err := OpenManager(t.Context(), managerConfig(fs))
			if err != nil {
				t.Fatal(err)
			}
			defer m.Close()
			if c.away {
				if err := fs.Rename(away, base); err != nil {
					t.Fatal(err)
				}
				if _, err := m.Open(t.Context(), "v"); err != nil {
					t.Fatal(err)
				}
			}
			if r, err := m.WaitSnapshot(t.Context(), "s"); err != nil || r.State != snapshot.Ready || r.CreatedAt.IsZero() {
				t.Errorf("%+v, %v", r, err)
			}
			if v, err := m.Get("v"); !c.delete && (err != nil || v.Record().Cut != nil) {
				t.Errorf("the volume is still cut, or gone: %v", err)
			}
		})
	}
}

// TestEncodingOfGoneSnapshot: an encoding that was begun beside the deletion of its
// snapshot ends, and so does its cut.
func TestEncodingOfGoneSnapshot(t *testing.T) {
	m, v := writtenVolume(t, managerConfig(crashfs.New("/n")))
	gone := make(chan struct{})
	v.onPace = func(context.Context) { <-gone }
	if _, err := m.CreateSnapshot(SnapshotSpec{ID: "s", Name: "s", Volume: "v"}); err != nil {
		t.Fatal(err)
	}
	if err := m.store.Delete("s"); err != nil {
		t.Fatal(err)
	}
	close(gone)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if r, err := m.WaitSnapshot(ctx, "s"); !errors.Is(err, snapshot.ErrNotFound) || ctx.Err() != nil {
		t.Errorf("%+v, %v, %v", r, err, ctx.Err())
	}
	if cut := v.Record().Cut; cut != nil {
		t.Errorf("the volume is still cut: %+v", cut)
	}
}

func TestCapacity(t *testing.T) {
	for _, c := range []struct{ free, total, wantFree, wantTotal int64 }{
		{100 << 30, 100 << 30, 95 << 30, 95 << 30},
		{4 << 30, 100 << 30, 0, 95 << 30},
		{1 << 40, 2 << 40, 1<<40 - 8<<30, 2<<40 - 8<<30}, // 8 GiB at most
	} {
		cfg := managerConfig(crashfs.New("/n"))
		cfg.Capacity = func() (int64, int64, error) { return c.free, c.total, nil }
		m := &Manager{cfg: cfg}
		if free, total, err := m.Capacity(); free != c.wantFree || total != c.wantTotal || err != nil {
			t.Errorf("%d of %d: %d of %d, %v", c.free, c.total, free, total, err)
		}
	}
}
