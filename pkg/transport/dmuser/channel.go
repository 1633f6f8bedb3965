package dmuser

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync"

	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"

	"github.com/snapmerge/snapmerge/pkg/transport"
)

var (
	// errDestroyed says that the table is no more.
	errDestroyed = errors.New("the target was destroyed")
	// errAborted says that abort was called.
	errAborted = errors.New("the device is being aborted")
	// errUnsayable says that the request can only be ended by closing the channel.
	errUnsayable = errors.New("the request cannot be answered on its channel")
	// errEarlier says that a part of a write failed in an earlier process.
	errEarlier = errors.New("an earlier part of the request has failed")
)

// control is an open control node, one channel of the driver.
type control interface {
	Read(p []byte) (int, error)
	Write(p []byte) (int, error)
	Close() error
	// Fd is the descriptor, for the keeper.
	Fd() int
}

// node is a control node of the kernel.
type node int

func (n node) Read(p []byte) (int, error)  { return unix.Read(int(n), p) }
func (n node) Write(p []byte) (int, error) { return unix.Write(int(n), p) }
func (n node) Close() error                { return unix.Close(int(n)) }
func (n node) Fd() int                     { return int(n) }

// maxStaged is the largest read, in bytes, whose data are all in memory before its
// answer begins. Larger ones are read twice: to know the outcome, and to answer.
const maxStaged = 16 << 20

// channel serves one channel. Its thread alone reads and writes the control node.
type channel struct {
	backend  transport.Backend
	readOnly bool
	slot     *slot
	staged   int64 // maxStaged

	mu        sync.Mutex
	ctl       control
	inBackend bool
	aborted   bool
	closed    bool
}

// run serves, first what an earlier process had taken, until the target is
// destroyed (nil), the channel is aborted (errAborted), or it cannot go on. renew
// is called when the channel needs a new control node.
func (c *channel) run(renew func(*channel) error) error {
	runtime.LockOSThread() // the thread ends with the channel
	if c.slot.taken() {
		if !c.slot.torn() {
			// What the earlier process may have answered is answered again.
			switch err := c.carryOut(); {
			case errors.Is(err, errAborted):
				return err
			case errors.Is(err, errDestroyed):
				return nil
			}
		}
		if err := renew(c); err != nil {
			return err
		}
	}
	for {
		err := c.take()
		if err == nil {
			err = c.carryOut()
		}
		switch {
		case err == nil:
		case errors.Is(err, errDestroyed):
			return nil
		case errors.Is(err, errUnsayable):
			klog.ErrorS(err, "A request fails with its channel")
			if err := renew(c); err != nil {
				return err
			}
		default:
			return err
		}
	}
}

// take waits for a request.
func (c *channel) take() error {
	c.slot.reset()
	return c.read(c.slot.mem[:headerSize])
}

// read fills p with the rest of the current message.
func (c *channel) read(p []byte) error {
	for done := 0; done < len(p); {
		n, err := c.ctl.Read(p[done:])
		switch {
		case err == unix.EINTR:
			continue
		case err == unix.ENOTBLK:
			return errDestroyed
		case err != nil:
			return fmt.Errorf("read from the control device: %w", err)
		case n <= 0:
			return fmt.Errorf("read from the control device gave %d bytes", n)
		}
		if done += n; done < len(p) {
			c.slot.set(offTorn, 1)
		}
	}
	c.slot.set(offTorn, 0)
	return c.checkAborted()
}

func (c *channel) checkAborted() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.aborted {
		return errAborted
	}
	return nil
}

// carryOut carries the request in the slot out and answers it.
func (c *channel) carryOut() error {
	h := c.slot.header()
	if err := h.check(); err != nil && h.payload() == 0 {
		return c.refuse(h, respError, err)
	} else if err != nil {
		return err // there is no telling where its payload ends
	}
	switch reqType(h.typ) {
	case reqRead:
		return c.serveRead(h)
	case reqWrite:
		return c.serveWrite(h)
	case reqFlush:
		return c.finish(h, c.call(c.backend.Flush))
	default:
		return c.refuse(h, respUnsupported, fmt.Errorf("request of type %d", h.typ))
	}
}

// call calls the backend. If the channel is aborted meanwhile, its control node is
// closed already.
func (c *channel) call(f func() error) error {
	c.mu.Lock()
	if c.aborted {
		c.mu.Unlock()
		return errAborted
	}
	c.inBackend = true
	c.mu.Unlock()
	err := f()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.inBackend = false
	if c.aborted {
		return errAborted
	}
	return err
}

// transfer has the backend carry out a part of the request.
func (c *channel) transfer(r transport.Request, p []byte) error {
	return c.call(func() error { return transport.Serve(c.backend, c.readOnly, r, p) })
}

// serveWrite takes the payload by pieces and writes each.
func (c *channel) serveWrite(h header) error {
	var failed error
	switch {
	case c.slot.get(offFailed) != 0:
		failed = errEarlier
	case h.flags&flagPreflush != 0:
		failed = c.call(c.backend.Flush)
	}
	size := h.payload()
	for off := int64(c.slot.get(offDone)); off < size; {
		n := min(chunk, size-off)
		if c.slot.arm(off, n) {
			if err := c.read(c.slot.buffer(n)); err != nil {
				return err
			}
		}
		if failed == nil { // the payload must be read even if it is of no use
			failed = c.transfer(h.at(transport.OpWrite, off, n), c.slot.buffer(n))
		}
		if errors.Is(failed, errAborted) {
			return failed
		}
		if failed != nil {
			c.slot.set(offFailed, 1)
		}
		off += n
		c.slot.set(offDone, uint64(off))
	}
	if failed == nil && h.flags&flagFUA != 0 {
		failed = c.call(c.backend.Flush)
	}
	return c.finish(h, failed)
}

// finish answers a request without data.
func (c *channel) finish(h header, err error) error {
	if errors.Is(err, errAborted) {
		return err
	}
	if err != nil {
		return c.refuse(h, respError, err)
	}
	return c.write(c.header(h, respSuccess))
}

// refuse answers with an error, of which the guest sees EIO.
func (c *channel) refuse(h header, r respType, err error) error {
	klog.ErrorS(err, "A request of dm-user has failed", "type", h.typ, "sector", h.sector, "bytes", h.n)
	return c.write(c.header(h, r))
}

// header makes an answer without data.
func (c *channel) header(h header, r respType) []byte {
	b := c.slot.answer(0)
	h.typ = uint64(r)
	h.encode(b)
	return b
}

// serveRead reads everything before it answers.
func (c *channel) serveRead(h header) error {
	n := int64(h.n)
	switch {
	case n <= chunk:
		err := c.transfer(h.at(transport.OpRead, 0, n), c.slot.buffer(n))
		if err != nil {
			return c.finish(h, err)
		}
		c.header(h, respSuccess)
		return c.write(c.slot.answer(n))
	case n <= c.staged:
		return c.stagedRead(h)
	default:
		return c.streamedRead(h)
	}
}

// stagedRead serves a read from memory of its own. The answer is one write, which
// happens or does not happen if this process is killed.
func (c *channel) stagedRead(h header) error {
	n := int(h.n)
	mem, err := unix.Mmap(-1, 0, slotPage+n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_POPULATE)
	if err != nil {
		return c.finish(h, os.NewSyscallError("mmap", err))
	}
	defer unix.Munmap(mem)
	for off := 0; off < n; off += chunk {
		m := min(chunk, n-off)
		if err := c.transfer(h.at(transport.OpRead, int64(off), int64(m)), mem[slotPage+off:slotPage+off+m]); err != nil {
			return c.finish(h, err)
		}
	}
	copy(mem[offAnswer:slotPage], c.header(h, respSuccess))
	return c.write(mem[offAnswer:])
}

// streamedRead serves a read of any size in bounded memory.
func (c *channel) streamedRead(h header) error {
	pieces := func(f func(p []byte) error) error {
		for off := int64(0); off < int64(h.n); off += chunk {
			p := c.slot.buffer(min(chunk, int64(h.n)-off))
			if err := c.transfer(h.at(transport.OpRead, off, int64(len(p))), p); err != nil {
				return err
			}
			if err := f(p); err != nil {
				return err
			}
		}
		return nil
	}
	if err := pieces(func([]byte) error { return nil }); err != nil {
		return c.finish(h, err)
	}
	c.slot.set(offTorn, 1)
	begun := false
	err := pieces(func(p []byte) error {
		answer := p
		if !begun {
			c.header(h, respSuccess)
			answer, begun = c.slot.answer(int64(len(p))), true
		}
		return c.write(answer)
	})
	switch {
	case err == nil:
		c.slot.set(offTorn, 0)
		return nil
	case errors.Is(err, errAborted):
		return err
	default:
		return fmt.Errorf("%w: %w", errUnsayable, err)
	}
}

// write writes an answer or a piece of one.
func (c *channel) write(p []byte) error {
	if err := c.checkAborted(); err != nil {
		return err
	}
	for len(p) > 0 {
		n, err := c.ctl.Write(p)
		switch {
		case err == unix.EINTR:
			continue
		case err != nil:
			return fmt.Errorf("%w: %w", errUnsayable, os.NewSyscallError("write", err))
		case n <= 0:
			return fmt.Errorf("%w: the control device took %d bytes", errUnsayable, n)
		}
		p = p[n:]
	}
	return nil
}

// abort has the request that the backend is at fail, and all that the channel will
// take. Nobody else holds the control node any more.
func (c *channel) abort() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.aborted = true
	if c.inBackend {
		c.closeLocked()
	}
}

// close closes the control node.
func (c *channel) close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closeLocked()
}

// ended tells whether the control node is closed for good.
func (c *channel) ended() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.closed
}

// closeLocked: mu must be held.
func (c *channel) closeLocked() {
	if !c.closed {
		c.closed = true
		_ = c.ctl.Close()
	}
}

// replace gives the channel another control node, and returns the old one.
func (c *channel) replace(ctl control) (old control, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.aborted {
		return nil, errAborted
	}
	old, c.ctl = c.ctl, ctl
	return old, nil
}
