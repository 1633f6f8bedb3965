package readahead

import (
	"github.com/snapmerge/snapmerge/pkg/blockio"
)

// Reader is what a read needs of the layer.
type Reader struct {
	// Committed is how many ops of the layer are committed. It only grows.
	Committed func() uint64
	// Direct reads len(p) bytes at off without read-ahead.
	Direct func(p []byte, off int64) error
}

// Read reads len(p) bytes at off of the layer's view, from what was read ahead as
// far as it is there, and returns how many bytes came from it. An error is
// Direct's.
func (h *Handle) Read(r Reader, p []byte, off int64) (ahead int, err error) {
	start := h.m.clock.now()
	defer func() { h.m.stats.reads(h.mode).observe(h.m.clock.now().Sub(start)) }()
	if h.mode == None || len(p) == 0 {
		return 0, r.Direct(p, off)
	}
	missed, shared := h.begin(off, int64(len(p))), false
	hole := 0 // bytes before it are read, those from it up to at are not there
	for at := 0; at < len(p); {
		pos := off + int64(at)
		n := min(len(p)-at, int(ChunkBytes-pos%ChunkBytes))
		c := h.acquire(r, pos/ChunkBytes)
		if c == nil {
			missed = true
			at += n
			continue
		}
		skip := int(pos % ChunkBytes)
		have, others := c.have, c.taken != h
		copied := copyBlocks(p[at:at+n], c, skip)
		h.release(c, skip, n)
		if copied == 0 {
			at += n
			continue
		}
		ahead += copied
		shared = shared || others
		for end := at + n; at < end; {
			block := (off + int64(at)) % ChunkBytes / blockio.BlockSize
			part := min(end-at, int(blockio.BlockSize-(off+int64(at))%blockio.BlockSize))
			if have>>block&1 != 0 {
				if err := direct(r, p[hole:at], off+int64(hole)); err != nil {
					return ahead, err
				}
				hole = at + part
			}
			at += part
		}
	}
	h.m.stats.count(missed, ahead > 0, shared)
	return ahead, direct(r, p[hole:], off+int64(hole))
}

func direct(r Reader, p []byte, off int64) error {
	if len(p) == 0 {
		return nil
	}
	return r.Direct(p, off)
}

// copyBlocks copies what the chunk has of the bytes from skip on, and returns how
// many that are. The chunk is acquired.
func copyBlocks(dst []byte, c *chunk, skip int) (n int) {
	if c.have == 0 {
		return 0
	}
	src := c.mem.Bytes()[skip:]
	for i := 0; i < len(dst); {
		block := (skip + i) / blockio.BlockSize
		part := min(len(dst)-i, blockio.BlockSize-(skip+i)%blockio.BlockSize)
		if c.have>>block&1 != 0 {
			n += copy(dst[i:i+part], src[i:])
		}
		i += part
	}
	return n
}

// begin sees to it that what the read wants is on its way, or notes the read. It
// tells whether something was neither there nor on its way.
func (h *Handle) begin(off, n int64) (missed bool) {
	m := h.m
	m.mu.Lock()
	first, last := off/ChunkBytes, (off+n-1)/ChunkBytes
	missing := int64(-1)
	for i := first; i <= last; i++ {
		c := h.findLocked(i)
		if c == nil {
			if missing < 0 {
				missing = i
			}
			continue
		}
		if a := c.arm; a != nil && h.mode == Async {
			c.arm = nil
			if !a.off {
				a.off = true
				h.widenLocked()
				h.submitLocked(a.next, a.next)
			}
		}
	}
	var batch []*chunk
	switch {
	case missing < 0:
	case h.mode == Sync:
		for i := missing; i < max(missing+chunksOf(m.cfg.Batch), last+1); i++ {
			if c := h.addLocked(i); c != nil {
				batch = append(batch, c)
			}
		}
	case missing > first || h.sequentialLocked(off):
		h.submitLocked(missing, last+1)
	default:
		h.noteLocked(off + n)
	}
	m.mu.Unlock()
	if len(batch) > 0 {
		now := m.clock.now()
		h.do(batch, now, now)
	}
	return missing >= 0
}

// widenLocked: a reader has got on to the next window. mu must be held.
func (h *Handle) widenLocked() {
	if most := h.m.cfg.MaxWindow; most > h.m.cfg.Window {
		h.window = min(2*h.window, chunksOf(most))
	}
}

// sequentialLocked tells whether a read that begins at off continues another one,
// whose note it takes. mu must be held.
func (h *Handle) sequentialLocked(off int64) bool {
	for k := off / near; k >= off/near-1; k-- {
		n, ok := h.notes.Peek(k)
		if ok && off >= n.end && off-n.end <= near {
			h.notes.Remove(k)
			return h.m.clock.now().Sub(n.at) < h.m.cfg.Expiry
		}
	}
	return false
}

// noteLocked notes that a read has found nothing and where it ends. mu must be
// held.
func (h *Handle) noteLocked(end int64) {
	h.notes.Add(end/near, note{end, h.m.clock.now()})
}

// acquire returns the chunk, loaded and right, which the caller has to release;
// nil if there is none. It waits for one that is being loaded, and loads one that
// the pool has not come to yet: nobody waits for what others want.
func (h *Handle) acquire(r Reader, index int64) *chunk {
	m := h.m
	m.mu.Lock()
	defer m.mu.Unlock()
	c := h.findLocked(index)
	if c != nil && !c.loaded {
		taken := c.taken
		m.mu.Unlock()
		if taken == nil {
			h.fill(c)
		}
		m.wait(c) // somebody may have been faster
		m.mu.Lock()
		c = h.findLocked(index)
	}
	switch {
	case c == nil || !c.loaded:
		return nil
	case c.have != 0 && r.Committed() > c.until:
		// Part of it is in the base by now.
		if h.own != h.all {
			h.nothingLocked(c)
		}
		if c.owner.handles == 1 {
			m.dropLocked(c)
		}
		return nil
	}
	c.refs++
	return c
}

// wait waits until the chunk is loaded, or will not be, or is late.
func (m *Manager) wait(c *chunk) {
	select {
	case <-c.ready:
		return
	default:
	}
	start := m.clock.now()
	select {
	case <-c.ready:
	case <-m.clock.after(waitLimit):
		m.stats.late.Add(1)
	}
	m.stats.blocked.observe(m.clock.now().Sub(start))
}

// release ends the reading of n bytes from skip on.
func (h *Handle) release(c *chunk, skip, n int) {
	m := h.m
	m.mu.Lock()
	defer m.mu.Unlock()
	c.refs--
	again := c.used == c.have
	for b := skip / blockio.BlockSize; b <= (skip+n-1)/blockio.BlockSize; b++ {
		c.used |= 1 << b & c.have
	}
	if c.dropped {
		m.freeLocked(c)
		return
	}
	c.touched = m.clock.now()
	switch {
	case c.have == 0:
		m.empty.MoveToFront(c.place)
	case c.used == c.have && c.owner.handles == 1:
		m.moveLocked(c, m.spent) // whoever reads on does not come back
	case c.used != c.have || again:
		m.moveLocked(c, m.old)
	} // else it stays where it is until another one comes
}
