package blockio

import (
	"errors"
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Arena is anonymous memory outside the Go heap. It begins on a page boundary,
// never moves and is unknown to the garbage collector, so the kernel may work
// on it between two system calls (io_uring) and direct I/O accepts it. Slices
// of it must not be used after Close.
type Arena struct {
	mem  []byte // whole pages
	size int
}

// hugePage is the size of a huge page on amd64, and on arm64 with pages of 4 KiB.
// Elsewhere arenas are merely aligned to it.
const hugePage = 2 << 20

// NewArena maps size bytes of zeros; size must be positive. The pages count as
// used memory from their first touch on. Long arenas ask for huge pages: direct
// I/O then hands the disk few long segments instead of one for every page, of
// which a request can have only some hundred.
func NewArena(size int) (*Arena, error) {
	if size <= 0 {
		return nil, fmt.Errorf("arena of %d bytes: size must be positive", size)
	}
	page := unix.Getpagesize()
	n := (size + page - 1) / page * page
	if n < hugePage {
		mem, err := mapMemory(n)
		if err != nil {
			return nil, fmt.Errorf("arena of %d bytes: mmap: %w", size, err)
		}
		return &Arena{mem: mem, size: size}, nil
	}
	mem, err := mapMemory(n + hugePage)
	if err != nil {
		return nil, fmt.Errorf("arena of %d bytes: mmap: %w", size, err)
	}
	skip := int(-uintptr(unsafe.Pointer(&mem[0])) % hugePage)
	if err := errors.Join(unmapMemory(mem[:skip]), unmapMemory(mem[skip+n:])); err != nil {
		return nil, fmt.Errorf("arena of %d bytes: munmap: %w", size, err)
	}
	mem = mem[skip:][:n:n]
	// Kernels without huge pages, and administrators who forbid them, refuse this;
	// small ones do.
	_ = unix.Madvise(mem, unix.MADV_HUGEPAGE)
	return &Arena{mem: mem, size: size}, nil
}

func mapMemory(n int) ([]byte, error) {
	p, err := unix.MmapPtr(-1, 0, nil, uintptr(n), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, err
	}
	return unsafe.Slice((*byte)(p), n), nil
}

// unmapMemory takes whole pages of what mapMemory returned, or none.
func unmapMemory(mem []byte) error {
	if len(mem) == 0 {
		return nil
	}
	return unix.MunmapPtr(unsafe.Pointer(&mem[0]), uintptr(len(mem)))
}

// Bytes is the arena's memory, of the length asked for.
func (a *Arena) Bytes() []byte { return a.mem[:a.size:a.size] }

// Close gives the memory back. Nothing may use it any more, no transfer in
// flight either. Closing twice is no error.
func (a *Arena) Close() error {
	if a.mem == nil {
		return nil
	}
	mem := a.mem
	a.mem, a.size = nil, 0
	return unmapMemory(mem)
}
