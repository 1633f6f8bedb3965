package readahead

import (
	"container/list"
	"errors"
	"math/bits"
	"time"

	"github.com/snapmerge/snapmerge/pkg/blockio"
)

type key struct {
	owner *owner
	index int64 // offset in the volume divided by ChunkBytes
}

// chunk is ChunkBytes of a layer that are loaded, or about to be. Manager.mu
// guards it but for the content of mem, which its readers hold by refs.
type chunk struct {
	key
	// ready is closed when the chunk is loaded or will not be: then it is not among
	// Manager.chunks any more.
	ready  chan struct{}
	taken  *Handle // who loads it, or has
	by     *worker // that is loading it; nil: a read is, or nobody
	loaded bool
	late   bool // a reader has given it up while it was being loaded: nobody waits any more

	mem        *blockio.Arena // nil: nothing is there
	have, used uint64         // bits of blocks: that are there, that were read
	until      uint64         // see Load
	refs       int            // readers that copy
	dropped    bool           // mem goes when refs is 0
	touched    time.Time
	place      *list.Element // in Manager.old, spent, or empty
	arm        *arm
}

// arm is what the chunks at the end of a window share: the first one that is
// touched sets it off.
type arm struct {
	next int64 // chunk that the next window begins with
	off  bool
}

// findLocked returns the chunk of that index, loaded or not, or nil. mu must be
// held.
func (h *Handle) findLocked(index int64) *chunk {
	if c := h.m.chunks[key{h.own, index}]; c != nil {
		return c
	}
	return h.m.chunks[key{h.all, index}]
}

// addLocked makes an entry for a chunk that is to be loaded; nil if there is one,
// or if it is being written to. mu must be held.
func (h *Handle) addLocked(index int64) *chunk {
	if h.findLocked(index) != nil || h.writes.at(index) {
		return nil
	}
	c := &chunk{key: key{h.all, index}, ready: make(chan struct{})}
	if h.all.apart.has(index) {
		c.owner = h.own
	}
	h.m.chunks[c.key] = c
	return c
}

// fill loads the chunk if nobody has taken it. It tells whether the chunk may hold
// something. w is the worker that calls it, nil if it is a read.
func (h *Handle) fill(w *worker, c *chunk) (worth bool) {
	m := h.m
	m.mu.Lock()
	if h.closed && c.taken == nil {
		m.dropLocked(c)
	}
	if c.taken != nil || c.dropped {
		defer m.mu.Unlock()
		return !c.loaded || c.have != 0
	}
	c.taken = h
	mem := m.memoryLocked(c)
	if mem == nil {
		m.mu.Unlock()
		return true
	}
	c.by = w
	m.mu.Unlock()
	start := m.clock.now()
	got, err := h.load(mem.Bytes(), uint64(c.index)*chunkBlocks)
	m.mu.Lock()
	defer m.mu.Unlock()
	c.by = nil
	w.lowerLocked()
	h.tookLocked(m.clock.now().Sub(start))
	if err != nil || got.Have == 0 || c.dropped {
		m.giveBackLocked(mem)
		mem = nil
	}
	if c.dropped {
		return true
	}
	if err != nil {
		// Whoever wants it will meet the error by himself.
		m.stats.failed.Add(1)
		m.dropLocked(c)
		return true
	}
	if got.Apart && c.owner != h.own {
		h.apartLocked(c)
	}
	if got.Have == 0 && got.Until == 0 && c.owner != h.own {
		m.dropLocked(c) // others may find something
		h.nothingLocked(c)
		return false
	}
	c.mem, c.have, c.until = mem, got.Have, got.Until
	m.stats.blocks.Add(uint64(bits.OnesCount64(c.have)))
	m.loadedLocked(c)
	return c.have != 0
}

// apartLocked: a chunk of a shared layer, which is being loaded, is different in
// each volume. mu must be held.
func (h *Handle) apartLocked(c *chunk) {
	delete(h.m.chunks, c.key)
	c.owner.apart.add(c.index)
	c.owner = h.own
	h.m.chunks[c.key] = c
}

// nothingLocked notes that a shared chunk holds nothing for this volume, now and
// ever after. mu must be held.
func (h *Handle) nothingLocked(shared *chunk) {
	k := key{h.own, shared.index}
	if h.closed || h.m.chunks[k] != nil {
		return
	}
	c := &chunk{key: k, ready: make(chan struct{}), taken: h, arm: shared.arm}
	h.m.chunks[k] = c
	h.m.loadedLocked(c)
}

// loadedLocked: what c has is known. mu must be held.
func (m *Manager) loadedLocked(c *chunk) {
	c.loaded, c.touched = true, m.clock.now()
	if c.have != 0 {
		c.place = m.old.PushFront(c)
	} else {
		c.place = m.empty.PushFront(c)
		for m.empty.Len() > emptyChunks*int(chunksOf(m.cfg.Memory)) {
			m.dropLocked(m.empty.Back().Value.(*chunk))
		}
	}
	close(c.ready)
}

// memoryLocked finds memory for a chunk. If there is none the chunk is dropped and
// nil returned. mu must be held.
func (m *Manager) memoryLocked(c *chunk) *blockio.Arena {
	most := int(chunksOf(m.cfg.Memory))
	m.evictLocked(m.spent, func() bool { return m.loaded >= most || len(m.spare) == 0 && m.spent.Len() > spentChunks })
	m.evictLocked(m.old, func() bool { return m.loaded >= most })
	if m.loaded < most {
		if n := len(m.spare); n > 0 {
			mem := m.spare[n-1]
			m.spare = m.spare[:n-1]
			m.loaded++
			return mem
		}
		if mem, err := blockio.NewArena(ChunkBytes); err == nil {
			m.loaded++
			return mem
		}
	}
	m.stats.failed.Add(1)
	m.dropLocked(c)
	return nil
}

// evictLocked drops chunks of a list that nobody reads, as long as more have to go.
// mu must be held.
func (m *Manager) evictLocked(l *list.List, more func() bool) {
	for e := l.Back(); e != nil && more(); {
		prev := e.Prev()
		if c := e.Value.(*chunk); c.refs == 0 {
			m.wasteLocked(c)
			m.dropLocked(c)
		}
		e = prev
	}
}

// moveLocked makes a chunk with memory the last one of l to go. mu must be held.
func (m *Manager) moveLocked(c *chunk, l *list.List) {
	m.old.Remove(c.place)
	m.spent.Remove(c.place)
	c.place = l.PushFront(c)
}

func (m *Manager) giveBackLocked(mem *blockio.Arena) {
	m.spare = append(m.spare, mem)
	m.loaded--
}

// wasteLocked narrows the window of a volume of whose chunk not even half was
// read. mu must be held.
func (m *Manager) wasteLocked(c *chunk) {
	if m.cfg.MaxWindow > m.cfg.Window && 2*bits.OnesCount64(c.used) < bits.OnesCount64(c.have) {
		c.taken.window = max(c.taken.window/2, 1)
	}
}

// dropLocked takes the chunk away, loaded or not. Its memory goes when nobody
// reads it any more. mu must be held.
func (m *Manager) dropLocked(c *chunk) {
	if c.dropped {
		return
	}
	c.dropped = true
	delete(m.chunks, c.key)
	if !c.loaded {
		close(c.ready)
		return
	}
	m.old.Remove(c.place)
	m.spent.Remove(c.place)
	m.empty.Remove(c.place)
	m.stats.wasted.Add(uint64(bits.OnesCount64(c.have&^c.used)) * blockio.BlockSize)
	m.freeLocked(c)
}

// freeLocked gives a dropped chunk's memory back if nobody reads it. mu must be
// held.
func (m *Manager) freeLocked(c *chunk) {
	if c.dropped && c.refs == 0 && c.mem != nil {
		m.giveBackLocked(c.mem)
		c.mem = nil
	}
}

// expire forgets chunks that nobody has asked for, and gives the system the memory
// that is not in use.
func (m *Manager) expire() {
	m.mu.Lock()
	defer m.mu.Unlock()
	late := m.clock.now().Add(-m.cfg.Expiry)
	for _, c := range m.chunks {
		if c.loaded && c.refs == 0 && !c.touched.After(late) {
			m.wasteLocked(c)
			m.dropLocked(c)
		}
	}
	_ = m.freeSpareLocked() // what cannot be unmapped is lost, nothing else
}

func (m *Manager) freeSpareLocked() error {
	var errs []error
	for _, mem := range m.spare {
		errs = append(errs, mem.Close())
	}
	m.spare = nil
	return errors.Join(errs...)
}
