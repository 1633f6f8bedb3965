package volume

import (
	"errors"
	"path"
	"runtime"
	"slices"
	"sync/atomic"
	"syscall"
	"testing"
	"weak"

	"github.com/snapmerge/snapmerge/pkg/blockio"
	"github.com/snapmerge/snapmerge/pkg/blockio/crashfs"
	"github.com/snapmerge/snapmerge/pkg/volume/pacing"
)

// noFilesFS cannot open journals for writing while it is told so.
type noFilesFS struct {
	blockio.FS
	on atomic.Bool
}

func (f *noFilesFS) Open(name string, flag blockio.Flag) (blockio.File, error) {
	if f.on.Load() && path.Base(name) == journalName && flag&blockio.Create == 0 {
		return nil, syscall.EMFILE
	}
	return f.FS.Open(name, flag)
}

// TestCreateVolumeAgain: a volume that is durable, but could not be opened after
// that, is there; whoever asks for it again gets it as soon as it can be opened.
func TestCreateVolumeAgain(t *testing.T) {
	fs := &noFilesFS{FS: crashfs.New("/n")}
	m, err := OpenManager(t.Context(), managerConfig(fs))
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	fs.on.Store(true)
	for range 2 {
		if _, err := m.CreateVolume(t.Context(), VolumeSpec{ID: "v", Size: nodeVolume}); !errors.Is(err, syscall.EMFILE) {
			t.Fatalf("error %v", err)
		}
		if _, err := m.Get("v"); !errors.Is(err, syscall.EMFILE) {
			t.Errorf("error %v", err)
		}
	}
	if _, err := m.Open(t.Context(), "v"); !errors.Is(err, syscall.EMFILE) {
		t.Errorf("error %v", err)
	}
	if _, err := m.CreateVolume(t.Context(), VolumeSpec{ID: "unused", Size: nodeVolume}); err == nil {
		t.Error("no error")
	}
	if err := m.DeleteVolume("unused"); err != nil {
		t.Error(err)
	}
	if ok, err := fs.Exists("/n/volumes/unused"); ok || err != nil {
		t.Errorf("what was deleted is there: %v, %v", ok, err)
	}
	fs.on.Store(false)
	v, err := m.CreateVolume(t.Context(), VolumeSpec{ID: "v", Size: nodeVolume})
	if err != nil {
		t.Fatal(err)
	}
	if again, err := m.Get("v"); again != v || err != nil {
		t.Errorf("%v, %v", again, err)
	}
	if _, err := m.CreateVolume(t.Context(), VolumeSpec{ID: "v", Name: "other", Size: nodeVolume}); !errors.Is(err, ErrConflict) {
		t.Errorf("error %v", err)
	}
}

// TestDeletedIsForgotten: nothing of the node holds a volume that was deleted.
func TestDeletedIsForgotten(t *testing.T) {
	cfg := managerConfig(crashfs.New("/n"))
	cfg.Pacing = pacing.NewNode("/", 0)
	m, err := OpenManager(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	v, err := m.CreateVolume(t.Context(), VolumeSpec{ID: "v", Size: nodeVolume})
	if err != nil {
		t.Fatal(err)
	}
	deleted := weak.Make(v)
	if err := m.DeleteVolume("v"); err != nil {
		t.Fatal(err)
	}
	m.wg.Wait()
	runtime.GC()
	if deleted.Value() != nil {
		t.Error("it is still in memory")
	}
}

// TestBeingMade: a volume that is not there yet has not failed.
func TestBeingMade(t *testing.T) {
	fs := crashfs.New("/n")
	m, err := OpenManager(t.Context(), managerConfig(fs))
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	var seen []State
	fs.OnStep(func(crashfs.Step) error {
		if s, err := m.Status("v"); err == nil {
			seen = append(seen, s.State)
		}
		return nil
	})
	if _, err := m.CreateVolume(t.Context(), VolumeSpec{ID: "v", Size: nodeVolume}); err != nil {
		t.Fatal(err)
	}
	fs.OnStep(nil)
	if len(seen) == 0 || slices.ContainsFunc(seen, func(s State) bool { return s != Unstaged }) {
		t.Errorf("states %q", seen)
	}
}
