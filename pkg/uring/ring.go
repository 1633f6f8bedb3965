//go:build !giouring

package uring

import (
	"fmt"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Offsets for mmap(2) of the ring's descriptor (IORING_OFF_*).
const (
	offRings = 0
	offSQEs  = 0x10000000
)

// Flags of io_uring_enter(2), and of the submission ring (IORING_SQ_*): the
// kernel has completions that it can post only when it is entered.
const (
	enterGetEvents = 1 << 0
	sqCQOverflow   = 1 << 1
	sqTaskrun      = 1 << 2
)

// Features that every ring must have (IORING_FEAT_*): one mapping for both rings
// (kernel 5.4), no completion ever dropped and entries consumed by submission
// (both 5.5).
const (
	featSingleMmap   = 1 << 0
	featNoDrop       = 1 << 1
	featSubmitStable = 1 << 2
	featRequired     = featSingleMmap | featNoDrop | featSubmitStable
)

// params is struct io_uring_params.
type params struct {
	sqEntries, cqEntries, flags, sqThreadCPU, sqThreadIdle, features, wqFd uint32
	_                                                                      [3]uint32
	sqOff                                                                  struct {
		head, tail, ringMask, ringEntries, flags, dropped, array, _ uint32
		userAddr                                                    uint64
	}
	cqOff struct {
		head, tail, ringMask, ringEntries, overflow, cqes, flags, _ uint32
		userAddr                                                    uint64
	}
}

var _ [120]byte = [unsafe.Sizeof(params{})]byte{}

// Ring is an io_uring.
type Ring struct {
	fd    int    // -1 once closed
	rings []byte // both rings, shared with the kernel
	sqes  []byte // the entries, shared with the kernel

	// Heads and tails are free-running counters; masked they are indexes. The
	// kernel moves sqHead and cqTail, we move sqTail and cqHead.
	sqHead, sqTail, sqFlags *uint32
	cqHead, cqTail          *uint32
	cqes                    unsafe.Pointer
	sqEntries, cqEntries    uint32 // powers of two
	sqeBytes, cqeBytes      uintptr

	prepared uint32 // the tail with the entries that the kernel was not told of
}

// New makes a ring for entries submissions at a time (rounded up to a power of
// two; completions: twice as many) with Setup flags. The error wraps the errno.
func New(entries, flags uint32) (*Ring, error) {
	p := params{flags: flags}
	fd, _, errno := unix.Syscall(unix.SYS_IO_URING_SETUP, uintptr(entries), uintptr(unsafe.Pointer(&p)), 0)
	if errno != 0 {
		return nil, setupError(errno)
	}
	r := &Ring{fd: int(fd), sqeBytes: sqeSize, cqeBytes: cqeSize}
	if flags&SetupSQE128 != 0 {
		r.sqeBytes *= 2
	}
	if flags&SetupCQE32 != 0 {
		r.cqeBytes *= 2
	}
	err := checkFeatures(p.features)
	if err == nil {
		err = r.mmap(&p)
	}
	if err != nil {
		_ = r.Close()
		return nil, err
	}
	return r, nil
}

func (r *Ring) mmap(p *params) (err error) {
	size := max(uintptr(p.sqOff.array)+uintptr(p.sqEntries)*4, uintptr(p.cqOff.cqes)+uintptr(p.cqEntries)*r.cqeBytes)
	const prot, flags = unix.PROT_READ | unix.PROT_WRITE, unix.MAP_SHARED | unix.MAP_POPULATE
	if r.rings, err = unix.Mmap(r.fd, offRings, int(size), prot, flags); err != nil {
		return setupError(err)
	}
	if r.sqes, err = unix.Mmap(r.fd, offSQEs, int(uintptr(p.sqEntries)*r.sqeBytes), prot, flags); err != nil {
		return setupError(err)
	}
	word := func(off uint32) *uint32 { return (*uint32)(unsafe.Pointer(&r.rings[off])) }
	r.sqHead, r.sqTail, r.sqFlags = word(p.sqOff.head), word(p.sqOff.tail), word(p.sqOff.flags)
	r.cqHead, r.cqTail = word(p.cqOff.head), word(p.cqOff.tail)
	r.cqes = unsafe.Pointer(&r.rings[p.cqOff.cqes])
	r.sqEntries, r.cqEntries = p.sqEntries, p.cqEntries
	// Slot i of the ring names entry i, for ever.
	for i := range p.sqEntries {
		*word(p.sqOff.array + 4*i) = i
	}
	r.prepared = atomic.LoadUint32(r.sqTail)
	return nil
}

// Fd is the ring's descriptor; -1 once closed.
func (r *Ring) Fd() int { return r.fd }

// SQE gives the next free entry, all zero; nil if none is free until the next
// Submit. The entry goes out with the next Submit.
func (r *Ring) SQE() *SQE {
	if r.closed() || r.prepared-atomic.LoadUint32(r.sqHead) == r.sqEntries {
		return nil
	}
	start := uintptr(r.prepared&(r.sqEntries-1)) * r.sqeBytes
	entry := r.sqes[start : start+r.sqeBytes]
	clear(entry)
	r.prepared++
	return (*SQE)(unsafe.Pointer(&entry[0]))
}

// Command is the area for the argument of UringCmd in an entry of this ring: 16
// bytes, or 80 with SetupSQE128.
func (r *Ring) Command(e *SQE) []byte {
	return unsafe.Slice(&e.Cmd[0], len(e.Cmd)+int(r.sqeBytes)-sqeSize)
}

// Pending is the number of entries that the kernel has not taken yet.
func (r *Ring) Pending() int {
	if r.closed() {
		return 0
	}
	return int(r.prepared - atomic.LoadUint32(r.sqHead))
}

// Submit hands all prepared entries to the kernel and waits until at least wait
// completions are there to be reaped, or a signal comes, which is no error if
// the kernel took entries before. It returns how many it took; the others stay
// prepared for the next Submit. Errors are errnos: after EINTR call again; after
// EAGAIN and EBUSY (out of memory, too many completions waiting) reap and call
// again.
func (r *Ring) Submit(wait uint32) (taken int, err error) { return r.submit(wait, nil) }

// SubmitUninterrupted is Submit, but no signal ends the wait (io_uring_enter(2),
// argument sig: all are blocked meanwhile).
func (r *Ring) SubmitUninterrupted(wait uint32) (taken int, err error) {
	all := ^uint64(0)
	return r.submit(wait, &all)
}

func (r *Ring) submit(wait uint32, blocked *uint64) (taken int, err error) {
	if r.closed() {
		return 0, errClosed
	}
	atomic.StoreUint32(r.sqTail, r.prepared)
	flags := uintptr(0)
	if wait > 0 || r.mustEnter() {
		flags = enterGetEvents
	}
	n, _, errno := unix.Syscall6(unix.SYS_IO_URING_ENTER, uintptr(r.fd), uintptr(r.Pending()), uintptr(wait), flags,
		uintptr(unsafe.Pointer(blocked)), unsafe.Sizeof(*blocked))
	if errno != 0 {
		return 0, errno
	}
	return int(n), nil
}

// mustEnter tells whether the kernel holds completions back until it is entered.
func (r *Ring) mustEnter() bool {
	return atomic.LoadUint32(r.sqFlags)&(sqCQOverflow|sqTaskrun) != 0
}

// CQE takes the next completion, if there is one.
func (r *Ring) CQE() (c CQE, ok bool) {
	if r.closed() {
		return c, false
	}
	head := atomic.LoadUint32(r.cqHead)
	if head == atomic.LoadUint32(r.cqTail) {
		if !r.mustEnter() {
			return c, false
		}
		_, _, _ = unix.Syscall6(unix.SYS_IO_URING_ENTER, uintptr(r.fd), 0, 0, enterGetEvents, 0, 0)
		if head == atomic.LoadUint32(r.cqTail) {
			return c, false
		}
	}
	at := unsafe.Add(r.cqes, uintptr(head&(r.cqEntries-1))*r.cqeBytes)
	copy(unsafe.Slice((*byte)(unsafe.Pointer(&c)), r.cqeBytes), unsafe.Slice((*byte)(at), r.cqeBytes))
	atomic.StoreUint32(r.cqHead, head+1)
	return c, true
}

// Close ends the ring. The kernel cancels what is in flight some time later, so
// nothing should be: reap everything before.
func (r *Ring) Close() error {
	if r.closed() {
		return nil
	}
	for _, m := range [][]byte{r.sqes, r.rings} {
		if m != nil {
			_ = unix.Munmap(m)
		}
	}
	fd := r.fd
	*r = Ring{fd: -1}
	return unix.Close(fd)
}

func (r *Ring) closed() bool { return r.fd < 0 }

// checkFeatures refuses kernels before 5.5.
func checkFeatures(features uint32) error {
	if features&featRequired != featRequired {
		return fmt.Errorf("io_uring: the kernel is too old: features %#x, need %#x", features, featRequired)
	}
	return nil
}
