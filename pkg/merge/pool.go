package merge

import (
	"errors"
	"sync"

	"github.com/snapmerge/snapmerge/pkg/blockio"
)

// pool keeps the memory of windows from one to the next, so that the kernel can
// have it registered and need not clear its pages again and again.
type pool struct {
	free chan *blockio.Arena
	all  []*blockio.Arena

	mu     sync.Mutex
	closed bool
}

const (
	// minWindows are the windows that have memory at a time: one that is being
	// written and one that is being read.
	minWindows = 2
	// maxWindows and poolBytes bound how many more are read ahead where windows are
	// small, and the disk would have nothing to read while one is begun.
	maxWindows = 4
	poolBytes  = 8 << 20
)

var errStopped = errors.New("stopped")

// newPool makes a pool for windows of up to size bytes.
func newPool(size int) (*pool, error) {
	n := max(minWindows, min(maxWindows, poolBytes/size))
	p := &pool{free: make(chan *blockio.Arena, n)}
	for range n {
		a, err := blockio.NewArena(size)
		if err != nil {
			p.close()
			return nil, err
		}
		p.all = append(p.all, a)
		p.free <- a
	}
	return p, nil
}

// register makes the arenas known to a queue.
func (p *pool) register(q blockio.Queue) { q.Register(p.all...) }

// get returns an arena as soon as there is one, or errStopped.
func (p *pool) get(stop <-chan struct{}) (*blockio.Arena, error) {
	select {
	case <-stop:
		return nil, errStopped
	case a := <-p.free:
		return a, nil
	}
}

// put takes an arena back that get has returned.
func (p *pool) put(a *blockio.Arena) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		a.Close()
		return
	}
	p.free <- a
}

// close frees what is not in use; the rest goes when it is put back.
func (p *pool) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closed = true
	for {
		select {
		case a := <-p.free:
			a.Close()
		default:
			return
		}
	}
}
