package blockio

import (
	"cmp"
	"slices"
	"unsafe"

	"golang.org/x/sys/unix"
)

// maxVectors is the longest vector that one system call takes (linux/uio.h,
// UIO_MAXIOV).
const maxVectors = 1024

// maxTransfer is the most bytes that the kernel moves in one call, rounded down
// to whole blocks (linux/fs.h, MAX_RW_COUNT).
const maxTransfer = 0x7ffff000

// run is a stretch of the file that one call moves: bytes at off, to or from
// plan.vectors[first : first+count].
type run struct {
	off          int64
	bytes        int
	first, count int
}

// plan is a batch in the order of the file, with requests that touch each other
// joined. Its slices are kept from batch to batch.
type plan struct {
	order   []int // into the batch, by offset
	vectors [][]byte
	runs    []run
	// odd lists requests that may not go straight to the descriptor.
	odd []Request
}

// build makes the plan for transfers that need align. Runs are of at most
// maxBytes and maxCount vectors, but a request is never cut.
func (p *plan) build(batch []Request, align, maxBytes, maxCount int) error {
	p.reset()
	for i, r := range batch {
		if r.Off < 0 {
			return unix.EINVAL
		}
		switch {
		case len(r.Buf) == 0:
		case aligned(r.Buf, r.Off, align) && len(r.Buf) <= maxTransfer:
			p.order = append(p.order, i)
		default:
			p.odd = append(p.odd, r)
		}
	}
	byOffset := func(a, b int) int { return cmp.Compare(batch[a].Off, batch[b].Off) }
	if !slices.IsSortedFunc(p.order, byOffset) {
		slices.SortFunc(p.order, byOffset)
	}
	for _, i := range p.order {
		p.add(batch[i], maxBytes, maxCount)
	}
	return nil
}

func (p *plan) add(r Request, maxBytes, maxCount int) {
	if n := len(p.runs); n > 0 {
		last := &p.runs[n-1]
		if last.off+int64(last.bytes) == r.Off && last.bytes+len(r.Buf) <= maxBytes {
			if v := &p.vectors[len(p.vectors)-1]; follows(*v, r.Buf) {
				*v = (*v)[:len(*v)+len(r.Buf)]
				last.bytes += len(r.Buf)
				return
			}
			if last.count < maxCount {
				p.vectors = append(p.vectors, r.Buf)
				last.count++
				last.bytes += len(r.Buf)
				return
			}
		}
	}
	p.runs = append(p.runs, run{off: r.Off, bytes: len(r.Buf), first: len(p.vectors), count: 1})
	p.vectors = append(p.vectors, r.Buf)
}

// follows tells whether b is the memory behind a, in the same allocation: only
// a's capacity can tell.
func follows(a, b []byte) bool {
	return cap(a)-len(a) >= len(b) && &a[:len(a)+1][len(a)] == &b[0]
}

// advance takes the first n bytes off a run after a short transfer; n is below
// r.bytes.
func (p *plan) advance(r *run, n int) {
	r.off += int64(n)
	r.bytes -= n
	for n > 0 {
		v := &p.vectors[r.first]
		if n < len(*v) {
			*v = (*v)[n:]
			return
		}
		n -= len(*v)
		r.first++
		r.count--
	}
}

// leave makes odd requests of what is left of a run.
func (p *plan) leave(r *run) {
	off := r.off
	for _, v := range p.vectors[r.first : r.first+r.count] {
		p.odd = append(p.odd, Request{Buf: v, Off: off})
		off += int64(len(v))
	}
}

// reset forgets the batch, its memory too.
func (p *plan) reset() {
	clear(p.vectors)
	clear(p.odd)
	p.order, p.vectors, p.runs, p.odd = p.order[:0], p.vectors[:0], p.runs[:0], p.odd[:0]
}

// iovecs writes the run as the kernel takes it and returns the part of to that
// it used.
func (p *plan) iovecs(to []unix.Iovec, r *run) []unix.Iovec {
	for i, v := range p.vectors[r.first : r.first+r.count] {
		to[i] = unix.Iovec{Base: unsafe.SliceData(v), Len: uint64(len(v))}
	}
	return to[:r.count]
}

// clip makes transfers short for tests: a positive one is the most bytes that a
// transfer reports to have moved.
type clip int

// ask cuts what the kernel is asked for, to a length that it accepts.
func (c clip) ask(v []unix.Iovec, align int) []unix.Iovec {
	if c <= 0 {
		return v
	}
	v[0].Len = min(v[0].Len, uint64((int(c)+align-1)&^(align-1)))
	return v[:1]
}

// report cuts the number of bytes that were moved.
func (c clip) report(n int) int {
	if c <= 0 {
		return n
	}
	return min(n, int(c))
}
