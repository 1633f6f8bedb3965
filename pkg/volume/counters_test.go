package volume

import (
	"math/rand/v2"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/snapmerge/snapmerge/pkg/blockio/crashfs"
	"github.com/snapmerge/snapmerge/test/cowgen"
)

// TestCounters: requests are counted with where their bytes came from and went
// to, background work with what it did, over the end of a layer.
func TestCounters(t *testing.T) {
	fs, v, _ := restoredVolume(t, rand.NewPCG(1, 2), cowgen.Spec{Blocks: 16, Copies: 5, Xors: 2, Replaces: 2, Zeros: 1})
	defer v.Close()
	if _, err := v.WriteAt(make([]byte, 3*bs), 0); err != nil {
		t.Fatal(err)
	}
	if err := v.Zero(4*bs, bs); err != nil {
		t.Fatal(err)
	}
	if _, err := v.WriteAt(make([]byte, bs), 16*bs); err == nil {
		t.Fatal("a write behind the end was taken")
	}
	want, err := readAll(v)
	if err != nil {
		t.Fatal(err)
	}
	c := v.Counters()
	if c.Write.Done != 2 || c.Write.Errors != 1 || c.Write.Bytes != 3*bs || c.ToLog != 3*bs || c.ToBase != 0 {
		t.Errorf("a write to the log and one that failed: %+v", c)
	}
	if c.Zero.Done != 1 || c.Zero.Bytes != bs || c.Read.Done != 1 || c.Read.Bytes != 16*bs || c.Read.Seconds <= 0 {
		t.Errorf("a zero and a read: %+v", c)
	}
	// Four blocks are in the log. Of the others, those that replace and zero ops
	// write come from the COW, and those of copies from the base.
	if c.FromLog != 4*bs || c.FromCOW == 0 || c.FromCOW > 3*bs || c.FromLog+c.FromCOW+c.FromBase < 16*bs {
		t.Errorf("from the log %d, the COW %d, the base %d", c.FromLog, c.FromCOW, c.FromBase)
	}

	fs.OnStep(func(s crashfs.Step) error {
		if strings.HasSuffix(s.Name, "/base") && s.Op == crashfs.OpWrite {
			return syscall.ENOSPC
		}
		return nil
	})
	for range 3 {
		if _, err := v.Step(t.Context()); err == nil {
			t.Fatal("merged without room")
		}
	}
	fs.OnStep(nil)
	if c = v.Counters(); c.Stalls != 1 || c.Failures != 3 || v.Status().State != Stalled {
		t.Errorf("one lack of room, met three times: %+v", c)
	}

	if err := finish(v, want); err != nil {
		t.Fatal(err)
	}
	end := v.Counters()
	// 7 ordered ops in windows of 3; nothing is written for the zero op.
	if end.MergeWindows < 3 || end.MergeWritten < 9*bs || end.MergeRead == 0 || end.MergeFlushes < end.MergeWindows {
		t.Errorf("merge: %+v", end)
	}
	if end.Folded != 3*bs { // the fourth is zeros
		t.Errorf("%d bytes folded", end.Folded)
	}
	if _, err := v.WriteAt(make([]byte, bs), 0); err != nil {
		t.Fatal(err)
	}
	if got := v.Counters(); got.ToBase != bs || got.MergeWritten != end.MergeWritten {
		t.Errorf("a write to a merged volume: %+v", got)
	}
}

// TestEncodes: an encoding shows how far it is, as long as it runs.
func TestEncodes(t *testing.T) {
	cfg := managerConfig(crashfs.New("/n"))
	var m *Manager
	var seen atomic.Pointer[EncodeStatus]
	var cut atomic.Bool
	cfg.Capacity = func() (int64, int64, error) {
		if cut.Load() { // else m is not there yet
			for _, e := range m.Encodes() {
				seen.Store(&e)
			}
		}
		return 1 << 40, 1 << 40, nil
	}
	m, err := OpenManager(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	claim := Claim{Namespace: "shop", PVC: "data"}
	const size = 3 * roomStep // so that the encoder looks for room again in the middle
	v, err := m.CreateVolume(t.Context(), VolumeSpec{ID: "v", Size: size, Claim: claim})
	if err != nil {
		t.Fatal(err)
	}
	p := make([]byte, 1<<20)
	for off := int64(0); off < size; off += int64(len(p)) {
		if _, err := v.WriteAt(p, off); err != nil {
			t.Fatal(err)
		}
	}
	spec := SnapshotSpec{ID: "s", Volume: "v", Freeze: func() (func(), error) { cut.Store(true); return func() {}, nil }}
	if _, err := m.CreateSnapshot(spec); err != nil {
		t.Fatal(err)
	}
	if r, err := m.WaitSnapshot(t.Context(), "s"); err != nil || r.COW == nil {
		t.Fatalf("%+v, %v", r, err)
	}
	e := seen.Load()
	if e == nil || e.Snapshot != "s" || e.Volume != "v" || e.Claim != claim || e.Total != size || e.Done < roomStep-1<<20 || e.Done >= size {
		t.Errorf("in the middle: %+v", e)
	}
	if all := m.Encodes(); len(all) != 0 {
		t.Errorf("afterwards: %+v", all)
	}
}
