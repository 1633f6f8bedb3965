// Package dmusermock is the kernel's side of dm-user in a process: a target whose
// channels behave as those of the driver, and which notes what a daemon must not
// do. It is used by itself, and behind a CUSE device (Serve), where a daemon in
// another process has real descriptors.
//
// A channel takes one request after another with Read, header and payload never in
// one read, and answers with Write, in any pieces and any order. An answer with a
// seq that the channel has not taken in full, or has answered already, is accepted
// and poisons the channel: every later write gives EINVAL. So does an empty write
// between two answers. Closing a channel fails what it has taken; closing the last
// one fails everything that waits. A destroyed target gives ENOTBLK to every read.
package dmusermock

import (
	"encoding/binary"
	"fmt"
	"sync"

	"golang.org/x/sys/unix"
)

// Types of requests and answers, and flags.
const (
	Read  = 0
	Write = 1
	Flush = 2

	FUA      = 0x200
	Preflush = 0x400

	headerSize = 40
	sector     = 512
)

// Target is a device's target.
type Target struct {
	mu        sync.Mutex
	changed   *sync.Cond
	seq       uint64
	queue     []*message
	channels  int
	everOpen  bool
	destroyed bool
	notes     []string
	warnings  int

	// MaxRead bounds what a Read gives, in bytes, if it is not 0. Set it before the
	// target is used.
	MaxRead int
}

// message is a request.
type message struct {
	header [headerSize]byte
	typ    uint64
	data   []byte // of a write, or room for that of a read
	toUser int    // bytes given to the daemon
	got    int    // bytes of the answer, once it has begun
	done   chan error
}

// New makes a target.
func New() *Target {
	t := &Target{}
	t.changed = sync.NewCond(&t.mu)
	return t
}

// Submit queues a request; data are those of a write, or where those of a read
// go, and give its length. The error comes over the channel: nil or EIO.
func (t *Target) Submit(typ, flags uint64, off int64, data []byte) <-chan error {
	t.mu.Lock()
	defer t.mu.Unlock()
	m := &message{typ: typ, data: data, done: make(chan error, 1)}
	if t.destroyed || t.everOpen && t.channels == 0 {
		m.done <- unix.EIO
		return m.done
	}
	for i, v := range []uint64{t.seq, typ, flags, uint64(off) / sector, uint64(len(data))} {
		binary.NativeEndian.PutUint64(m.header[8*i:], v)
	}
	t.seq++
	t.queue = append(t.queue, m)
	t.changed.Broadcast()
	return m.done
}

// Destroy is what a swap of the table does: what waits fails, and so does
// everything new.
func (t *Target) Destroy() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.destroyed = true
	t.failQueueLocked()
	t.changed.Broadcast()
}

// failQueueLocked: mu must be held.
func (t *Target) failQueueLocked() {
	for _, m := range t.queue {
		m.done <- unix.EIO
	}
	t.queue = nil
}

// Waiting is how many requests nobody has taken.
func (t *Target) Waiting() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.queue)
}

// Channels is how many are open.
func (t *Target) Channels() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.channels
}

// Notes are the breaches of the protocol so far.
func (t *Target) Notes() []string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return append([]string(nil), t.notes...)
}

// Warnings is how often the kernel would have printed one: for error answers to
// reads.
func (t *Target) Warnings() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.warnings
}

// Channel is an open control node.
type Channel struct {
	t        *Target
	current  *message   // partly given to the daemon
	taken    []*message // given in full and not answered
	answer   *message   // its answer has begun
	scratch  []byte     // of a header that is not complete
	poisoned bool
	reading  bool
	closed   bool
	cancel   int // reads to be interrupted
}

// Open opens the control node.
func (t *Target) Open() (*Channel, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.destroyed {
		return nil, unix.ENODEV
	}
	t.channels++
	t.everOpen = true
	return &Channel{t: t}, nil
}

// Interrupt ends a blocked Read, or the next one, with EINTR, as a signal does.
func (c *Channel) Interrupt() {
	c.t.mu.Lock()
	defer c.t.mu.Unlock()
	c.cancel++
	c.t.changed.Broadcast()
}

// Read is read(2).
func (c *Channel) Read(p []byte) (int, error) {
	t := c.t
	t.mu.Lock()
	defer t.mu.Unlock()
	if c.reading {
		t.notes = append(t.notes, "two readers on one channel")
	}
	c.reading = true
	defer func() { c.reading = false }()
	for c.current == nil {
		switch {
		case t.destroyed:
			return 0, unix.ENOTBLK
		case c.cancel > 0:
			c.cancel--
			return 0, unix.EINTR
		}
		if len(t.queue) > 0 {
			c.current = t.queue[0]
			t.queue = t.queue[1:]
			break
		}
		t.changed.Wait()
	}
	if t.MaxRead > 0 && len(p) > t.MaxRead {
		p = p[:t.MaxRead]
	}
	m := c.current
	total, n := headerSize, 0
	if m.typ == Write {
		total += len(m.data)
	}
	if m.toUser < headerSize {
		n = copy(p, m.header[m.toUser:])
	} else {
		n = copy(p, m.data[m.toUser-headerSize:])
	}
	if m.toUser += n; m.toUser == total {
		c.current = nil
		c.taken = append(c.taken, m)
	}
	return n, nil
}

// Write is write(2).
func (c *Channel) Write(p []byte) (int, error) {
	t := c.t
	t.mu.Lock()
	defer t.mu.Unlock()
	if c.poisoned {
		return 0, unix.EINVAL
	}
	n := 0
	if c.answer == nil {
		if len(p) == 0 {
			c.poisonLocked("an empty write between answers")
			return 0, nil
		}
		n = min(len(p), headerSize-len(c.scratch))
		c.scratch = append(c.scratch, p[:n]...)
		p = p[n:]
		if len(c.scratch) < headerSize {
			return n, nil
		}
		if !c.beginLocked() {
			return n, nil
		}
		if c.answer == nil { // an error: over with its header
			return n, nil
		}
	}
	m := c.answer
	if m.typ == Read {
		k := copy(m.data[m.got:], p)
		m.got += k
		n += k
		if m.got < len(m.data) {
			return n, nil
		}
	}
	c.answer = nil
	m.done <- nil
	return n, nil
}

// beginLocked finds the request of the answer whose header is complete. mu must
// be held.
func (c *Channel) beginLocked() (ok bool) {
	seq, typ := binary.NativeEndian.Uint64(c.scratch), binary.NativeEndian.Uint64(c.scratch[8:])
	c.scratch = nil
	for i, m := range c.taken {
		if binary.NativeEndian.Uint64(m.header[:]) != seq {
			continue
		}
		c.taken = append(c.taken[:i:i], c.taken[i+1:]...)
		if typ == 0 {
			c.answer = m
			return true
		}
		if m.typ == Read {
			c.t.warnings++
		}
		m.done <- unix.EIO
		return true
	}
	c.poisonLocked(fmt.Sprintf("an answer of type %d with seq %d, which the channel has not to answer", typ, seq))
	return false
}

// poisonLocked: mu must be held.
func (c *Channel) poisonLocked(why string) {
	c.poisoned = true
	c.t.notes = append(c.t.notes, why)
}

// Close is the last close(2).
func (c *Channel) Close() error {
	t := c.t
	t.mu.Lock()
	defer t.mu.Unlock()
	if c.closed {
		return unix.EBADF
	}
	c.closed = true
	if c.reading {
		t.notes = append(t.notes, "closed under a reader")
	}
	for _, m := range append([]*message{c.current, c.answer}, c.taken...) {
		if m != nil {
			m.done <- unix.EIO
		}
	}
	c.current, c.answer, c.taken = nil, nil, nil
	if t.channels--; t.channels == 0 {
		t.failQueueLocked()
	}
	return nil
}

// Fd is there for those who want descriptors: it has none.
func (c *Channel) Fd() int { return -1 }
