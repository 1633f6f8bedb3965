package dmuser

import (
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The channels of a device work in one memfd, each in a slot of its own, so that
// the next process finds in it what this one was at:
//
//	  0   40  the request's header, as the kernel wrote it; seq is noSeq before
//	 40    8  armed: from which byte of a write's payload the buffer is to be filled
//	 48    8  done: bytes of it carried out
//	 56   16  mark: random, of this slot
//	 72    8  torn: not 0 if nobody can go on with the request
//	 80    8  failed: not 0 if a part of a write has failed
//	4056  40  the answer's header, before the data of a read
//	4096      buffer, of chunk bytes
//
// The kernel writes a header or a piece of a payload in one go, also for a process
// that is being killed, if the memory is there. So a header is there or not; and a
// piece of a payload is there once the mark, put where its last bytes will be,
// is gone.
const (
	offArmed  = 40
	offDone   = 48
	offMark   = 56
	offTorn   = 72
	offFailed = 80
	offAnswer = slotPage - headerSize
	slotPage  = 4096
	markSize  = 16

	// chunk is how much of a request is in memory at a time, unless it is a read.
	chunk    = 512 << 10
	slotSize = slotPage + chunk
)

// slot is that of one channel. One thread uses it at a time.
type slot struct {
	mem     []byte
	present int // bytes from its beginning that are in memory for sure
}

// word is a field that is written in the order of the program.
func (s *slot) word(off int) *uint64 { return (*uint64)(unsafe.Pointer(&s.mem[off])) }

func (s *slot) get(off int) uint64    { return atomic.LoadUint64(s.word(off)) }
func (s *slot) set(off int, v uint64) { atomic.StoreUint64(s.word(off), v) }

// reset makes ready for a request to be taken.
func (s *slot) reset() {
	s.set(0, noSeq)
	for off := 8; off < headerSize; off += 8 {
		s.set(off, ^uint64(0))
	}
	s.set(offArmed, noSeq)
	s.set(offDone, 0)
	s.set(offTorn, 0)
	s.set(offFailed, 0)
}

// taken tells whether the slot has a request that may not be answered yet.
func (s *slot) taken() bool { return s.get(0) != noSeq }

// torn tells whether nobody can go on with the request: its answer was begun and
// not finished, or part of it was read into memory that is gone.
func (s *slot) torn() bool { return s.get(offTorn) != 0 || s.get(headerSize-8) == ^uint64(0) }

func (s *slot) header() header { return decodeHeader(s.mem) }

// buffer is the first n bytes of the buffer, in memory.
func (s *slot) buffer(n int64) []byte {
	s.populate(slotPage + int(n))
	return s.mem[slotPage : slotPage+n : slotPage+n]
}

// answer is the memory of an answer whose data are the first n bytes of the
// buffer.
func (s *slot) answer(n int64) []byte { return s.mem[offAnswer : slotPage+n] }

// arm makes the buffer ready for the n bytes of the payload from off on, unless it
// is already or has them. It tells whether they are still to be read.
func (s *slot) arm(off, n int64) (read bool) {
	buf := s.buffer(n)
	tail := [markSize]byte(buf[n-markSize:])
	mark := [markSize]byte(s.mem[offMark:])
	if s.get(offArmed) == uint64(off) {
		return tail == mark
	}
	copy(buf[n-markSize:], mark[:])
	s.set(offArmed, uint64(off))
	return true
}

// populate has the first n bytes in memory: the kernel cannot get pages for a
// process that is being killed.
func (s *slot) populate(n int) {
	if n <= s.present {
		return
	}
	n = min(len(s.mem), (n+slotPage-1)&^(slotPage-1))
	if unix.Madvise(s.mem[:n], unix.MADV_POPULATE_WRITE) != nil { // before kernel 5.14
		for i := s.present; i < n; i += slotPage {
			atomic.AddUint64((*uint64)(unsafe.Pointer(&s.mem[i])), 0)
		}
	}
	// Without leave to lock, it stays in memory where there is no swap.
	_ = unix.Mlock(s.mem[:n])
	s.present = n
}

// arena is the memory of a device's channels.
type arena struct {
	fd   int // the memfd
	lock int // another open file of it, whose flock says that this process serves, or -1
	mem  []byte
}

// newArena makes the memory for n channels.
func newArena(n int) (*arena, error) {
	fd, err := unix.MemfdCreate("snapmerge-dm-user", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("memfd_create", err)
	}
	if err := unix.Ftruncate(fd, int64(n)*slotSize); err != nil {
		unix.Close(fd)
		return nil, os.NewSyscallError("ftruncate", err)
	}
	a, err := openArena(fd, n)
	if err != nil {
		return nil, err
	}
	for i := range n {
		s := a.slot(i)
		_, _ = rand.Read(s.mem[offMark : offMark+markSize]) // never fails
		s.reset()
	}
	return a, nil
}

var errServed = errors.New("another process serves the device")

// openArena maps the memory of n channels and takes its lock, or returns errServed
// and leaves fd open; it owns fd otherwise.
func openArena(fd, n int) (*arena, error) {
	a := &arena{fd: fd, lock: -1}
	var err error
	// Not a duplicate: the lock belongs to the open file, and this one is ours alone.
	a.lock, err = unix.Open(fmt.Sprintf("/proc/self/fd/%d", fd), unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err == nil {
		if err := unix.Flock(a.lock, unix.LOCK_EX|unix.LOCK_NB); err == unix.EWOULDBLOCK {
			unix.Close(a.lock)
			return nil, errServed
		}
		var st unix.Stat_t
		if err = unix.Fstat(fd, &st); err == nil && st.Size != int64(n)*slotSize {
			err = fmt.Errorf("the memory of %d channels has %d bytes", n, st.Size)
		}
	}
	if err == nil {
		a.mem, err = unix.Mmap(fd, 0, n*slotSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	}
	if err != nil {
		a.close()
		return nil, fmt.Errorf("memory of the channels: %w", err)
	}
	return a, nil
}

func (a *arena) slot(i int) *slot {
	s := &slot{mem: a.mem[i*slotSize : (i+1)*slotSize : (i+1)*slotSize]}
	s.populate(slotPage)
	return s
}

// close lets go of the memory; nobody uses it any more.
func (a *arena) close() {
	if a.mem != nil {
		_ = unix.Munmap(a.mem)
	}
	if a.lock >= 0 {
		unix.Close(a.lock)
	}
	unix.Close(a.fd)
}
