//go:build giouring

package uring

import (
	"runtime"
	"unsafe"

	"github.com/pawelgaczynski/giouring"
	"golang.org/x/sys/unix"
)

// Of giouring v0.0.0-20230826085535-69588b89acb9 this file uses QueueInit,
// GetSQE, SQReady, SubmitAndWait, PeekCQE, CQESeen and QueueExit. Found wrong
// and not used: Setup (its error is never nil), PeekBatchCQE (walks past the
// last completion), the Prepare methods (they leave parts of an entry as the
// last user had them, and PrepareTimeout takes the address of its own argument),
// RegisterFiles (passes 64-bit descriptors where the kernel reads 32-bit ones),
// UnregisterRingFd (refuses exactly when it should work), and MlockSizeParams
// (leaks a ring). QueueExit leaves half of the entries of a ring with
// SetupSQE128 mapped, which is a leak of a few pages per such ring. Linking needs -ldflags=-checklinkname=0 since Go 1.23.

// Ring is an io_uring.
type Ring struct {
	ring     *giouring.Ring // nil once closed
	sqeBytes uintptr
	cqeBytes uintptr
}

// New makes a ring for entries submissions at a time (rounded up to a power of
// two; completions: twice as many) with Setup flags. The error wraps the errno.
func New(entries, flags uint32) (*Ring, error) {
	r := &Ring{ring: giouring.NewRing(), sqeBytes: sqeSize, cqeBytes: cqeSize}
	if flags&SetupSQE128 != 0 {
		r.sqeBytes *= 2
	}
	if flags&SetupCQE32 != 0 {
		r.cqeBytes *= 2
	}
	if err := r.ring.QueueInit(entries, flags); err != nil {
		return nil, setupError(err)
	}
	return r, nil
}

// Fd is the ring's descriptor; -1 once closed.
func (r *Ring) Fd() int {
	if r.closed() {
		return -1
	}
	return r.ring.RingFd()
}

// SQE gives the next free entry, all zero; nil if none is free until the next
// Submit. The entry goes out with the next Submit.
func (r *Ring) SQE() *SQE {
	if r.closed() {
		return nil
	}
	e := r.ring.GetSQE()
	if e == nil {
		return nil
	}
	clear(unsafe.Slice((*byte)(unsafe.Pointer(e)), r.sqeBytes))
	return (*SQE)(unsafe.Pointer(e))
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
	return int(r.ring.SQReady())
}

// Submit hands all prepared entries to the kernel and waits until at least wait
// completions are there to be reaped, or a signal comes, which is no error if
// the kernel took entries before. It returns how many it took; the others stay
// prepared for the next Submit. Errors are errnos: after EINTR call again; after
// EAGAIN and EBUSY (out of memory, too many completions waiting) reap and call
// again.
func (r *Ring) Submit(wait uint32) (taken int, err error) {
	if r.closed() {
		return 0, errClosed
	}
	n, err := r.ring.SubmitAndWait(wait)
	return int(n), err
}

// SubmitUninterrupted is Submit, but no signal ends the wait.
func (r *Ring) SubmitUninterrupted(wait uint32) (taken int, err error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var all, old unix.Sigset_t
	for i := range all.Val {
		all.Val[i] = ^all.Val[i]
	}
	if err := unix.PthreadSigmask(unix.SIG_SETMASK, &all, &old); err != nil {
		return 0, err
	}
	defer unix.PthreadSigmask(unix.SIG_SETMASK, &old, nil)
	return r.Submit(wait)
}

// CQE takes the next completion, if there is one.
func (r *Ring) CQE() (c CQE, ok bool) {
	if r.closed() {
		return c, false
	}
	e, err := r.ring.PeekCQE()
	if err != nil || e == nil {
		return c, false
	}
	copy(unsafe.Slice((*byte)(unsafe.Pointer(&c)), r.cqeBytes), unsafe.Slice((*byte)(unsafe.Pointer(e)), r.cqeBytes))
	r.ring.CQESeen(e)
	return c, true
}

// Close ends the ring. The kernel cancels what is in flight some time later, so
// nothing should be: reap everything before.
func (r *Ring) Close() error {
	if r.closed() {
		return nil
	}
	r.ring.QueueExit()
	r.ring = nil
	return nil
}

func (r *Ring) closed() bool { return r.ring == nil }
