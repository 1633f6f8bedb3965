// Package readahead keeps what readers of a volume will want next: the content of
// blocks of unmerged layers that has to be unpacked or collected from scattered
// places first, and blocks of a base that lie on a disk. It is BookKeeper's proposal
// BP-49 (spec merge-engine 16) for blocks in place of entries.
//
// # How it works
//
// A volume is cut into chunks of ChunkBytes. A chunk is loaded as a whole and is
// visible to readers as soon as it is, so nobody waits for the rest of a window. A
// reader that wants one which the pool has not come to yet loads it itself; if it
// wants all of it, and nobody else does, straight to where it has to go. What the
// pool is loading it reads last, so that both work at the same time.
//
//	async  A read that finds nothing notes where it ends. A read that begins
//	       there, or within near bytes behind it, is sequential: a task that
//	       loads a window of chunks is queued for the pool. The chunks of the
//	       last quarter of a window are armed: whoever touches one of them
//	       first has the next window queued. A single read only leaves a note.
//	sync   Every read that finds nothing loads a batch of chunks itself before it
//	       returns.
//	none   Reads go past all this and are only timed.
//
// The pool's threads have a lower priority than those that serve requests, but not
// while a request waits for what they load.
//
// # Never stale
//
// The content that a Load returns is that of blocks whose ops are not committed,
// and until the first of these ops is committed nobody can change it: the merge
// never changes the view, and a guest's write to such a block goes to the write
// log, which readers ask first. So each chunk carries that op's position, and a
// reader that finds as many ops committed drops the chunk. The reader looks after
// it has begun; a write that goes straight to the base begins later than that
// commit. Ops may also be merged out of turn (promoted): the reader asks for that in
// the same way, and drops a chunk that one of them writes to. Hence writes, cuts and
// merges need not know of this package, and a read that begins after a write has
// ended never gets what was there before.
//
// The content of a base does change. Who writes to it says so before and after
// (BeginWrite, EndWrite): chunks from before are dropped, loads in progress are not
// kept, and none begins until the end. So what is kept was loaded after the last
// write of it had ended.
//
// # Shared by volumes
//
// Volumes that have the same layer share the chunks in which what ops write depends
// on nothing but the layer's file: the first that wants one loads it for all. Chunks
// in which it depends on the base are apart: each volume has its own.
// Such a chunk has all that the ops write of it, and each volume looks whether it
// has committed one of these ops: then nothing of the chunk is for that volume any
// more, which notes so for itself, and the others go on with it.
//
// # Eviction
//
// The lists are our own: a chunk that is being read must not go, its memory is used
// again at once, and what a sequential reader has read up goes first. A library's
// cache decides by itself what goes, and when.
//
// # Locks
//
// Manager.mu guards everything but the content of loaded chunks, which never
// changes and is held by counting its readers. No I/O is done and nobody is waited
// for with it held.
package readahead

import (
	"container/list"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/golang-lru/v2/simplelru"

	"github.com/snapmerge/snapmerge/pkg/blockio"
)

// ChunkBytes is what is loaded and forgotten as one.
const ChunkBytes = 64 << 10

const chunkBlocks = ChunkBytes / blockio.BlockSize

// Mode is how a volume's layers are read ahead.
type Mode string

// The modes; see the package comment.
const (
	None  Mode = "none"
	Sync  Mode = "sync"
	Async Mode = "async"
)

// Modes are all modes.
var Modes = []Mode{None, Sync, Async}

// ParseMode checks the name of a mode.
func ParseMode(s string) (Mode, error) {
	if m := Mode(s); slices.Contains(Modes, m) {
		return m, nil
	}
	return "", fmt.Errorf("read-ahead mode %q is not none, sync or async", s)
}

// Config is how a node reads ahead. Sizes are in bytes and count as whole chunks,
// one at least.
type Config struct {
	// Mode of volumes that have none of their own; "": None.
	Mode Mode
	// Memory bounds what is kept; 0: DefaultMemory.
	Memory int64
	// Window is how much a task loads; 0: DefaultWindow.
	Window int64
	// MaxWindow, if it is more than Window, lets a volume's window double whenever a
	// reader gets on to the next one, up to that. It is halved, down to a chunk,
	// whenever a chunk of which less than half was read has to go.
	MaxWindow int64
	// Batch is how much a read loads in mode Sync; 0: DefaultBatch.
	Batch int64
	// Expiry is for how long what nobody asks for is kept; 0: DefaultExpiry.
	Expiry time.Duration
}

// Defaults of Config.
const (
	DefaultMemory = 64 << 20
	DefaultWindow = 512 << 10
	DefaultBatch  = 256 << 10
	DefaultExpiry = time.Minute
)

const (
	// near is how far behind the end of an earlier read, in bytes, a read may begin
	// to be taken for its continuation.
	near = 32 << 10
	// A read waits for a chunk for as long as loadsWaited chunks of its source take to
	// load, but neither less than waitLeast nor more than waitMost, before it reads by
	// itself: who loads it may be without a processor, or stuck.
	loadsWaited = 4
	waitLeast   = 250 * time.Microsecond
	waitMost    = 5 * time.Second
	// maxNotes bounds the ends of reads that are remembered of a layer, maxQueue the
	// tasks that wait for the pool.
	maxNotes = 256
	maxQueue = 256
	// emptyChunks is how many chunks may be known to hold nothing, for each that may
	// hold something.
	emptyChunks = 4
	// spentChunks is how many chunks that were read up are kept before their memory
	// is used again. New memory takes longer to get than a chunk to unpack.
	spentChunks = 16
)

// clock is the time, for tests.
type clock struct {
	now   func() time.Time
	after func(time.Duration) <-chan time.Time
}

// Manager reads ahead for all volumes of a node.
type Manager struct {
	cfg   Config
	clock clock
	stats counters

	mu     sync.Mutex
	work   sync.Cond // of mu: the queue, and the end
	queue  []*task
	chunks map[key]*chunk
	owners map[any]*owner // those of shared chunks, by what Open was told
	old    *list.List     // loaded chunks with memory; the next one to go is last
	spent  *list.List     // those that the only volume they are for has read up, likewise
	empty  *list.List     // loaded chunks that hold nothing, likewise
	loaded int            // chunks with memory, that of loads in progress included
	spare  []*blockio.Arena
	closed bool

	stop chan struct{}
	wg   sync.WaitGroup
}

// NewManager starts the pool. Nothing is allocated before it is needed.
func NewManager(cfg Config) *Manager {
	m := newManager(cfg, clock{time.Now, time.After})
	for range poolSize() {
		m.wg.Go(m.worker)
	}
	m.wg.Go(m.janitor)
	return m
}

// newManager is NewManager without goroutines.
func newManager(cfg Config, c clock) *Manager {
	orDefault(&cfg.Memory, DefaultMemory)
	orDefault(&cfg.Window, DefaultWindow)
	orDefault(&cfg.Batch, DefaultBatch)
	orDefault(&cfg.Expiry, DefaultExpiry)
	orDefault(&cfg.Mode, None)
	m := &Manager{cfg: cfg, clock: c, chunks: map[key]*chunk{}, owners: map[any]*owner{}, old: list.New(), spent: list.New(), empty: list.New(), stop: make(chan struct{})}
	m.work.L = &m.mu
	return m
}

func orDefault[T comparable](v *T, def T) {
	var zero T
	if *v == zero {
		*v = def
	}
}

// chunksOf is how many chunks a size stands for.
func chunksOf(bytes int64) int64 { return max(bytes/ChunkBytes, 1) }

// Mode is that of a volume whose own is mode, "" if it has none.
func (m *Manager) Mode(mode Mode) Mode {
	orDefault(&mode, m.cfg.Mode)
	return mode
}

// janitor forgets what nobody has asked for in a long time.
func (m *Manager) janitor() {
	t := time.NewTicker(m.cfg.Expiry / 2)
	defer t.Stop()
	for {
		select {
		case <-m.stop:
			return
		case <-t.C:
			m.expire()
		}
	}
}

// Close ends the pool. All handles are closed.
func (m *Manager) Close() error {
	m.mu.Lock()
	if m.closed {
		m.mu.Unlock()
		return nil
	}
	m.closed = true
	m.work.Broadcast()
	m.mu.Unlock()
	close(m.stop)
	m.wg.Wait()
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.freeSpareLocked()
}

// Load reads blocks of a source into p, as many as it has room for, from block
// first on. It may be called concurrently.
//
// Of a layer that is shared it reads what any op writes; or, if one of these ops
// is committed, nothing, and Until is 0. If no op writes anything there Until is
// not 0. Where what the ops write is not the same in all volumes it reads what it
// would if the layer were not shared, and says so by Apart.
type Load func(p []byte, first uint64) (Loaded, error)

// Loaded is what a Load has read.
type Loaded struct {
	// Bit i of Have tells that block first+i is there; the others' part of p is
	// undefined.
	Have uint64
	// What is there stays right until more than Until ops of the layer are committed,
	// or one that writes to these blocks is promoted; from then on Loads of them have
	// nothing.
	Until uint64
	// Apart tells that it is for one volume alone though the layer is shared.
	Apart bool
}

// Source is what is read ahead.
type Source struct {
	Load Load
	// Share, if not nil, is comparable, and the layer shares its chunks with the
	// others that were opened with the same: what its ops write, and the order they
	// are committed in, is the same in all.
	Share any
	// Inner: it lies below what is read ahead already, so that its reads are not in
	// Stats.Reads.
	Inner bool
}

// owner is whom chunks are for. Manager.mu guards it.
type owner struct {
	share   any // nil: one Handle alone
	handles int
	apart   bitmap // of chunks of which each volume has its own
}

// Handle reads one layer of a volume, or its base, ahead.
type Handle struct {
	m     *Manager
	mode  Mode
	load  Load
	inner bool
	// own are the chunks for this Handle alone, and all those that it loads. They
	// are the same unless the layer is shared: then own only has chunks that hold
	// nothing for this volume, though they may for others, and those that are
	// different in each volume.
	own, all *owner

	// Guarded by Manager.mu.
	notes   *simplelru.LRU[int64, note] // by end of the read divided by near
	window  int64                       // chunks
	running sync.WaitGroup              // tasks
	writes  writes
	took    time.Duration // of the last loads, about; 0: there was none
	closed  bool
}

// note says that a read has found nothing and where it ended.
type note struct {
	end int64
	at  time.Time
}

// Open begins to read a source ahead; mode "" stands for the node's.
func (m *Manager) Open(mode Mode, s Source) *Handle {
	mode = m.Mode(mode)
	notes, err := simplelru.NewLRU[int64, note](maxNotes, nil)
	if err != nil {
		panic(err) // of a size below 1 only
	}
	h := &Handle{m: m, mode: mode, load: s.Load, inner: s.Inner, own: &owner{handles: 1}, notes: notes, window: chunksOf(m.cfg.Window)}
	h.all = h.own
	if s.Share == nil {
		return h
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if h.all = m.owners[s.Share]; h.all == nil {
		h.all = &owner{share: s.Share}
		m.owners[s.Share] = h.all
	}
	h.all.handles++
	return h
}

// Close forgets everything about the layer, but for what it shares with others,
// and returns when no Load of it runs. Reads must have ended.
func (h *Handle) Close() {
	m := h.m
	m.mu.Lock()
	h.closed = true
	m.queue = slices.DeleteFunc(m.queue, func(t *task) bool {
		if t.h != h {
			return false
		}
		for _, c := range t.chunks {
			if c.taken == nil {
				m.dropLocked(c)
			}
		}
		return true
	})
	if h.all.handles--; h.all.handles == 0 && h.all != h.own {
		delete(m.owners, h.all.share)
	}
	for _, c := range m.chunks {
		if c.owner == h.own || c.owner == h.all && h.all.handles == 0 {
			m.dropLocked(c)
		}
	}
	m.mu.Unlock()
	h.running.Wait()
}
