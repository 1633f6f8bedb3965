package nbd

import (
	"slices"
	"sync"
)

// ranges keeps what changes the same blocks in the order in which it came.
type ranges struct {
	mu    sync.Mutex
	queue []*place // what has come and is not done, the oldest first
}

// place is that of a change in the queue.
type place struct {
	off, end int64
	done     chan struct{}
}

// take takes a place for a change of n bytes at off.
func (r *ranges) take(off, n int64) *place {
	p := &place{off, off + n, make(chan struct{})}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.queue = append(r.queue, p)
	return p
}

// wait returns when all older changes of the same bytes are done.
func (r *ranges) wait(p *place) {
	for {
		older := r.before(p)
		if older == nil {
			return
		}
		<-older.done
	}
}

func (r *ranges) before(p *place) *place {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, o := range r.queue {
		if o == p {
			return nil
		}
		if o.off < p.end && p.off < o.end {
			return o
		}
	}
	return nil
}

// leave gives the place up.
func (r *ranges) leave(p *place) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.queue = slices.DeleteFunc(r.queue, func(o *place) bool { return o == p })
	close(p.done)
}
