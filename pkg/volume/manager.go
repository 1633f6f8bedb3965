package volume

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"

	"github.com/snapmerge/snapmerge/pkg/blockio"
	"github.com/snapmerge/snapmerge/pkg/readahead"
	"github.com/snapmerge/snapmerge/pkg/snapshot"
	"github.com/snapmerge/snapmerge/pkg/transport"
	"github.com/snapmerge/snapmerge/pkg/volume/pacing"
)

const (
	// markerName is a file that tells a state directory from a mount point whose
	// disk is missing; its lock is the node plugin's.
	markerName    = "snapmerge.json"
	markerFormat  = 1
	volumesDir    = "volumes"
	snapshotsDir  = "snapshots"
	orphanDir     = "volume" // in a snapshot's directory: what is still encoded from
	gonePrefix    = ".gone-"
	lockRetryStep = 50 * time.Millisecond
)

// Errors of a Manager that a caller tells apart.
var (
	ErrNotFound = errors.New("no such volume")
	// ErrUnmarked: the state directory does not carry snapmerge's marker.
	ErrUnmarked = errors.New("directory is not marked as a snapmerge state directory")
	// ErrPoolFull: there is not enough room on the node.
	ErrPoolFull = errors.New("not enough room in the pool")
	// ErrStaged: the volume has a device.
	ErrStaged = errors.New("volume is staged")
	// ErrConflict: there is something else under that name.
	ErrConflict = errors.New("exists with other properties")
	// ErrNotReady: the snapshot is not encoded yet.
	ErrNotReady = errors.New("snapshot is not ready yet")
	// ErrSnapshotFailed: the snapshot could not be encoded.
	ErrSnapshotFailed = errors.New("snapshot has failed")
)

// ManagerConfig is how a node's volumes are managed.
type ManagerConfig struct {
	FS       blockio.FS
	StateDir string
	// Init marks an unmarked state directory instead of refusing it.
	Init      bool
	Transport transport.Transport
	IO        blockio.Kind
	// MergeRate is the default rate of a merge in MiB/s, 0 for no limit;
	// MergeConcurrency bounds the merges that run at once, 0 for no bound.
	MergeRate        int
	MergeConcurrency int
	// Pacing has background work hold back for the pods; nil: it does not.
	Pacing *pacing.Node
	// StalledAfter is how long a merge may get nothing done before it is said to be
	// stalled; 0: DefaultStalledAfter.
	StalledAfter time.Duration
	// CacheBytes bounds the cache of index pages; 0: the default.
	CacheBytes int64
	// ReadAhead is how unmerged layers are read ahead.
	ReadAhead readahead.Config
	// ReadPromotion has blocks that pods read of a COW merged early.
	ReadPromotion bool
	// Capacity tells the room of the pool in bytes, free and in all; nil: what
	// the file system of the state directory says.
	Capacity func() (free, total int64, err error)
	Log      klog.Logger
}

// Manager has all volumes and snapshots of a node. Its methods may be called
// concurrently.
type Manager struct {
	cfg    ManagerConfig
	marker blockio.File
	store  *snapshot.Store
	cache  *snapshot.Cache
	slots  *Slots
	ahead  *readahead.Manager
	reads  *blockio.ReadQueues

	ctx    context.Context // ends with Close
	cancel context.CancelFunc
	wg     sync.WaitGroup

	mu      sync.Mutex // of the maps
	volumes map[string]*entry
	encodes map[string]*encode // by snapshot
	// full has the snapshots that have failed for lack of room, with the free room
	// in bytes that was not enough.
	full map[string]int64
	// leftovers are the volumes whose device of an earlier process could not be
	// taken over; true: the volume was gone already.
	leftovers map[string]bool

	adopted, adoptFailures atomic.Uint64
}

// entry is one volume of the node.
type entry struct {
	id string

	// mu is held over everything that changes what the volume is: making,
	// deleting, staging, growing it. It is taken before Manager.mu.
	mu   sync.Mutex
	gone bool // deleted; who waited for mu must look again

	// state is guarded by Manager.mu.
	v      *Volume // nil: could not be opened
	err    error   // why
	dev    transport.Device
	devErr error // why there is no device though the volume is staged
	broken bool  // the device answers errors: the volume could not be opened
}

// OpenManager opens the state directory, takes over what an earlier process
// left (devices in service among it), and starts background work. It waits,
// within ctx, for an earlier process's I/O to end.
func OpenManager(ctx context.Context, cfg ManagerConfig) (*Manager, error) {
	m := &Manager{cfg: cfg, cache: snapshot.NewCache(cfg.CacheBytes), slots: NewSlots(cfg.MergeConcurrency), ahead: readahead.NewManager(cfg.ReadAhead), reads: blockio.NewReadQueues(cfg.IO),
		volumes: map[string]*entry{}, encodes: map[string]*encode{}, full: map[string]int64{}, leftovers: map[string]bool{}}
	m.ctx, m.cancel = context.WithCancel(context.Background())
	err := m.open(ctx)
	if err != nil {
		return nil, errors.Join(err, m.Close())
	}
	return m, nil
}

func (m *Manager) open(ctx context.Context) error {
	if err := m.lock(ctx); err != nil {
		return err
	}
	if err := m.mkdir(volumesDir); err != nil {
		return err
	}
	var err error
	if m.store, err = snapshot.OpenStore(m.cfg.FS, m.path(snapshotsDir)); err != nil {
		return err
	}
	if err := m.openVolumes(ctx); err != nil {
		return err
	}
	records, err := m.listSnapshots()
	if err != nil {
		return err
	}
	// From here on nothing may fail: Close would take the volumes away from under
	// devices that serve. Before it, they wait for the next process.
	m.adopt(ctx)
	m.resumeSnapshots(ctx, records)
	for _, e := range m.entries() {
		if e.v != nil {
			e.v.Start()
		}
	}
	return nil
}

func (m *Manager) path(elem ...string) string {
	return path.Join(append([]string{m.cfg.StateDir}, elem...)...)
}

func (m *Manager) volumeDir(id string) string { return m.path(volumesDir, id) }

func (m *Manager) mkdir(name string) error {
	err := m.cfg.FS.Mkdir(m.path(name))
	if err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return m.cfg.FS.SyncDir(m.cfg.StateDir)
}

type marker struct {
	Format int `json:"format"`
}

// lock checks the state directory's marker and takes its lock.
func (m *Manager) lock(ctx context.Context) error {
	name := m.path(markerName)
	b, err := m.cfg.FS.ReadFile(name)
	switch {
	case errors.Is(err, fs.ErrNotExist) && m.cfg.Init:
		if err := m.mark(name); err != nil {
			return err
		}
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("%s: %w (is its disk mounted? --init marks a new one)", m.cfg.StateDir, ErrUnmarked)
	case err != nil:
		return err
	default:
		var k marker
		if err := json.Unmarshal(b, &k); err != nil || k.Format != markerFormat {
			return fmt.Errorf("%s: format %d, this program knows %d (%v)", name, k.Format, markerFormat, err)
		}
	}
	if m.marker, err = m.cfg.FS.Open(name, 0); err != nil {
		return err
	}
	return retryInUse(ctx, func() error {
		if err := m.marker.Lock(); err != nil {
			return fmt.Errorf("%s: %w", m.cfg.StateDir, inUse(err))
		}
		return nil
	})
}

func (m *Manager) mark(name string) error {
	names, err := m.cfg.FS.ReadDir(m.cfg.StateDir)
	if err != nil {
		return err
	}
	for _, n := range names {
		if n != "lost+found" {
			return fmt.Errorf("%s: %w and not empty (%s)", m.cfg.StateDir, ErrUnmarked, n)
		}
	}
	b, err := json.Marshal(marker{Format: markerFormat})
	if err != nil {
		return err
	}
	return blockio.WriteFileAtomic(m.cfg.FS, name, append(b, '\n'))
}

// retryInUse calls fn until it does not fail for an earlier owner any more, or
// ctx ends: a process that was killed holds its locks until its last I/O is
// done.
func retryInUse(ctx context.Context, fn func() error) error {
	for {
		err := fn()
		if !errors.Is(err, ErrInUse) {
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(lockRetryStep):
		}
	}
}

// openVolumes opens what is in the volumes directory. A volume that cannot be
// opened keeps no other from being used.
func (m *Manager) openVolumes(ctx context.Context) error {
	dir := m.path(volumesDir)
	// See Open: nothing may be built on names that are not durable.
	if err := m.cfg.FS.SyncDir(dir); err != nil {
		return err
	}
	names, err := m.cfg.FS.ReadDir(dir)
	if err != nil {
		return err
	}
	if err := m.checkFormats(names); err != nil {
		return err
	}
	for _, id := range names {
		half := strings.HasPrefix(id, gonePrefix)
		if !half {
			ok, err := m.cfg.FS.Exists(path.Join(m.volumeDir(id), recordName))
			if err != nil {
				return err
			}
			half = !ok
		}
		if half { // made or removed only in part
			if err := m.cfg.FS.RemoveAll(m.volumeDir(id)); err != nil {
				return err
			}
			continue
		}
		e := &entry{id: id}
		m.openEntry(ctx, e)
		m.volumes[id] = e
	}
	return nil
}

// checkFormats fails if a newer release has written a record. A node that went on
// without the volume would answer the requests of its device with errors; as it is they
// wait for that release.
func (m *Manager) checkFormats(ids []string) error {
	for _, id := range ids {
		if _, err := ReadRecord(m.cfg.FS, m.volumeDir(id)); errors.Is(err, ErrNewer) {
			return fmt.Errorf("%w; nothing was touched: start that release again, it goes on where it was", err)
		}
	}
	return nil
}

func (m *Manager) volumeConfig(dir string) Config {
	return Config{FS: m.cfg.FS, Dir: dir, IO: m.cfg.IO, Cache: m.cache, Reads: m.reads, Slots: m.slots, Rate: m.cfg.MergeRate,
		Pacing: m.cfg.Pacing, StalledAfter: m.cfg.StalledAfter, ReadAhead: m.ahead, ReadPromotion: m.cfg.ReadPromotion, Log: m.cfg.Log}
}

// openEntry opens the volume of e, or notes why that is impossible. e.mu is
// held or e is not shared yet.
func (m *Manager) openEntry(ctx context.Context, e *entry) {
	var v *Volume
	err := retryInUse(ctx, func() (err error) {
		v, err = Open(m.volumeConfig(m.volumeDir(e.id)))
		return err
	})
	if err != nil {
		m.cfg.Log.Error(err, "Volume cannot be opened", "volume", e.id)
	}
	m.mu.Lock()
	e.v, e.err = v, err
	m.mu.Unlock()
}

// opened is the volume of e, which is tried again if it could not be opened, and
// opened anew if it takes no writes any more and nobody uses it. e.mu is held.
func (m *Manager) opened(ctx context.Context, e *entry) (*Volume, error) {
	m.mu.Lock()
	v := e.v
	m.mu.Unlock()
	if v != nil && !m.closeFailed(e, v) {
		return v, nil
	}
	m.openEntry(ctx, e)
	v, err := m.Get(e.id)
	if err != nil {
		return nil, err
	}
	// A snapshot may have been waiting for this since the start.
	if err := m.mendCutNow(v); err != nil {
		m.cfg.Log.Error(err, "Snapshot cannot be gone on with", "volume", e.id)
	}
	v.Start()
	return v, nil
}

// Close stops background work and closes all volumes. Devices stay in service
// as far as the keeper holds them; without one they are gone with the process.
func (m *Manager) Close() error {
	m.cancel()
	m.wg.Wait()
	var errs []error
	for _, e := range m.entries() {
		if e.v != nil {
			errs = append(errs, e.v.Close())
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, n := range m.encodes {
		if n.orphan && !n.discarded { // else it is one of the volumes
			errs = append(errs, n.v.Close())
		}
	}
	errs = append(errs, m.ahead.Close(), m.reads.Close())
	if m.marker != nil {
		errs = append(errs, m.marker.Close())
	}
	return errors.Join(errs...)
}

// ReadAhead tells what was read ahead.
func (m *Manager) ReadAhead() readahead.Stats { return m.ahead.Stats() }

// entries returns the volumes, sorted by id.
func (m *Manager) entries() []*entry {
	m.mu.Lock()
	defer m.mu.Unlock()
	out := make([]*entry, 0, len(m.volumes))
	for _, e := range m.volumes {
		out = append(out, e)
	}
	slices.SortFunc(out, func(a, b *entry) int { return strings.Compare(a.id, b.id) })
	return out
}

// hold returns the volume's entry with its mu held, or ErrNotFound.
func (m *Manager) hold(id string) (*entry, error) {
	for {
		m.mu.Lock()
		e := m.volumes[id]
		m.mu.Unlock()
		if e == nil {
			return nil, fmt.Errorf("volume %s: %w", id, ErrNotFound)
		}
		e.mu.Lock()
		if !e.gone {
			return e, nil
		}
		e.mu.Unlock()
	}
}

// Get returns a volume. One that cannot be opened gives the reason as error,
// which is not ErrNotFound.
func (m *Manager) Get(id string) (*Volume, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	e := m.volumes[id]
	switch {
	case e == nil:
		return nil, fmt.Errorf("volume %s: %w", id, ErrNotFound)
	case e.v == nil:
		return nil, fmt.Errorf("volume %s: %w", id, e.err)
	}
	return e.v, nil
}

// Open is Get, but for that it tries again to open what could not be opened.
func (m *Manager) Open(ctx context.Context, id string) (*Volume, error) {
	e, err := m.hold(id)
	if err != nil {
		return nil, err
	}
	defer e.mu.Unlock()
	return m.opened(ctx, e)
}

// IDs returns the ids of all volumes, sorted, those that cannot be opened
// included.
func (m *Manager) IDs() []string {
	var ids []string
	for _, e := range m.entries() {
		ids = append(ids, e.id)
	}
	return ids
}

// Status returns the status of a volume.
func (m *Manager) Status(id string) (Status, error) {
	m.mu.Lock()
	e := m.volumes[id]
	if e == nil {
		m.mu.Unlock()
		return Status{}, fmt.Errorf("volume %s: %w", id, ErrNotFound)
	}
	v, err, dev, devErr := e.v, e.err, e.dev, e.devErr
	m.mu.Unlock()
	s := Status{ID: id, State: Failed, ETASeconds: -1}
	if v != nil {
		s = v.Status()
	}
	if dev != nil {
		s.Transport, s.Device = dev.Transport(), dev.Path()
		select {
		case <-dev.Failed():
			devErr = errors.New("device is dead")
		default:
		}
	}
	if devErr != nil {
		s.DeviceDown = true
		s.Error = devErr.Error()
	}
	if errors.Is(err, errBeingMade) {
		s.State = Unstaged // nothing has failed
	}
	if v == nil {
		s.Error, s.Corrupt = err.Error(), damaged(err)
		s.Size, s.Claim = m.knownOnDisk(id)
	}
	return s, nil
}

// knownOnDisk is how many bytes a volume has that cannot be opened, 0 for
// unknown, and what it was made for.
func (m *Manager) knownOnDisk(id string) (size int64, claim Claim) {
	if r, err := ReadRecord(m.cfg.FS, m.volumeDir(id)); err == nil {
		return r.Size, r.Claim
	}
	base, err := m.cfg.FS.Open(path.Join(m.volumeDir(id), baseName), blockio.ReadOnly)
	if err != nil {
		return 0, claim
	}
	defer base.Close()
	return base.Size(), claim
}

// The part of the pool that new volumes and snapshots leave to what the pods
// write, to logs above all: one in reserveShare, but no more than reserveMost
// bytes.
const (
	reserveShare = 20
	reserveMost  = 8 << 30
)

// Capacity is the room of the pool in bytes: what new volumes and snapshots may
// take now, and in all.
func (m *Manager) Capacity() (free, total int64, err error) {
	if m.cfg.Capacity != nil {
		free, total, err = m.cfg.Capacity()
	} else {
		var st unix.Statfs_t
		if err := unix.Statfs(m.cfg.StateDir, &st); err != nil {
			return 0, 0, fmt.Errorf("%s: %w", m.cfg.StateDir, err)
		}
		free, total = int64(st.Bavail)*st.Bsize, int64(st.Blocks)*st.Bsize
	}
	reserve := min(total/reserveShare, reserveMost)
	return max(free-reserve, 0), total - reserve, err
}
