// Package merge folds a COW into its base device while readers go on: windows
// of ordered ops with read-ahead into a crash-safe scratch space, then the
// independent ops (replace and zero), with progress kept in a per-volume
// journal or, as Android does, inside the COW file.
//
// The order of steps of one ordered window k, and why a crash between any two
// of them loses nothing (spec merge-engine 6, 7):
//
//	read sources of k          I1: no op reads what an earlier op wrote, so this
//	                           may run while k-1 is being written
//	write scratch of k         only ops whose sources k itself overwrites; into
//	                           the slot that k-1 does not use
//	base flush of k-1 returns
//	write header of k          says: all before k is committed, k may be half
//	flush journal              written from now on
//	publish k, drain readers   reads of k's blocks now come from its buffer
//	write base of k
//	flush base
//
// After a crash the newest header names the committed ops and the one
// window that may be half written. Redoing it is safe: logged ops come from the
// slot, the sources of the others were not overwritten by k (else they would
// have been logged) nor by a later window (its header was not durable).
//
// Independent ops need no header before they are written: until one says that
// they are committed they are read from the COW, and done again after a crash.
// They may overwrite sources of the last window, which therefore logs all of its
// blocks; its commit is that of the first independent ops, and of both there is
// one flush of the base before it.
//
// What independent ops write may be promoted: merged out of turn, because somebody
// reads it (see Merger.Promote). Bits that say so are durable before anything depends
// on them, and the merge leaves alone what has one, so it does nothing again over what
// a guest wrote there meanwhile.
//
// # Journal file
//
// All integers are little-endian. Unit of alignment: 4096 bytes.
//
//	offset           length          content
//	0                4096            file header
//	4096             S               slot 0
//	4096+S           S               slot 1
//	4096+2S          P               promotions; only in version 2
//
// S = 4096 + E + C*4096 with C the capacity in blocks and E = C*8 rounded up to
// 4096. The slot of a header is its sequence number modulo 2.
//
// File header (CRC-32C over bytes 0..59):
//
//	offset  size  field
//	0       8     magic "SNPMJRNL"
//	8       4     format version: 1, or 2 once there may be promotions
//	12      4     capacity C of a slot, in blocks
//	16      16    journal id (random)
//	32      8     size of the base when the journal was made, bytes
//	40      8     version 2: chunks that the promotions have room for, N;
//	              a multiple of 15360
//	48      4     version 2: blocks of a chunk
//	52      8     version 2: layer id whose promotions count
//	60      4     CRC-32C
//
// It changes when the first chunk of a layer is promoted, and back to version 1 when
// the layer is gone, and to that end it is written
// to byte 512 first: where it is damaged at byte 0, that one counts.
//
// Slot header (CRC-32C over bytes 0..123), which its block has twice, at 0 and at
// 512, so that one damaged sector does not matter. Recovery could not do without
// the newest header: the base may have parts of its window.
//
//	offset  size  field
//	0       8     magic "SNPMSLOT"
//	8       8     sequence number, grows by 1 with every header
//	16      8     layer id: which layer of the volume is being merged
//	24      8     length of the COW, bytes
//	32      4     CRC-32C of the COW's header and ops (cow.Identity)
//	36      4     number of entries
//	40      8     ops committed, in merge order
//	48      8     bytes of the base those ops wrote, promotions not counted
//	56      8     window: first op
//	64      8     window: end (one past the last op); first = end means none
//	72      4     CRC-32C over the entries and their data
//	76      4     how often the merge was resumed
//	80      1     1 if the layer is merged completely
//	81      43    zero
//	124     4     CRC-32C
//
// An entry is 8 bytes: op of the window relative to its first (u32), block the
// op writes (u32). The k-th entry's final block content (xor applied) is the
// k-th block of the slot's data.
package merge

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"sync"
	"sync/atomic"
	"time"

	"github.com/snapmerge/snapmerge/pkg/blockio"
	"github.com/snapmerge/snapmerge/pkg/cow"
)

const bs = blockio.BlockSize

// ErrDamaged says that a journal holds no state that can be trusted. The merge
// is never restarted from the beginning instead.
var ErrDamaged = errors.New("journal is damaged")

// ErrMismatch says that a journal, a COW and a base do not belong together.
var ErrMismatch = errors.New("journal does not belong here")

// Config is what a Merger works on.
type Config struct {
	// Ops are the ops of the COW, and COW is where their payload is read.
	Ops cow.Ops
	COW io.ReaderAt
	// Base is merged into. Nobody but the engine writes to blocks that are not
	// settled (see Layer.Settled).
	Base blockio.Device
	// Epoch is the one the readers of the Layer stay in.
	Epoch *Epoch
	// IO is the back end for batches on the base.
	IO blockio.Kind
	// NoReadAhead keeps sources out of the scratch space: windows are cut where
	// redoing them from their sources would be unsafe. A slow yardstick.
	NoReadAhead bool
	// Reflink has long runs of copy ops share the space of their sources, where
	// the file system of the base can do that, instead of moving data. Blocks that
	// are shared need new space when they are written to later on.
	Reflink bool
	// CommitEvery is for how long independent ops are written between two commits; 0:
	// a second. Until the commit guest writes to their blocks take the way through a
	// log, and progress stands still. A merge that was interrupted before commits
	// sooner at first.
	CommitEvery time.Duration
	// ChunkBlocks is what is promoted as one, in blocks; 0: DefaultChunkBlocks. What
	// a journal has of a layer already stays as it is.
	ChunkBlocks int
	// Pace, if set, is called before n bytes are written to the base; it waits
	// as long as the merge has to hold back. An error from it stops Run.
	Pace func(ctx context.Context, n int) error
	// PaceAhead, if set, is called likewise before n bytes are read from the base, or
	// written to the scratch space, for windows to come.
	PaceAhead func(ctx context.Context, n int) error
	// Counters, if not nil, count what is done in place of the Merger's own, so
	// that the counts of mergers that follow each other go on.
	Counters *Counters
}

// Counters count what Mergers do. All only grow.
type Counters struct {
	Windows       atomic.Uint64 // windows of ordered ops that were begun
	BlocksWritten atomic.Uint64 // to the base
	BytesRead     atomic.Uint64 // from base and COW
	BytesWritten  atomic.Uint64 // to the base, zeros not counted
	ScratchBytes  atomic.Uint64 // to the scratch space
	Flushes       atomic.Uint64 // of base and journal
	Promoted      atomic.Uint64 // bytes of the base that ops wrote out of turn
}

// Stats are the counters of a Merger since it was opened; all but the sizes of
// what is to be done only grow.
type Stats struct {
	Ops, OpsTotal     uint64 // ops committed, all ops
	Bytes, BytesTotal uint64 // bytes of the base that committed ops wrote or that were promoted, that all ops write
	BlocksWritten     uint64 // blocks written to the base by this Merger
	BytesRead         uint64 // from base and COW
	BytesWritten      uint64 // to the base
	ScratchBytes      uint64 // to the scratch space
	Flushes           uint64 // of base and journal
	Windows           uint64 // of ordered ops, begun
	Resumes           uint64 // how often this merge was taken up again
}

// Merger merges one COW into one base. It is made by OpenJournaled or
// OpenInPlace and serves reads through Layer from then on.
type Merger struct {
	cfg    Config
	prog   progress
	layer  *Layer
	loader *loader
	early  early

	run  sync.Mutex // held by Run
	redo *window    // begun and not yet wholly written, or nil; run must be held

	committedBytes uint64 // goes with layer.state.committed; run must be held

	// commitSoon: the merge was, or may have been, interrupted before. First commits
	// of independent ops come sooner, so that who is killed again and again gets on.
	commitSoon bool

	batchBytes  int // see the constants; tests have less
	cloneBlocks int
	commitBytes uint64

	counters  *Counters
	statBytes atomic.Uint64
	resumes   uint64

	cloner  blockio.Cloner
	cloning atomic.Bool // whether cloner is there, and works
}

// progress is where a merge keeps what it has done: a Journal or the COW file
// itself. One goroutine uses it at a time, but stage may run beside the writing
// of the window begun before.
type progress interface {
	// windowBlocks is the most ops a window may have.
	windowBlocks() int
	// scratch tells whether content can be logged at all.
	scratch() bool
	// logsWhole tells whether a window with logged ops is logged with all its ops.
	logsWhole() bool
	// stage may write the logged content of w early. begin of the window before
	// w has returned.
	stage(w *window, q blockio.Queue) error
	// begin records durably that the ops before w are committed and that w may
	// be half written from now on. The base was flushed after the ops before w.
	begin(w *window, q blockio.Queue) error
	// commit records durably that the ops before upTo, which wrote bytes bytes,
	// are committed and none is in progress.
	commit(upTo, bytes uint64) error
	// note says, if that is not known yet, that the merge has begun, to whoever
	// opens it after this process was killed. It need not be durable.
	note() error
	// counts returns bytes written to scratch and flushes since the last call.
	counts() (scratch, flushes uint64)
	// close gives memory back.
	close()
}

// recovered is what progress says at the opening.
type recovered struct {
	committed, bytes uint64
	start, end       uint64            // window that may be half written; equal: none
	logged           map[uint64][]byte // by block: content that only the scratch has
	resumes          uint64
	promoted         *chunkSet // nil: nothing
	promotedBytes    uint64
}

func open(cfg Config, prog progress, rec recovered) (*Merger, error) {
	if rec.committed > cfg.Ops.Len() {
		return nil, fmt.Errorf("%w: %d ops committed, the COW has %d", ErrMismatch, rec.committed, cfg.Ops.Len())
	}
	if err := CheckBase(cfg.Ops, cfg.Base.Size()); err != nil {
		return nil, err
	}
	m := &Merger{cfg: cfg, prog: prog, resumes: rec.resumes, committedBytes: rec.bytes, counters: cfg.Counters,
		commitSoon: rec.resumes > 0,
		batchBytes: batchBytes, cloneBlocks: cloneBlocks, commitBytes: commitBytes}
	if m.counters == nil {
		m.counters = &Counters{}
	}
	if cfg.Reflink {
		c, ok := blockio.AsCloner(cfg.Base)
		m.cloner = c
		m.cloning.Store(ok)
	}
	if m.cfg.CommitEvery == 0 {
		m.cfg.CommitEvery = commitTime
	}
	m.loader = newLoader(cfg.COW, &m.counters.BytesRead)
	m.early.ended.L = &m.early.mu
	m.early.bytes.Store(rec.promotedBytes)
	m.statBytes.Store(rec.bytes)
	st := &state{committed: rec.committed}
	if rec.end > rec.start {
		q, err := blockio.NewQueue(blockio.Sync, 1)
		if err != nil {
			return nil, err
		}
		defer q.Close()
		w, err := planRange(cfg.Ops, rec.start, rec.end)
		if err != nil {
			return nil, err
		}
		w.begun = true
		if err := w.alloc(); err != nil {
			return nil, err
		}
		if err := m.fill(w, q, rec.logged); err != nil {
			w.free()
			return nil, fmt.Errorf("rebuild of the window that was in progress: %w", err)
		}
		m.redo, st.window = w, w
	}
	m.layer = newLayer(cfg.Ops, cfg.COW, st)
	m.layer.promoted.Store(rec.promoted)
	return m, nil
}

// BaseTooSmallError says that a COW reads or writes past the end of its base.
type BaseTooSmallError struct {
	Need, Have int64 // bytes
}

func (e *BaseTooSmallError) Error() string {
	return fmt.Sprintf("base has %d bytes, the COW needs %d", e.Have, e.Need)
}

// CheckBase refuses a base of size bytes that the ops read or write past the end
// of.
func CheckBase(ops cow.Ops, size int64) error {
	if size%bs != 0 {
		return fmt.Errorf("base has %d bytes, not a multiple of %d", size, bs)
	}
	blocks, source := ops.Bounds()
	// No base is so large; without the bounds the numbers would turn over.
	need := int64(max(min(blocks, math.MaxInt64/bs)*bs, min(source, math.MaxInt64)))
	if need > size {
		return &BaseTooSmallError{Need: need, Have: size}
	}
	return nil
}

// Layer is the readable side of the merge.
func (m *Merger) Layer() *Layer { return m.layer }

// Done tells whether every op is durably in the base.
func (m *Merger) Done() bool { return m.layer.Committed() == m.cfg.Ops.Len() }

// IO is the back end that batches on the base go through.
func (m *Merger) IO() blockio.Kind {
	if m.cfg.IO == blockio.Auto {
		if blockio.ProbeURing() == nil {
			return blockio.URing
		}
		return blockio.Sync
	}
	return m.cfg.IO
}

// Stats returns the counters. It may be called at any time.
func (m *Merger) Stats() Stats {
	c := m.counters
	total := m.cfg.Ops.TargetBlocks() * bs
	return Stats{
		Ops: m.layer.Committed(), OpsTotal: m.cfg.Ops.Len(),
		Bytes: min(m.statBytes.Load()+m.early.bytes.Load(), total), BytesTotal: total,
		BlocksWritten: c.BlocksWritten.Load(), BytesRead: c.BytesRead.Load(), BytesWritten: c.BytesWritten.Load(),
		ScratchBytes: c.ScratchBytes.Load(), Flushes: c.Flushes.Load(), Windows: c.Windows.Load(), Resumes: m.resumes,
	}
}

// Run merges until all is done or ctx ends, and may be called again after any
// return. It stops within one request of I/O; what was begun stays served from
// memory and is redone by the next Run or by recovery. With ctx ended it returns
// ctx's error.
func (m *Merger) Run(ctx context.Context) error {
	return m.RunTurn(ctx, func() bool { return false })
}

// RunTurn is Run that ends, with nil, when over says so, too. over is asked where
// everything that was written is committed next: nothing has to be done again, or
// kept in memory until the next turn.
func (m *Merger) RunTurn(ctx context.Context, over func() bool) error {
	m.run.Lock()
	defer m.run.Unlock()
	// Its buffers are large, and the next turn may be far.
	defer func() { m.loader = newLoader(m.cfg.COW, &m.counters.BytesRead) }()
	if m.Done() {
		return nil
	}
	if err := m.runOrdered(ctx, over); err != nil || m.Done() || m.next() < m.cfg.Ops.Ordered() {
		return err
	}
	return m.runIndependent(ctx, over)
}

// next is the first op that is neither committed nor in a window. run must be held.
func (m *Merger) next() uint64 {
	if m.redo != nil {
		return m.redo.end
	}
	return m.layer.Committed()
}

// Close frees the memory of the merge. No reads of the Layer may
// follow, and Run must not be running. Promote does nothing from then on.
func (m *Merger) Close() {
	m.closeEarly()
	m.run.Lock()
	defer m.run.Unlock()
	if m.redo != nil {
		m.redo.free()
		m.redo = nil
	}
	m.prog.close()
}

// publish makes st what readers see and waits until none sees anything older.
func (m *Merger) publish(st *state) {
	m.layer.state.Store(st)
	m.statBytes.Store(m.committedBytes)
	m.cfg.Epoch.Synchronize()
}

func (m *Merger) flushBase() error {
	m.counters.Flushes.Add(1)
	if err := m.cfg.Base.Flush(); err != nil {
		return fmt.Errorf("flush of the base: %w", err)
	}
	return nil
}

func (m *Merger) addCounts() {
	s, f := m.prog.counts()
	m.counters.ScratchBytes.Add(s)
	m.counters.Flushes.Add(f)
}

func (m *Merger) pace(ctx context.Context, n int) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if m.cfg.Pace == nil {
		return nil
	}
	return m.cfg.Pace(ctx, n)
}

// writeBase writes a batch to the base in pieces that Pace is asked about.
func (m *Merger) writeBase(ctx context.Context, q blockio.Queue, batch []blockio.Request) error {
	limit := math.MaxInt
	if m.cfg.Pace != nil {
		limit = paceBytes
	}
	return pieces(batch, limit, func(part []blockio.Request, bytes int) error {
		if err := m.pace(ctx, bytes); err != nil {
			return err
		}
		if err := q.Write(m.cfg.Base, part); err != nil {
			return fmt.Errorf("write to the base: %w", err)
		}
		m.counters.BytesWritten.Add(uint64(bytes))
		m.counters.BlocksWritten.Add(uint64(bytes) / bs)
		return nil
	})
}

const (
	// requestBytes is the most one transfer of a batch carries.
	requestBytes = 1 << 20
	// paceZeros is how many ranges are zeroed between two calls of Pace.
	paceZeros = 64
	// commitBytes and commitTime bound what a crash in the independent phase
	// makes the merge do again; it does no harm to do it again. Where
	// commits are to come soon the first batch is committed, then what takes
	// commitFirst, then twice that and so on.
	commitBytes = 1 << 30
	commitTime  = time.Second
	commitFirst = commitTime / 8
)

// OpenJournaled makes a Merger that keeps its progress in the journal. layer
// numbers the COWs that are merged into one base one after the other; a journal
// that knows another COW under that number is refused with ErrMismatch.
func OpenJournaled(cfg Config, j *Journal, layer uint64, id cow.Identity) (*Merger, error) {
	if base := cfg.Base.Size(); base < j.baseSize {
		return nil, fmt.Errorf("%w: the base has %d bytes, %s is of one of %d", ErrMismatch, base, j.f.Name(), j.baseSize)
	}
	if j.capacity == 0 && cfg.Ops.Ordered() > 0 {
		return nil, fmt.Errorf("%w: %s has no room for ordered ops", ErrMismatch, j.f.Name())
	}
	rec, err := j.attach(layer, id, cfg.Ops.Len())
	if err != nil {
		return nil, err
	}
	return open(cfg, j, rec)
}
