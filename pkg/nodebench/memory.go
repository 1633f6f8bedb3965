package nodebench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"text/tabwriter"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/snapmerge/snapmerge/pkg/admin"
	"github.com/snapmerge/snapmerge/pkg/bench"
	"github.com/snapmerge/snapmerge/pkg/blockio"
	"github.com/snapmerge/snapmerge/pkg/localnode"
	"github.com/snapmerge/snapmerge/pkg/snapshot"
)

// MemoryOptions say of what the memory is measured.
type MemoryOptions struct {
	// Spec is that of the snapshots' COWs; complete. Different ones have different
	// seeds.
	bench.Spec
	// Volumes is how many volumes are staged at once.
	Volumes int
	// Different has each volume made from a snapshot of its own; else all are made
	// from one.
	Different bool
	// Time is how long there is a load on all volumes, and then how long there is
	// none, so that merges run at full speed.
	Time time.Duration
	// Binary is the snapmerge program, Args are more arguments of its node plugin.
	Binary string
	Args   []string
	// Dir takes the files; it must be there.
	Dir  string
	Note func(format string, args ...any)
}

// Memory is what a node plugin and its keeper had resident at the most, in bytes.
type Memory struct {
	Volumes   int   `json:"volumes"`
	Snapshots int   `json:"snapshots"`
	Size      int64 `json:"size"` // of a volume
	Ops       int64 `json:"ops"`  // blocks that the merge of a volume writes

	// At the most until all volumes were staged, under load, and while the merges ran
	// by themselves: plugin and keeper together, sampled.
	Staged int64 `json:"staged_bytes"`
	Loaded int64 `json:"loaded_bytes"`
	Merged int64 `json:"merged_bytes"`
	// Node and Keeper are the peaks that the kernel has noted.
	Node   int64 `json:"node_bytes"`
	Keeper int64 `json:"keeper_bytes"`
	Total  int64 `json:"total_bytes"`

	Begun int `json:"merges_begun"`
	Done  int `json:"merges_done"`
}

// memory is the state of one call of MeasureMemory.
type memory struct {
	o    MemoryOptions
	node *localnode.Node
}

// MeasureMemory stages volumes restored from snapshots, reads and writes them all,
// leaves their merges to themselves, and tells how much memory that took.
func MeasureMemory(ctx context.Context, o MemoryOptions) (_ Memory, err error) {
	if o.Dir, err = os.MkdirTemp(o.Dir, "memory-"); err != nil {
		return Memory{}, err
	}
	m := &memory{o: o}
	defer func() { err = errors.Join(err, cleanUp(m.node, o.Dir, err)) }()
	// The state directory is marked by a plugin, and filled while there is none.
	if m.node, err = localnode.Open(ctx, o.Binary, o.Dir); err != nil {
		return Memory{}, err
	}
	if err := m.node.StopPlugin(); err != nil {
		return Memory{}, err
	}
	snapshots := 1
	if o.Different {
		snapshots = o.Volumes
	}
	o.Note("making %d snapshots of %d MiB with %d blocks that change", snapshots, o.Size/mib, o.Ops)
	for i := range snapshots {
		if err := m.makeSnapshot(ctx, i); err != nil {
			return Memory{}, err
		}
	}
	if err := m.node.StartPlugin(ctx, o.Args...); err != nil {
		return Memory{}, err
	}
	r := Memory{Volumes: o.Volumes, Snapshots: snapshots, Size: o.Size, Ops: o.Ops}
	return r, m.measure(ctx, &r)
}

func snapshotName(i int) string { return fmt.Sprintf("snapshot-%d", i) }

// makeSnapshot puts a snapshot where the node plugin keeps them.
func (m *memory) makeSnapshot(ctx context.Context, i int) error {
	fsys := blockio.OS()
	store, err := snapshot.OpenStore(fsys, m.node.Path("state", "snapshots"))
	if err != nil {
		return err
	}
	id, spec := snapshotName(i), m.o.Spec
	if _, err := store.Create(snapshot.Record{ID: id, Name: id, SourceVolumeID: "none", Size: spec.Size}); err != nil {
		return err
	}
	spec.Seed += uint64(i)
	if err := bench.WriteCOW(ctx, spec, store.COWPath(id)); err != nil {
		return err
	}
	c, err := snapshot.OpenCOW(fsys, store.COWPath(id), snapshot.OpenCOWOptions{})
	if err != nil {
		return err
	}
	info := snapshot.Info{Length: c.Identity.Length, CRC: c.Identity.CRC, Ops: c.Ops.Len(), Blocks: c.Ops.TargetBlocks(), Compression: spec.Compression}
	if err := c.Close(); err != nil {
		return err
	}
	_, err = store.SetReady(id, info)
	return err
}

func (m *memory) measure(ctx context.Context, r *Memory) error {
	note := m.o.Note
	s := startSampling(m.node.Plugin.Pid(), m.node.Keeper.Pid())
	defer s.end()
	var devices []string
	for i := range m.o.Volumes {
		snap := snapshotName(0)
		if m.o.Different {
			snap = snapshotName(i)
		}
		id, err := m.node.Create(ctx, fmt.Sprintf("volume-%d", i), m.o.Size, snap+"@"+localnode.NodeID, localnode.Block(), nil)
		if err != nil {
			return err
		}
		device, err := m.node.Use(ctx, id, localnode.Block())
		if err != nil {
			return err
		}
		devices = append(devices, device)
	}
	r.Staged = s.phase()
	note("%d volumes are staged: %d MiB", m.o.Volumes, r.Staged/mib)

	loaded, cancel := context.WithTimeout(ctx, m.o.Time)
	defer cancel()
	var g errgroup.Group
	for i, d := range devices {
		g.Go(func() error { return readAndWrite(loaded, d, m.o.Size, uint64(i)) })
	}
	if err := g.Wait(); err != nil {
		return err
	}
	r.Loaded = s.phase()
	note("all were read and written for %v: %d MiB", m.o.Time, r.Loaded/mib)

	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(m.o.Time):
	}
	r.Merged = s.phase()
	all, err := admin.NewClient(m.node.AdminSocket()).List(ctx)
	if err != nil {
		return err
	}
	for _, v := range all {
		if v.Error != "" {
			return fmt.Errorf("volume %s is %s: %s", v.ID, v.State, v.Error)
		}
		if v.BytesDone > 0 {
			r.Begun++
		}
		if v.BytesDone == v.BytesTotal {
			r.Done++
		}
	}
	note("merges by themselves for %v, %d begun and %d done: %d MiB", m.o.Time, r.Begun, r.Done, r.Merged/mib)
	if r.Node, err = bench.PeakRSS(m.node.Plugin.Pid()); err == nil {
		r.Keeper, err = bench.PeakRSS(m.node.Keeper.Pid())
	}
	r.Total = r.Node + r.Keeper
	return err
}

// WriteMemory writes results for a person to read.
func WriteMemory(w io.Writer, results []Memory) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprint(t, "volumes\tsnapshots\tGiB each\tstaged, MiB\tunder load\tmerging\tpeak of the plugin\tof the keeper\ttotal, MiB\tmerges begun\tdone\t\n")
	for _, r := range results {
		fmt.Fprintf(t, "%d\t%d\t%.1f\t%d\t%d\t%d\t%d\t%d\t%d\t%d\t%d\t\n", r.Volumes, r.Snapshots, float64(r.Size)/(1<<30), r.Staged/mib, r.Loaded/mib,
			r.Merged/mib, r.Node/mib, r.Keeper/mib, r.Total/mib, r.Begun, r.Done)
	}
	return t.Flush()
}

// sampling watches the resident memory of some processes together.
type sampling struct {
	pids []int
	stop chan struct{}
	wg   sync.WaitGroup

	mu   sync.Mutex
	most int64 // bytes, in this phase
}

const sampleEvery = 50 * time.Millisecond

func startSampling(pids ...int) *sampling {
	s := &sampling{pids: pids, stop: make(chan struct{})}
	s.wg.Go(func() {
		t := time.NewTicker(sampleEvery)
		defer t.Stop()
		for {
			s.sample()
			select {
			case <-s.stop:
				return
			case <-t.C:
			}
		}
	})
	return s
}

func (s *sampling) sample() {
	var sum int64
	for _, pid := range s.pids {
		n, err := bench.CurrentRSS(pid)
		if err != nil {
			return // the process has ended, which others notice
		}
		sum += n
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.most = max(s.most, sum)
}

// phase is the most since the last call.
func (s *sampling) phase() int64 {
	s.sample()
	s.mu.Lock()
	defer s.mu.Unlock()
	most := s.most
	s.most = 0
	return most
}

func (s *sampling) end() {
	close(s.stop)
	s.wg.Wait()
}
