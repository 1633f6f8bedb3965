package readahead

import (
	"time"

	"github.com/snapmerge/snapmerge/pkg/blockio"
)

// Reader is what a read needs of the layer.
type Reader struct {
	// Committed is how many ops of the layer are committed. It only grows.
	Committed func() uint64
	// Promoted tells whether any op that writes to the n bytes at off was promoted:
	// merged though it is not committed. Nil: none ever is.
	Promoted func(off, n int64) bool
	// Direct reads len(p) bytes at off without read-ahead.
	Direct func(p []byte, off int64) error
}

// Read reads len(p) bytes at off of the layer's view, from what was read ahead as
// far as it is there, and returns how many bytes came from it. An error is
// Direct's.
func (h *Handle) Read(r Reader, p []byte, off int64) (ahead int, err error) {
	if !h.inner {
		start := h.m.clock.now()
		defer func() { h.m.stats.reads(h.mode).observe(h.m.clock.now().Sub(start)) }()
	}
	if h.mode == None || len(p) == 0 {
		return 0, r.Direct(p, off)
	}
	var few [4]want
	q := request{h: h, r: r, p: p, off: off, first: off / ChunkBytes, wants: few[:0]}
	coming := q.begin()
	defer q.release()
	if coming {
		q.load()
	}
	// What somebody else is loading comes last: the rest is read meanwhile.
	for i := 0; i < len(q.wants); i++ {
		from := i
		for i < len(q.wants) && !q.wants[i].coming() {
			i++
		}
		if err := q.read(from, i); err != nil {
			return q.ahead, err
		}
	}
	for i := range q.wants {
		if !q.wants[i].coming() {
			continue
		}
		q.wait(i)
		if err := q.read(i, i+1); err != nil {
			return q.ahead, err
		}
	}
	h.m.stats.count(q.missed, q.ahead > 0, q.shared)
	return q.ahead, nil
}

// request is a read under way.
type request struct {
	h     *Handle
	r     Reader
	p     []byte
	off   int64
	first int64  // chunk
	wants []want // the chunks from first on

	missed bool // something was neither there nor on its way
	ahead  int  // bytes that were read ahead
	shared bool // some of them for another volume
}

// want is a chunk of a request.
type want struct {
	c    *chunk // nil: the read has to do without
	held bool   // it is loaded, and stays until it is released
}

// coming tells whether the chunk is still to be loaded.
func (w *want) coming() bool { return w.c != nil && !w.held }

// bounds are the bytes of p that lie in the chunks from the i-th up to the j-th.
func (q *request) bounds(i, j int) (from, to int) {
	at := func(i int) int64 { return (q.first+int64(i))*ChunkBytes - q.off }
	return int(max(at(i), 0)), int(min(at(j), int64(len(q.p))))
}

// read reads what lies in the chunks from the i-th up to the j-th, of which none is
// coming.
func (q *request) read(i, j int) error {
	if i == j {
		return nil
	}
	hole, _ := q.bounds(i, j) // bytes before it are read, those from it on to at are not there
	at := hole
	for ; i < j; i++ {
		from, to := q.bounds(i, i+1)
		at = from
		c := q.wants[i].c
		if c == nil {
			at = to
			continue
		}
		skip := int((q.off + int64(from)) % ChunkBytes)
		copied := copyBlocks(q.p[from:to], c, skip)
		if copied == 0 {
			at = to
			continue
		}
		q.ahead += copied
		q.shared = q.shared || c.taken != q.h
		if copied == to-from {
			if err := q.direct(hole, from); err != nil {
				return err
			}
			hole, at = to, to
			continue
		}
		for at < to {
			in := (q.off + int64(at)) % ChunkBytes
			part := min(to-at, int(blockio.BlockSize-in%blockio.BlockSize))
			if c.have>>(in/blockio.BlockSize)&1 != 0 {
				if err := q.direct(hole, at); err != nil {
					return err
				}
				hole = at + part
			}
			at += part
		}
	}
	return q.direct(hole, at)
}

// direct reads bytes of p without read-ahead.
func (q *request) direct(from, to int) error {
	if from >= to {
		return nil
	}
	return q.r.Direct(q.p[from:to], q.off+int64(from))
}

// copyBlocks copies what the chunk has of the bytes from skip on, and returns how
// many that are. The chunk is acquired.
func copyBlocks(dst []byte, c *chunk, skip int) (n int) {
	if c.have == 0 {
		return 0
	}
	src := c.mem.Bytes()[skip:]
	if c.have == 1<<chunkBlocks-1 {
		return copy(dst, src)
	}
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
// tells whether something is coming.
func (q *request) begin() (coming bool) {
	h, m := q.h, q.h.m
	m.mu.Lock()
	end := q.off + int64(len(q.p))
	last := (end - 1) / ChunkBytes
	missing := int64(-1)
	for i := q.first; i <= last; i++ {
		w := want{c: h.findLocked(i)}
		if w.c == nil {
			if missing < 0 {
				missing = i
			}
		} else if a := w.c.arm; a != nil && h.mode == Async {
			w.c.arm = nil
			if !a.off {
				a.off = true
				h.widenLocked()
				h.submitLocked(a.next, a.next, last-q.first+1)
			}
		}
		q.wants = append(q.wants, w)
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
	case missing > q.first || h.sequentialLocked(q.off):
		h.submitLocked(missing, last+1, last-q.first+1)
	default:
		h.noteLocked(end)
	}
	q.missed = missing >= 0
	for i := range q.wants {
		q.lookLocked(i)
		coming = coming || q.wants[i].coming()
	}
	m.mu.Unlock()
	if len(batch) > 0 {
		now := m.clock.now()
		h.do(nil, batch, now, now)
	}
	return coming
}

// lookLocked holds the i-th chunk if it is loaded and right; mu must be held. A
// chunk that nobody has begun to load, that the read wants all of, and that is for
// nobody else is given up: its way through the cache would be one copy more.
func (q *request) lookLocked(i int) {
	h, w := q.h, &q.wants[i]
	index := q.first + int64(i)
	c := h.findLocked(index)
	*w = want{c: c}
	switch {
	case c == nil:
		q.missed = true
	case !c.loaded && c.late && c.taken != nil:
		w.c = nil
		q.missed = true
	case !c.loaded:
		from, to := q.bounds(i, i+1)
		if c.taken == nil && to-from == ChunkBytes && h.mode == Async && c.owner.handles == 1 {
			h.m.dropLocked(c)
			w.c = nil
		}
	case c.have != 0 && (q.r.Committed() > c.until || q.r.Promoted != nil && q.r.Promoted(index*ChunkBytes, ChunkBytes)):
		// Part of it is in the base by now.
		if h.own != h.all {
			h.nothingLocked(c)
		}
		if c.owner.handles == 1 {
			h.m.dropLocked(c)
		}
		w.c = nil
		q.missed = true
	default:
		c.refs++
		w.held = true
	}
}

// load loads what the pool has not come to yet: nobody waits for what others want.
func (q *request) load() {
	for i := range q.wants {
		if w := &q.wants[i]; w.coming() {
			q.h.fill(nil, w.c)
		}
	}
	q.h.m.mu.Lock()
	defer q.h.m.mu.Unlock()
	for i := range q.wants {
		if !q.wants[i].coming() {
			continue
		}
		q.lookLocked(i)
		if w := &q.wants[i]; w.coming() && w.c.taken == nil {
			w.c = nil // dropped, and wanted again by somebody else meanwhile
			q.missed = true
		}
	}
}

// wait waits until the i-th chunk is loaded, or will not be, or is late.
func (q *request) wait(i int) {
	m, c := q.h.m, q.wants[i].c
	inTime := m.wait(c)
	m.mu.Lock()
	defer m.mu.Unlock()
	c.late = !inTime
	q.lookLocked(i)
	if w := &q.wants[i]; w.coming() {
		w.c = nil
		q.missed = true
	}
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

// wait waits until the chunk is loaded, or will not be; false: it is late.
func (m *Manager) wait(c *chunk) (inTime bool) {
	select {
	case <-c.ready:
		return true
	default:
	}
	m.mu.Lock()
	limit := c.taken.waitLocked()
	c.by.raiseLocked()
	m.mu.Unlock()
	start := m.clock.now()
	defer func() { m.stats.blocked.observe(m.clock.now().Sub(start)) }()
	select {
	case <-c.ready:
		return true
	case <-m.clock.after(limit):
		m.stats.late.Add(1)
		return false
	}
}

// waitLocked is for how long to wait for a chunk that is being loaded. mu must be
// held.
func (h *Handle) waitLocked() time.Duration {
	if h.took == 0 {
		return waitMost
	}
	return min(max(loadsWaited*h.took, waitLeast), waitMost)
}

// tookLocked notes how long a chunk took to load. mu must be held.
func (h *Handle) tookLocked(d time.Duration) {
	if h.took == 0 {
		h.took = d
	}
	h.took += (d - h.took) / 8
}

// release ends the reading of what is held.
func (q *request) release() {
	m := q.h.m
	m.mu.Lock()
	defer m.mu.Unlock()
	for i := range q.wants {
		if q.wants[i].held {
			from, to := q.bounds(i, i+1)
			m.releaseLocked(q.wants[i].c, int((q.off+int64(from))%ChunkBytes), to-from)
		}
	}
}

// releaseLocked ends the reading of n bytes from skip on. mu must be held.
func (m *Manager) releaseLocked(c *chunk, skip, n int) {
	c.refs--
	again := c.used == c.have
	first, last := skip/blockio.BlockSize, (skip+n-1)/blockio.BlockSize
	c.used |= (1<<(last-first+1) - 1) << first & c.have
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
