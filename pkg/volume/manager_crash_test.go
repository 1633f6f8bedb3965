package volume

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"

	"k8s.io/klog/v2"

	"github.com/snapmerge/snapmerge/pkg/blockio"
	"github.com/snapmerge/snapmerge/pkg/blockio/crashfs"
	"github.com/snapmerge/snapmerge/pkg/snapshot"
)

// node is what a node must have: volumes and snapshots with their content.
// Contents are flushed before an act ends, so that a crash may not change them.
type node struct {
	volumes   map[string][]byte
	snapshots map[string][]byte
}

func (n node) clone() node {
	return node{maps.Clone(n.volumes), maps.Clone(n.snapshots)}
}

// nodeLife is a random life of a Manager. Background work and the encoders run
// by themselves, so steps come from several goroutines: the state before and
// after the act in progress are both right, and neither changes while a crash
// is looked at.
type nodeLife struct {
	t    *testing.T
	seed uint64
	fs   *crashfs.FS
	m    *Manager
	rng  *rand.Rand

	mu            sync.RWMutex // held, not shared, to change before and after
	before, after node
	act           string

	enum   sync.Mutex // over crash images
	crng   *rand.Rand
	step   int
	images int
	bad    bool
	ended  bool // guarded by mu
}

const nodeVolume = 12 * bs // size of a volume

func managerConfig(fs blockio.FS) ManagerConfig {
	return ManagerConfig{FS: fs, StateDir: "/n", Init: true, IO: blockio.Sync, Log: klog.Background().V(9),
		Capacity: func() (int64, int64, error) { return 1 << 40, 1 << 40, nil }}
}

func (l *nodeLife) hook(at crashfs.Step) error {
	l.mu.RLock()
	defer l.mu.RUnlock()
	l.enum.Lock()
	defer l.enum.Unlock()
	l.step++
	if l.bad || l.ended || l.step%4 != 0 {
		return nil
	}
	for class, image := range l.fs.CrashImages(4, l.crng) {
		l.images++
		if err := l.check(image); err != nil {
			l.bad = true
			l.t.Errorf("seed %d: %s: crash before %v, %s: %v", l.seed, l.act, at, class, err)
			break
		}
	}
	return nil
}

// check opens what a crash left and compares it with what there was before and
// after the act.
func (l *nodeLife) check(fs *crashfs.FS) error {
	m, err := OpenManager(context.Background(), managerConfig(fs))
	if err != nil {
		return err
	}
	err = l.compare(m)
	return errors.Join(err, m.Close())
}

func (l *nodeLife) compare(m *Manager) error {
	for _, id := range union(l.before.volumes, l.after.volumes) {
		old, was := l.before.volumes[id]
		now, is := l.after.volumes[id]
		v, err := m.Get(id)
		if errors.Is(err, ErrNotFound) {
			if was && is {
				return fmt.Errorf("volume %s is lost", id)
			}
			continue
		}
		if err != nil {
			return err
		}
		got, err := readAll(v)
		if err != nil {
			return err
		}
		for s := 0; s < len(got); s += sectorSize {
			g := got[s : s+sectorSize]
			if !(was && bytes.Equal(g, old[s:s+sectorSize])) && !(is && bytes.Equal(g, now[s:s+sectorSize])) {
				return fmt.Errorf("volume %s: sector %d is neither old nor new", id, s/sectorSize)
			}
		}
	}
	for _, id := range m.IDs() {
		if l.before.volumes[id] == nil && l.after.volumes[id] == nil {
			return fmt.Errorf("volume %s came back", id)
		}
	}
	for _, id := range union(l.before.snapshots, l.after.snapshots) {
		want, was := l.before.snapshots[id]
		_, is := l.after.snapshots[id]
		if !was {
			want = l.after.snapshots[id]
		}
		err := restoreCompare(m, id, want)
		if err != nil && !(errors.Is(err, snapshot.ErrNotFound) && !(was && is)) {
			return fmt.Errorf("snapshot %s: %w", id, err)
		}
	}
	records, err := m.Snapshots()
	if err != nil {
		return err
	}
	for _, r := range records {
		if l.before.snapshots[r.ID] == nil && l.after.snapshots[r.ID] == nil {
			return fmt.Errorf("snapshot %s came back", r.ID)
		}
	}
	return nil
}

// restoreCompare restores a snapshot into a volume and compares that.
func restoreCompare(m *Manager, id string, want []byte) error {
	if _, err := m.WaitSnapshot(context.Background(), id); err != nil {
		return err
	}
	if _, err := m.ReadySnapshot(id); err != nil {
		return err
	}
	v, err := m.CreateVolume(context.Background(), VolumeSpec{ID: "restored-" + id, Size: int64(len(want)), Snapshot: id})
	if err != nil {
		return err
	}
	got, err := readAll(v)
	if err != nil {
		return err
	}
	if !bytes.Equal(got, want) {
		return errors.New("restored volume differs")
	}
	return m.DeleteVolume("restored-" + id)
}

func union(a, b map[string][]byte) []string {
	ids := slices.Collect(maps.Keys(a))
	for id := range b {
		if _, ok := a[id]; !ok {
			ids = append(ids, id)
		}
	}
	slices.Sort(ids)
	return ids
}

// do announces what an act will change, does it, and makes it the state.
func (l *nodeLife) do(act string, change func(n node), fn func() error) error {
	l.mu.Lock()
	l.act = act
	change(l.after)
	l.mu.Unlock()
	if err := fn(); err != nil {
		return fmt.Errorf("%s: %w", act, err)
	}
	l.mu.Lock()
	l.before = l.after.clone()
	l.mu.Unlock()
	return nil
}

func pick(rng *rand.Rand, m map[string][]byte) string {
	ids := slices.Sorted(maps.Keys(m))
	if len(ids) == 0 {
		return ""
	}
	return ids[rng.IntN(len(ids))]
}

func (l *nodeLife) random(i int) error {
	ctx := context.Background()
	id := pick(l.rng, l.before.volumes)
	snap := pick(l.rng, l.before.snapshots)
	switch k := l.rng.IntN(12); {
	case k < 2 || id == "":
		name := fmt.Sprintf("v%d", i)
		return l.do("create "+name, func(n node) { n.volumes[name] = make([]byte, nodeVolume) }, func() error {
			_, err := l.m.CreateVolume(ctx, VolumeSpec{ID: name, Size: nodeVolume})
			return err
		})
	case k < 5:
		v, err := l.m.Get(id)
		if err != nil {
			return err
		}
		off := l.rng.Int64N(nodeVolume/bs) * bs
		p := bytes.Repeat([]byte{byte(i + 1)}, int(min(2*bs, nodeVolume-off)))
		return l.do("write "+id, func(n node) {
			c := slices.Clone(n.volumes[id])
			copy(c[off:], p)
			n.volumes[id] = c
		}, func() error {
			_, err := v.WriteAt(p, off)
			return errors.Join(err, v.Flush())
		})
	case k < 7:
		name := fmt.Sprintf("s%d", i)
		err := l.do("snapshot "+name+" of "+id, func(n node) { n.snapshots[name] = n.volumes[id] }, func() error {
			_, err := l.m.CreateSnapshot(SnapshotSpec{ID: name, Name: name, Volume: id})
			return err
		})
		if errors.Is(err, ErrCutInFlight) {
			l.mu.Lock()
			l.after = l.before.clone()
			l.mu.Unlock()
			return nil
		}
		return err
	case k < 8 && snap != "":
		if _, err := l.m.WaitSnapshot(ctx, snap); err != nil {
			return err
		}
		name := fmt.Sprintf("r%d", i)
		return l.do("restore "+snap, func(n node) { n.volumes[name] = n.snapshots[snap] }, func() error {
			_, err := l.m.CreateVolume(ctx, VolumeSpec{ID: name, Size: nodeVolume, Snapshot: snap})
			return err
		})
	case k < 9:
		return l.do("delete "+id, func(n node) { delete(n.volumes, id) }, func() error { return l.m.DeleteVolume(id) })
	case k < 10 && snap != "":
		return l.do("delete snapshot "+snap, func(n node) { delete(n.snapshots, snap) }, func() error { return l.m.DeleteSnapshot(snap) })
	case k < 11:
		return l.do("restart", func(node) {}, func() error {
			if err := l.m.Close(); err != nil {
				return err
			}
			var err error
			l.m, err = OpenManager(ctx, managerConfig(l.fs))
			return err
		})
	}
	return nil
}

// nodeLifetime lives one life and returns the number of crash images.
func nodeLifetime(t *testing.T, seed uint64, acts int) int {
	fs := crashfs.New("/n")
	if err := fs.SyncDir("/"); err != nil {
		t.Fatal(err)
	}
	m, err := OpenManager(context.Background(), managerConfig(fs))
	if err != nil {
		t.Fatal(err)
	}
	empty := node{map[string][]byte{}, map[string][]byte{}}
	l := &nodeLife{t: t, seed: seed, fs: fs, m: m, rng: rand.New(rand.NewPCG(seed, 5)), crng: rand.New(rand.NewPCG(seed, 6)),
		before: empty, after: empty.clone(), act: "start"}
	fs.OnStep(l.hook)
	for k := range acts {
		if err := l.random(k); err != nil {
			t.Errorf("seed %d: %v", seed, err)
			break
		}
	}
	fs.OnStep(nil)
	l.mu.Lock() // also waits for those that look at a crash
	l.ended = true
	l.mu.Unlock()
	if !l.bad {
		if err := l.compare(l.m); err != nil {
			t.Errorf("seed %d: at the end: %v", seed, err)
		}
	}
	if err := l.m.Close(); err != nil {
		t.Errorf("seed %d: close: %v", seed, err)
	}
	if left, err := fs.ReadDir("/n/volumes"); err != nil || slices.ContainsFunc(left, func(n string) bool { return strings.HasPrefix(n, ".") }) {
		t.Errorf("left in the volumes directory: %v, %v", left, err)
	}
	return l.images
}

func TestManagerCrash(t *testing.T) {
	t.Parallel()
	lives := 10
	if testing.Short() {
		lives = 2
	}
	total := 0
	for i := range lives {
		total += nodeLifetime(t, uint64(i+1), 25)
	}
	t.Logf("%d crash images", total)
}
