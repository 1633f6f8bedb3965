package vm

import (
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

const sector = 512

// cacheLimit is the most bytes in a disk's volatile cache; beyond it the oldest
// writes become durable, as on a real disk.
const cacheLimit = 64 << 20

// Disk is a disk with a volatile write cache that can lose its power. It lives
// in memory.
type Disk struct {
	mu      sync.Mutex
	view    []byte // what a reader sees
	durable []byte // what would be left if the cache were dropped
	cache   []write
	cached  int  // bytes in cache
	off     bool // the power is off
	counts  Counts
	cutAt   int // number of the request at which the power goes; 0: never
	cut     chan struct{}
}

// write is one write in the cache, oldest first.
type write struct {
	off    int64
	data   []byte
	forced bool // written through: survives whatever comes
}

// Counts are requests of the guest since the disk was made.
type Counts struct {
	Reads, Writes, Zeroes, Flushes int
}

func (c Counts) all() int { return c.Reads + c.Writes + c.Zeroes + c.Flushes }

// NewDisk makes a disk of size bytes, all zeros and durable.
func NewDisk(size int64) *Disk {
	return &Disk{view: memory(size), durable: memory(size), cut: make(chan struct{})}
}

// memory is not of Go's heap, which would fill what it has used before with zeros, and
// hold gigabytes until it collects them.
func memory(size int64) []byte {
	b, err := unix.Mmap(-1, 0, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
	if err != nil {
		panic(fmt.Sprintf("memory of a disk of %d bytes: %v", size, err))
	}
	return b
}

// Remove turns the power off for good and gives the memory back.
func (d *Disk) Remove() {
	d.PowerOff()
	d.mu.Lock()
	defer d.mu.Unlock()
	_ = unix.Munmap(d.view)
	_ = unix.Munmap(d.durable)
	d.view, d.durable, d.cache = nil, nil, nil
}

// DiskOf makes a disk with the content of a file. Where that is zero the disk
// takes no memory.
func DiskOf(name string) (*Disk, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if st.Size()%sector != 0 {
		return nil, fmt.Errorf("%s: length %d is not a multiple of %d", name, st.Size(), sector)
	}
	d := NewDisk(st.Size())
	chunk, zeros := make([]byte, 1<<20), make([]byte, 1<<20)
	for off := int64(0); off < st.Size(); off += int64(len(chunk)) {
		n, err := f.ReadAt(chunk, off)
		if err != nil && err != io.EOF {
			return nil, err
		}
		if bytes.Equal(chunk[:n], zeros[:n]) {
			continue
		}
		copy(d.view[off:], chunk[:n])
		copy(d.durable[off:], chunk[:n])
	}
	return d, nil
}

// Size in bytes.
func (d *Disk) Size() int64 { return int64(len(d.view)) }

// Counts says what the guest has asked for so far.
func (d *Disk) Counts() Counts {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.counts
}

// begin counts a request; false if the power is off or goes off with it. mu
// must be held.
func (d *Disk) beginLocked(count *int) bool {
	if d.off {
		return false
	}
	*count++
	if d.cutAt > 0 && d.counts.all() >= d.cutAt {
		d.off = true
		close(d.cut)
		return false
	}
	return true
}

// CutAfter turns the power off at the n-th request from now on; the channel is
// closed then. The guest gets no answer any more: its machine must be killed, and
// Restart called.
func (d *Disk) CutAfter(n int) <-chan struct{} {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.cutAt = d.counts.all() + max(n, 1)
	return d.cut
}

// PowerOff turns the power off now.
func (d *Disk) PowerOff() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.off {
		d.off = true
		close(d.cut)
	}
}

// Loss says what a power cut did to the writes that were not flushed.
type Loss struct {
	Dropped, Kept, Torn int
}

// Restart turns the power on again after it was off. What happened to the cache
// is rng's choice: all of it is dropped or kept, or each write by itself is
// dropped, kept, or torn.
func (d *Disk) Restart(rng *rand.Rand) Loss {
	d.mu.Lock()
	defer d.mu.Unlock()
	var loss Loss
	mood := rng.IntN(8) // 0: drop all, 1: keep all, else one by one
	for _, w := range d.cache {
		choice := rng.IntN(3)
		switch {
		case w.forced || mood == 1:
			choice = 1
		case mood == 0:
			choice = 0
		}
		switch choice {
		case 0:
			loss.Dropped++
		case 1:
			loss.Kept++
			copy(d.durable[w.off:], w.data)
		case 2:
			loss.Torn++
			d.tear(w, rng)
		}
	}
	d.cache, d.cached = nil, 0
	copy(d.view, d.durable)
	d.off, d.cutAt, d.cut = false, 0, make(chan struct{})
	return loss
}

// Settle makes durable all that the disk was given, as a disk does by and by while it
// has power, and returns how many writes that were.
func (d *Disk) Settle() (writes int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for writes = len(d.cache); len(d.cache) > 0; {
		d.retireLocked()
	}
	return writes
}

// tear makes some sectors of the write durable: the first ones, the last ones,
// or any.
func (d *Disk) tear(w write, rng *rand.Rand) {
	n := len(w.data) / sector
	edge, mode := rng.IntN(n+1), rng.IntN(3)
	for i := range n {
		keep := i < edge
		switch mode {
		case 1:
			keep = i >= edge
		case 2:
			keep = rng.IntN(2) == 0
		}
		if at := i * sector; keep {
			copy(d.durable[w.off+int64(at):], w.data[at:at+sector])
		}
	}
}

func (d *Disk) read(p []byte, off int64) (ok bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.beginLocked(&d.counts.Reads) {
		return false
	}
	copy(p, d.view[off:])
	return true
}

// write takes data, which belongs to the disk from then on.
func (d *Disk) write(data []byte, off int64, through bool) (ok bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.beginLocked(&d.counts.Writes) {
		return false
	}
	d.putLocked(write{off, data, through})
	return true
}

func (d *Disk) zero(off, n int64, through bool) (ok bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.beginLocked(&d.counts.Zeroes) {
		return false
	}
	d.putLocked(write{off, make([]byte, n), through})
	return true
}

// putLocked: mu must be held.
func (d *Disk) putLocked(w write) {
	copy(d.view[w.off:], w.data)
	d.cache = append(d.cache, w)
	d.cached += len(w.data)
	for d.cached > cacheLimit {
		d.retireLocked()
	}
}

// retireLocked makes the oldest write of the cache durable. mu must be held.
func (d *Disk) retireLocked() {
	w := d.cache[0]
	copy(d.durable[w.off:], w.data)
	d.cached -= len(w.data)
	d.cache = d.cache[1:]
}

func (d *Disk) flush() (ok bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.beginLocked(&d.counts.Flushes) {
		return false
	}
	for len(d.cache) > 0 {
		d.retireLocked()
	}
	d.cache = nil
	return true
}
