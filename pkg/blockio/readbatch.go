package blockio

import (
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"sync/atomic"

	"golang.org/x/sync/errgroup"
)

const (
	// batchDepth is how many reads of a batch are in flight at a time on a ring.
	batchDepth = 32
	// maxQueues bounds the rings of ReadQueues, and the memory they take: 150 KiB each.
	maxQueues = 16
	// maxThreads bounds the threads that help with batches where there is no ring.
	maxThreads = 32
)

// BatchReader is an io.ReaderAt that can do several reads at the same time.
type BatchReader interface {
	// ReadBatch does all reads, in any order, and returns when none is in flight. An
	// error is that of one of them; others may not have been done then. Reading past
	// the end is an error that wraps io.EOF or io.ErrUnexpectedEOF.
	ReadBatch(batch []Request) error
}

// ReadBatch is r's if it is a BatchReader, else it does one read after the other.
func ReadBatch(r io.ReaderAt, batch []Request) error {
	if b, ok := r.(BatchReader); ok {
		return b.ReadBatch(batch)
	}
	for _, q := range batch {
		if err := ReadFull(r, q.Buf, q.Off); err != nil {
			return err
		}
	}
	return nil
}

// ReadFull reads len(p) bytes at off, whatever the reader says with the last byte. There
// being fewer is an error that wraps io.ErrUnexpectedEOF.
func ReadFull(r io.ReaderAt, p []byte, off int64) error {
	n, err := r.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	if err == nil || err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return fmt.Errorf("read of %d bytes at %d: %w", len(p), off, err)
}

// ReadQueues reads batches of any devices with Queues, which it keeps for the next
// ones. Batches that come when all are in use, as may be when a disk hangs, wait for
// nobody: they are read as where there is no ring. It may be used concurrently.
type ReadQueues struct {
	kind    Kind
	threads chan struct{} // has an element for each that helps

	mu     sync.Mutex
	idle   []Queue
	made   int // idle and in use
	closed bool
}

// NewReadQueues has no queues before they are needed.
func NewReadQueues(kind Kind) *ReadQueues {
	return &ReadQueues{kind: kind, threads: make(chan struct{}, maxThreads)}
}

// ReadBatch reads a batch as BatchReader says.
func (r *ReadQueues) ReadBatch(d Device, batch []Request) error {
	q := r.take()
	if q == nil {
		return r.spread(d, batch)
	}
	defer r.put(q)
	even, odd := batch, []Request(nil)
	if slices.ContainsFunc(batch, unaligned) {
		even = nil
		for _, b := range batch {
			if unaligned(b) {
				odd = append(odd, b)
			} else {
				even = append(even, b)
			}
		}
	}
	// What is not aligned a queue would do at the end, one after the other.
	var g errgroup.Group
	if len(odd) > 0 {
		g.Go(func() error { return r.spread(d, odd) })
	}
	return errors.Join(q.Read(d, even), g.Wait())
}

// unaligned tells whether direct I/O cannot do the request without a copy.
func unaligned(q Request) bool { return q.Off%SectorSize != 0 }

// spread has threads help with the reads, as many as there may be.
func (r *ReadQueues) spread(d Device, batch []Request) error {
	var (
		g      errgroup.Group
		failed atomic.Bool
	)
	read := func(q Request) error {
		if failed.Load() {
			return nil
		}
		err := ReadFull(d, q.Buf, q.Off)
		if err != nil {
			failed.Store(true)
		}
		return err
	}
	var own error
	for i, q := range batch {
		if i < len(batch)-1 {
			select {
			case r.threads <- struct{}{}:
				g.Go(func() error {
					defer func() { <-r.threads }()
					return read(q)
				})
				continue
			default:
			}
		}
		if err := read(q); own == nil {
			own = err
		}
	}
	if err := g.Wait(); own == nil {
		own = err
	}
	return own
}

// take returns a queue with a ring, nil if there is none to be had.
func (r *ReadQueues) take() Queue {
	r.mu.Lock()
	defer r.mu.Unlock()
	if n := len(r.idle); n > 0 {
		q := r.idle[n-1]
		r.idle = r.idle[:n-1]
		return q
	}
	if r.kind == Sync || r.made == maxQueues || r.closed {
		return nil
	}
	q, err := NewQueue(r.kind, batchDepth)
	if err != nil || q.Kind() == Sync {
		return nil
	}
	r.made++
	return q
}

func (r *ReadQueues) put(q Queue) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if q.Kind() == Sync || r.closed { // the ring has failed
		r.made--
		_ = q.Close()
		return
	}
	r.idle = append(r.idle, q)
}

// Close closes the queues.
func (r *ReadQueues) Close() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.closed = true
	var errs []error
	for _, q := range r.idle {
		errs = append(errs, q.Close())
		r.made--
	}
	r.idle = nil
	return errors.Join(errs...)
}
