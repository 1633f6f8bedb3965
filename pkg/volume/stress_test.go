package volume

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"k8s.io/klog/v2"

	"github.com/snapmerge/snapmerge/pkg/blockio"
	"github.com/snapmerge/snapmerge/pkg/cow"
	"github.com/snapmerge/snapmerge/pkg/readahead"
	"github.com/snapmerge/snapmerge/test/cowgen"
)

// stamp fills a block with what tells where and when it was written.
func stamp(p []byte, block int64, version uint64) {
	for i := 0; i < len(p); i += 16 {
		binary.LittleEndian.PutUint64(p[i:], uint64(block))
		binary.LittleEndian.PutUint64(p[i+8:], version)
	}
}

// stamped returns the version in a block, which must be all of one version.
func stamped(p []byte, block int64) (uint64, error) {
	v := binary.LittleEndian.Uint64(p[8:])
	want := make([]byte, len(p))
	stamp(want, block, v)
	if !bytes.Equal(p, want) {
		return 0, fmt.Errorf("block %d is torn or another block's", block)
	}
	return v, nil
}

// zeroEvery is how often guests write zeros.
const zeroEvery = 5

var zeroBlock = make([]byte, bs)

// guests write and read a volume, each its own blocks, until they are stopped; one
// more reads all of it in sequence. Every fifth version of a block is zeros.
type guests struct {
	v        *Volume
	versions []atomic.Uint64 // of each block: the last acknowledged
	original []byte
	stop     chan struct{}
	wg       sync.WaitGroup
	errs     chan error
}

func startGuests(v *Volume, original []byte, n int) *guests {
	g := &guests{v: v, versions: make([]atomic.Uint64, len(original)/bs), original: original, stop: make(chan struct{}), errs: make(chan error, n+1)}
	for i := range n {
		g.wg.Go(func() { g.errs <- g.run(i, n) })
	}
	g.wg.Go(func() { g.errs <- g.scan() })
	return g
}

// scan reads the volume from end to end, again and again.
func (g *guests) scan() error {
	const most = 40
	rng := rand.New(rand.NewPCG(5, 77))
	p := make([]byte, most*bs)
	from := make([]uint64, most)
	for b := 0; ; {
		select {
		case <-g.stop:
			return nil
		default:
		}
		if b == len(g.versions) {
			b = 0
		}
		n := min(1+rng.IntN(most), len(g.versions)-b)
		for i := range n {
			from[i] = g.versions[b+i].Load()
		}
		if _, err := g.v.ReadAt(p[:n*bs], int64(b)*bs); err != nil {
			return err
		}
		for i := range n {
			// One more may have been written than is acknowledged.
			if err := g.compare(p[i*bs:(i+1)*bs], b+i, from[i], g.versions[b+i].Load()+1); err != nil {
				return fmt.Errorf("read in sequence: %w", err)
			}
		}
		b += n
	}
}

func (g *guests) run(i, n int) error {
	rng := rand.New(rand.NewPCG(uint64(i), 77))
	p := make([]byte, bs)
	blocks := len(g.versions)
	for k := 0; ; k++ {
		select {
		case <-g.stop:
			return nil
		default:
		}
		b := rng.IntN(blocks/n)*n + i
		if rng.IntN(3) == 0 {
			version := g.versions[b].Load() + 1
			var err error
			if version%zeroEvery == 0 {
				err = g.v.Zero(int64(b)*bs, bs)
			} else {
				stamp(p, int64(b), version)
				_, err = g.v.WriteAt(p, int64(b)*bs)
			}
			if err != nil {
				return err
			}
			g.versions[b].Store(version)
		} else if err := g.check(p, b); err != nil {
			return err
		}
		if k%50 == 0 {
			if err := g.v.Flush(); err != nil {
				return err
			}
		}
	}
}

func (g *guests) check(p []byte, b int) error {
	if _, err := g.v.ReadAt(p, int64(b)*bs); err != nil {
		return err
	}
	return g.compare(p, b, g.versions[b].Load(), g.versions[b].Load())
}

// compare tells whether p is block b at a version in [from, to].
func (g *guests) compare(p []byte, b int, from, to uint64) error {
	if from == 0 && bytes.Equal(p, g.original[b*bs:(b+1)*bs]) {
		return nil
	}
	if v := to / zeroEvery * zeroEvery; v >= max(from, 1) && bytes.Equal(p, zeroBlock) {
		return nil
	}
	got, err := stamped(p, int64(b))
	if err != nil {
		return err
	}
	if got < from || got > to {
		return fmt.Errorf("block %d has version %d, want %d to %d", b, got, from, to)
	}
	return nil
}

func (g *guests) now() []uint64 {
	out := make([]uint64, len(g.versions))
	for i := range out {
		out[i] = g.versions[i].Load()
	}
	return out
}

func (g *guests) end() error {
	close(g.stop)
	g.wg.Wait()
	close(g.errs)
	for err := range g.errs {
		if err != nil {
			return err
		}
	}
	return nil
}

// waitIdle waits until the stack of v is empty.
func waitIdle(t *testing.T, v *Volume, limit time.Duration) {
	t.Helper()
	deadline := time.Now().Add(limit)
	for !v.Idle() {
		if time.Now().After(deadline) {
			t.Fatalf("stack is not empty after %v: %+v", limit, v.Status())
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// TestStress: guests write and read while the volume merges, in turn and out of turn,
// is read ahead, cut, encoded and folded; every read and every snapshot must be right.
func TestStress(t *testing.T) {
	modes := readahead.Modes
	if testing.Short() {
		modes = []readahead.Mode{readahead.Async}
	}
	for _, mode := range modes {
		t.Run(string(mode), func(t *testing.T) { testStress(t, mode) })
	}
}

func testStress(t *testing.T, mode readahead.Mode) {
	blocks := 3000
	if testing.Short() {
		blocks = 800
	}
	im, err := cowgen.Make(rand.New(rand.NewPCG(8, 8)), cowgen.Spec{Blocks: blocks, Copies: blocks / 4, Xors: blocks / 12,
		Replaces: blocks / 20, Zeros: blocks / 40, MaxBlock: 16 * bs, Compression: cow.LZ4})
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	for name, b := range map[string][]byte{"base": im.Base, "data.cow": im.COW} {
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	cfg := ManagerConfig{ReadPromotion: true, FS: blockio.OS(), StateDir: filepath.Join(dir, "state"), Init: true, IO: blockio.Auto, Log: klog.Background().V(9),
		ReadAhead: readahead.Config{Mode: mode, Memory: 8 * readahead.ChunkBytes, Window: 2 * readahead.ChunkBytes, MaxWindow: 6 * readahead.ChunkBytes,
			Expiry: 20 * time.Millisecond}}
	if err := os.Mkdir(cfg.StateDir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(cfg.StateDir, "volumes"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(cfg.StateDir, markerName), []byte(`{"format":1}`), 0o600); err != nil {
		t.Fatal(err)
	}
	spec := Spec{ID: "v", Size: int64(len(im.Base)), Base: filepath.Join(dir, "base"), COWs: []COWSource{{Path: filepath.Join(dir, "data.cow")}},
		WindowBlocks: 64, SegmentBytes: 256 << 10, Rate: 8}
	if err := Create(cfg.FS, filepath.Join(cfg.StateDir, "volumes", "v"), spec); err != nil {
		t.Fatal(err)
	}
	m, err := OpenManager(context.Background(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	v, err := m.Get("v")
	if err != nil {
		t.Fatal(err)
	}
	g := startGuests(v, im.Want, 3)
	for i := range 4 {
		id := fmt.Sprintf("s%d", i)
		from := g.now()
		_, err := m.CreateSnapshot(SnapshotSpec{ID: id, Volume: "v"})
		if err != nil {
			t.Fatal(err)
		}
		to := g.now()
		if _, err := m.WaitSnapshot(context.Background(), id); err != nil {
			t.Fatal(err)
		}
		r, err := m.CreateVolume(context.Background(), VolumeSpec{ID: "r-" + id, Size: v.Size(), Snapshot: id})
		if err != nil {
			t.Fatal(err)
		}
		p := make([]byte, bs)
		for b := range blocks {
			if _, err := r.ReadAt(p, int64(b)*bs); err != nil {
				t.Fatal(err)
			}
			// A write that was being acknowledged may have been part of the cut.
			if err := g.compare(p, b, from[b], to[b]+1); err != nil {
				t.Fatalf("snapshot %s: %v", id, err)
			}
		}
		if err := errors.Join(m.DeleteVolume("r-"+id), m.DeleteSnapshot(id)); err != nil {
			t.Fatal(err)
		}
		if i == 1 {
			if err := v.SetRate(0); err != nil {
				t.Fatal(err)
			}
		}
	}
	waitIdle(t, v, 5*time.Minute)
	if err := g.end(); err != nil {
		t.Fatal(err)
	}
	base, err := os.ReadFile(filepath.Join(dir, "base"))
	if err != nil {
		t.Fatal(err)
	}
	if st := m.ReadAhead(); (st.Blocks > 0) != (mode != readahead.None) || (st.Hits > 0) != (mode != readahead.None) {
		t.Errorf("read ahead: %+v", st)
	}
	if v.Counters().MergePromoted == 0 {
		t.Error("nothing was promoted")
	}
	for b := range blocks {
		if err := g.compare(base[b*bs:(b+1)*bs], b, g.versions[b].Load(), g.versions[b].Load()); err != nil {
			t.Errorf("base: %v", err)
		}
	}
	if err := m.Close(); err != nil {
		t.Error(err)
	}
}

// TestHotBlock: one block that is rewritten without pause does not keep the
// stack from getting empty.
func TestHotBlock(t *testing.T) {
	im, err := cowgen.Make(rand.New(rand.NewPCG(6, 6)), cowgen.Spec{Blocks: 2000, Copies: 500, Replaces: 60, MaxBlock: 16 * bs})
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	for name, b := range map[string][]byte{"base": im.Base, "data.cow": im.COW} {
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	vd := filepath.Join(dir, "v")
	spec := Spec{ID: "v", Size: int64(len(im.Base)), Base: filepath.Join(dir, "base"), COWs: []COWSource{{Path: filepath.Join(dir, "data.cow")}},
		Limits: Limits{Soft: 32 << 20, Hard: 64 << 20}}
	if err := Create(blockio.OS(), vd, spec); err != nil {
		t.Fatal(err)
	}
	v, err := Open(Config{FS: blockio.OS(), Dir: vd, IO: blockio.Auto, Log: klog.Background()})
	if err != nil {
		t.Fatal(err)
	}
	hot := int64(-1) // a block that an op writes
	if op, err := v.stack.Load().layers[0].cow.Ops.At(0); err == nil {
		hot = int64(op.NewBlock)
	}
	stop, done := make(chan struct{}), make(chan error)
	var versions uint64
	go func() {
		p := make([]byte, bs)
		for {
			select {
			case <-stop:
				done <- nil
				return
			default:
			}
			versions++
			stamp(p, hot, versions)
			if _, err := v.WriteAt(p, hot*bs); err != nil {
				done <- err
				return
			}
			if versions%64 == 0 {
				if err := v.Flush(); err != nil {
					done <- err
					return
				}
			}
		}
	}()
	v.Start()
	start := time.Now()
	waitIdle(t, v, 5*time.Minute)
	took := time.Since(start).Round(time.Millisecond)
	close(stop)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	t.Logf("stack empty after %v, %d rewrites", took, versions)
	p := make([]byte, bs)
	if _, err := v.ReadAt(p, hot*bs); err != nil {
		t.Fatal(err)
	}
	if got, err := stamped(p, hot); err != nil || got != versions {
		t.Errorf("version %d, want %d: %v", got, versions, err)
	}
	if err := v.Close(); err != nil {
		t.Error(err)
	}
}
