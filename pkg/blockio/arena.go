package blockio

import (
	"fmt"

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

// NewArena maps size bytes of zeros; size must be positive. The pages count as
// used memory from their first touch on.
func NewArena(size int) (*Arena, error) {
	if size <= 0 {
		return nil, fmt.Errorf("arena of %d bytes: size must be positive", size)
	}
	page := unix.Getpagesize()
	mem, err := unix.Mmap(-1, 0, (size+page-1)/page*page,
		unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, fmt.Errorf("arena of %d bytes: mmap: %w", size, err)
	}
	return &Arena{mem: mem, size: size}, nil
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
	return unix.Munmap(mem)
}
