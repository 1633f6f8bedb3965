package ublk

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"

	"github.com/snapmerge/snapmerge/pkg/transport"
	"github.com/snapmerge/snapmerge/pkg/uring"
)

// wakeTag is the user data of the read of the queue's eventfd.
const wakeTag = 1 << 32

// lentBit marks the user data of a transfer of a tag's request.
const lentBit = 1 << 33

// tagState is where a tag of a queue is.
type tagState uint8

const (
	tagFetching tagState = iota // with the kernel
	tagServing                  // with a goroutine, or with the ring as a transfer
	tagGone                     // the kernel has cancelled it
)

// queue serves one queue of a device. Only its own thread touches the ring.
type queue struct {
	id, depth int
	char      int // descriptor of /dev/ublkcN
	backend   transport.Backend
	lender    transport.Lender // the backend, if it is one
	readOnly  bool

	desc  []byte // the kernel's descriptors of requests, by tag
	arena []byte // maxIO bytes for each tag, and as much for requests that nobody serves
	ring  *uring.Ring
	wake  int    // eventfd
	word  []byte // what is read from it

	tags []tagState
	live int // tags that are not gone
	// Transfers in the ring, by tag, and how many there are.
	transfers []transfer
	lent      int

	workers sync.WaitGroup // goroutines, and transfers

	mu       sync.Mutex
	finished []finished
	sleeping bool // the thread waits in the kernel, so it must be woken
	aborted  bool // answer everything with EIO
}

// transfer is a request that the ring carries out.
type transfer struct {
	ioDesc
	back func(done bool) // see transport.Lender
}

// finished is a request that a goroutine has carried out.
type finished struct {
	tag    int
	result int32
}

// newQueue maps the memory of queue id of the open device.
func newQueue(id, depth, char int, b transport.Backend, readOnly bool) (_ *queue, err error) {
	q := &queue{id: id, depth: depth, char: char, backend: b, readOnly: readOnly, wake: -1,
		tags: make([]tagState, depth), live: depth, transfers: make([]transfer, depth)}
	q.lender, _ = b.(transport.Lender)
	defer func() {
		if err != nil {
			q.free()
		}
	}()
	off := int64(id * descBytes(maxDepth))
	if q.desc, err = unix.Mmap(char, off, descBytes(depth), unix.PROT_READ, unix.MAP_SHARED|unix.MAP_POPULATE); err != nil {
		return nil, os.NewSyscallError("mmap of the queue's descriptors", err)
	}
	const prot, flags = unix.PROT_READ | unix.PROT_WRITE, unix.MAP_PRIVATE | unix.MAP_ANONYMOUS | unix.MAP_NORESERVE
	if q.arena, err = unix.Mmap(-1, 0, (depth+1)*maxIO, prot, flags); err != nil {
		return nil, os.NewSyscallError("mmap of the queue's buffers", err)
	}
	if q.word, err = unix.Mmap(-1, 0, os.Getpagesize(), prot, flags); err != nil {
		return nil, os.NewSyscallError("mmap", err)
	}
	q.wake, err = unix.Eventfd(0, unix.EFD_CLOEXEC)
	return q, os.NewSyscallError("eventfd", err)
}

// free gives back what newQueue took. The thread and all goroutines have ended.
func (q *queue) free() {
	for _, m := range [][]byte{q.desc, q.arena, q.word} {
		if m != nil {
			_ = unix.Munmap(m)
		}
	}
	q.desc, q.arena, q.word = nil, nil, nil
	if q.wake >= 0 {
		unix.Close(q.wake)
		q.wake = -1
	}
}

// buffer is the memory of a tag's request; tag depth is that of requests which
// are answered with an error at once.
func (q *queue) buffer(tag int) []byte { return q.arena[tag*maxIO : (tag+1)*maxIO : (tag+1)*maxIO] }

// run serves until the kernel has cancelled all tags, and calls served then: it does
// not touch the device any more, but may have to wait for transfers. It calls ready when
// it has fetched, or cannot. The thread is the queue's for good and ends with it.
func (q *queue) run(ready func(error), served func()) error {
	runtime.LockOSThread()
	err := q.open()
	ready(err)
	if err != nil {
		served()
		return err
	}
	defer q.ring.Close()
	err = q.loop(func() bool { return q.live > 0 })
	served()
	if err != nil {
		return err
	}
	return q.loop(func() bool { return q.lent > 0 })
}

// loop works on what the ring completes as long as there is more.
func (q *queue) loop(more func() bool) error {
	for more() {
		wait := q.takeFinished()
		if _, err := q.ring.Submit(wait); err != nil && !uring.TryAgain(err) {
			return fmt.Errorf("queue %d: io_uring_enter: %w", q.id, err)
		}
		q.mu.Lock()
		q.sleeping = false
		q.mu.Unlock()
		for {
			c, ok := q.ring.CQE()
			if !ok {
				break
			}
			q.complete(c)
		}
	}
	return nil
}

func (q *queue) open() error {
	var err error
	// A tag has one command at a time, and there is the read of the eventfd.
	if q.ring, err = uring.New(uint32(q.depth+1), uring.SetupSingleIssuer|uring.SetupCoopTaskrun); err != nil {
		return err
	}
	for tag := range q.depth {
		q.command(ioFetch, tag, tag, 0)
	}
	q.armWake()
	for q.ring.Pending() > 0 {
		if _, err := q.ring.Submit(0); err != nil && !errors.Is(err, unix.EINTR) {
			q.ring.Close()
			return fmt.Errorf("queue %d: fetch: %w", q.id, err)
		}
	}
	return nil
}

// command fetches a tag's request into the buffer of a tag, after answering the
// one before with ioCommit.
func (q *queue) command(cmd uint32, tag, buffer int, result int32) {
	e := q.ring.SQE()
	e.UringCmd(q.char, cmd)
	e.UserData = uint64(tag)
	arg := q.ring.Command(e)
	native.PutUint16(arg[0:], uint16(q.id))
	native.PutUint16(arg[2:], uint16(tag))
	native.PutUint32(arg[4:], uint32(result))
	native.PutUint64(arg[8:], uint64(uintptr(unsafe.Pointer(&q.buffer(buffer)[0]))))
	q.tags[tag] = tagFetching
}

func (q *queue) armWake() {
	e := q.ring.SQE()
	e.Read(q.wake, q.word[:8], 0)
	e.UserData = wakeTag
}

// complete takes a completion of the kernel.
func (q *queue) complete(c uring.CQE) {
	if c.UserData == wakeTag {
		q.armWake()
		return
	}
	if c.UserData&lentBit != 0 {
		q.transferred(int(c.UserData&^lentBit), c.Res)
		return
	}
	tag := int(c.UserData)
	if c.Res != 0 {
		if c.Res != -int32(unix.ENODEV) {
			klog.ErrorS(unix.Errno(-c.Res), "A tag of a ublk queue has failed", "queue", q.id, "tag", tag)
		}
		q.tags[tag] = tagGone
		q.live--
		return
	}
	q.tags[tag] = tagServing
	d := decodeDesc(q.desc[tag*descSize:])
	q.mu.Lock()
	aborted := q.aborted
	q.mu.Unlock()
	if aborted {
		q.command(ioCommit, tag, q.depth, -int32(unix.EIO))
		return
	}
	if !q.lend(tag, d) {
		q.start(tag, d)
	}
}

// start has a goroutine carry a request out.
func (q *queue) start(tag int, d ioDesc) {
	q.workers.Go(func() { q.finish(finished{tag, serve(q.backend, q.readOnly, d, q.buffer(tag))}) })
}

// lend has the ring carry a request out, if the backend lends what it takes: no other
// thread has to be woken for it.
func (q *queue) lend(tag int, d ioDesc) bool {
	write := d.op == opWrite
	if q.lender == nil || !write && d.op != opRead || write && (d.fua || q.readOnly) || d.n <= 0 || d.n > maxIO {
		return false
	}
	fd, back, ok := q.lender.Lend(d.off, d.n, write)
	if !ok {
		return false
	}
	e := q.ring.SQE()
	if p := q.buffer(tag)[:d.n]; write {
		e.Write(fd, p, d.off)
	} else {
		e.Read(fd, p, d.off)
	}
	e.UserData = lentBit | uint64(tag)
	q.workers.Add(1)
	q.lent++
	q.transfers[tag] = transfer{d, back}
	return true
}

// transferred takes the result of a transfer: bytes, or minus errno.
func (q *queue) transferred(tag int, res int32) {
	t := q.transfers[tag]
	q.transfers[tag] = transfer{}
	done := int64(res) == t.n
	t.back(done)
	q.lent--
	q.workers.Done()
	switch {
	case q.tags[tag] != tagServing: // it was answered by abort
	case done:
		q.command(ioCommit, tag, tag, res)
	default:
		q.start(tag, t.ioDesc)
	}
}

// finish hands the result to the thread.
func (q *queue) finish(f finished) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.aborted {
		return // answered already
	}
	q.finished = append(q.finished, f)
	q.wakeLocked()
}

// wakeLocked: mu must be held.
func (q *queue) wakeLocked() {
	if !q.sleeping {
		return
	}
	q.sleeping = false
	var one [8]byte
	binary.NativeEndian.PutUint64(one[:], 1)
	_, _ = unix.Write(q.wake, one[:]) // fails only when 2^64-2 wakes are pending
}

// takeFinished answers what is finished, and says how many completions to wait
// for.
func (q *queue) takeFinished() (wait uint32) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for _, f := range q.finished {
		q.command(ioCommit, f.tag, f.tag, f.result)
	}
	q.finished = q.finished[:0]
	if q.aborted {
		for tag, s := range q.tags {
			if s == tagServing { // its goroutine keeps the buffer
				q.command(ioCommit, tag, q.depth, -int32(unix.EIO))
			}
		}
	}
	q.sleeping = true
	return 1
}

// abort has everything answered with EIO from now on, also what goroutines are
// at.
func (q *queue) abort() {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.aborted {
		return
	}
	q.aborted = true
	q.wakeLocked()
}
