package volume

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"k8s.io/klog/v2"

	"github.com/snapmerge/snapmerge/pkg/blockio"
	"github.com/snapmerge/snapmerge/pkg/blockio/crashfs"
	"github.com/snapmerge/snapmerge/pkg/cow"
	"github.com/snapmerge/snapmerge/pkg/readahead"
	"github.com/snapmerge/snapmerge/test/cowgen"
)

// TestAheadShared: of volumes with one COW, by hard link, the first that is read
// unpacks it for all, but for the parts with ordered ops. Another file of the same
// content is unpacked by itself, and so is the base.
func TestAheadShared(t *testing.T) {
	const blocks = 640
	spec := cowgen.Spec{Blocks: blocks, Replaces: 60, Zeros: 20, MaxBlock: 16 * bs, Compression: cow.LZ4}
	mixed := spec
	mixed.Copies, mixed.Xors = 50, 20
	for name, c := range map[string]struct {
		spec   cowgen.Spec
		copied bool // a file each
		shared string
	}{
		"one COW": {spec, false, "all"}, "two files": {spec, true, ""}, "ordered ops": {mixed, false, "some"},
	} {
		t.Run(name, func(t *testing.T) {
			im, err := cowgen.Make(rand.New(rand.NewPCG(5, 6)), c.spec)
			if err != nil {
				t.Fatal(err)
			}
			fs := crashfs.New("/s")
			ahead := readahead.NewManager(readahead.Config{Mode: readahead.Async, Window: 4 * readahead.ChunkBytes})
			defer ahead.Close()
			var volumes []*Volume
			for i := range 3 {
				base, cow := fmt.Sprintf("/s/base%d", i), "/s/one.cow"
				if c.copied {
					cow = fmt.Sprintf("/s/%d.cow", i)
				}
				err := fs.Put(base, im.Base)
				if i == 0 || c.copied {
					err = errors.Join(err, fs.Put(cow, im.COW))
				}
				if err != nil {
					t.Fatal(err)
				}
				dir := fmt.Sprintf("/s/v%d", i)
				err = Create(fs, dir, Spec{ID: dir[3:], Size: blocks * bs, Base: base, COWs: []COWSource{{Path: cow, Link: true}}})
				if err != nil {
					t.Fatal(err)
				}
				v, err := Open(Config{FS: fs, Dir: dir, IO: blockio.Sync, ReadAhead: ahead, Log: klog.Background()})
				if err != nil {
					t.Fatal(err)
				}
				defer func() {
					if err := v.Close(); err != nil {
						t.Error(err)
					}
				}()
				volumes = append(volumes, v)
			}
			var loaded uint64 // by the first
			for i, v := range volumes {
				for off := int64(0); off < blocks*bs; off += bs {
					p := make([]byte, bs)
					if _, err := v.ReadAt(p, off); err != nil {
						t.Fatal(err)
					}
					if !bytes.Equal(p, im.Want[off:off+bs]) {
						t.Fatalf("volume %d: block %d differs", i, off/bs)
					}
				}
				if st := ahead.Stats(); i == 0 {
					loaded = st.Blocks
				} else {
					base := blocks - v.stack.Load().layers[0].cow.Ops.TargetBlocks()
					again := (st.Blocks - loaded) / uint64(i) // by each of the others
					want := map[string]bool{"all": again <= base, "some": again > base && again < loaded, "": again == loaded}[c.shared]
					if !want || (st.Shared > 0) != (c.shared != "") {
						t.Errorf("%d blocks were read ahead for the first volume, %d for each other one, %d are the base's; %d reads shared", loaded, again, base, st.Shared)
					}
				}
			}
			if loaded == 0 {
				t.Error("nothing was read ahead")
			}
		})
	}
}

// TestStressShared: volumes restored from one snapshot are written, read and
// merged at once, each at its own rate; what they read ahead for each other is
// never older than a write, nor another's.
func TestStressShared(t *testing.T) {
	blocks := 2400
	if testing.Short() {
		blocks = 800
	}
	original := make([]byte, blocks*bs)
	rng := rand.New(rand.NewPCG(4, 5))
	for i := 0; i < len(original); i += 16 {
		original[i], original[i+1] = byte(rng.Uint32()), byte(rng.Uint32())
	}
	cfg := ManagerConfig{FS: blockio.OS(), StateDir: t.TempDir(), Init: true, IO: blockio.Auto, Log: klog.Background().V(9),
		ReadAhead: readahead.Config{Mode: readahead.Async, Memory: 16 * readahead.ChunkBytes, Window: 2 * readahead.ChunkBytes,
			MaxWindow: 6 * readahead.ChunkBytes, Expiry: 20 * time.Millisecond}}
	m, err := OpenManager(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	}()
	v, err := m.CreateVolume(t.Context(), VolumeSpec{ID: "v", Size: int64(len(original))})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := v.WriteAt(original, 0); err != nil {
		t.Fatal(err)
	}
	if _, err := m.CreateSnapshot(SnapshotSpec{ID: "s", Volume: "v"}); err != nil {
		t.Fatal(err)
	}
	if _, err := m.WaitSnapshot(t.Context(), "s"); err != nil {
		t.Fatal(err)
	}
	var all []*guests
	for i := range 3 {
		r, err := m.CreateVolume(t.Context(), VolumeSpec{ID: fmt.Sprintf("r%d", i), Size: v.Size(), Snapshot: "s", Rate: 2 + 2*i})
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, startGuests(r, original, 2))
	}
	for _, g := range all {
		waitIdle(t, g.v, 5*time.Minute)
		if err := g.end(); err != nil {
			t.Fatal(err)
		}
	}
	if st := m.ReadAhead(); st.Blocks == 0 || st.Shared == 0 {
		t.Errorf("read ahead: %+v", st)
	}
}
