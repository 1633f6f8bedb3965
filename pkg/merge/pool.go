package merge

import (
	"sync"

	"github.com/snapmerge/snapmerge/pkg/blockio"
)

// pool keeps the memory of windows from one to the next, so that the kernel can
// have it registered and need not clear its pages again and again.
type pool struct {
	mu     sync.Mutex
	size   int // of each arena, in bytes
	free   []*blockio.Arena
	closed bool
}

// windowsAtOnce are the windows that have memory at a time: one that is being
// written and one that is being read.
const windowsAtOnce = 2

func newPool(size int) (*pool, error) {
	p := &pool{size: size}
	for range windowsAtOnce {
		a, err := blockio.NewArena(size)
		if err != nil {
			p.close()
			return nil, err
		}
		p.free = append(p.free, a)
	}
	return p, nil
}

// register makes the arenas known to a queue. It must come before the first get.
func (p *pool) register(q blockio.Queue) { q.Register(p.free...) }

// get returns an arena of at least n bytes.
func (p *pool) get(n int) (*blockio.Arena, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if k := len(p.free) - 1; k >= 0 && n <= p.size {
		a := p.free[k]
		p.free = p.free[:k]
		return a, nil
	}
	return blockio.NewArena(n)
}

// put takes an arena back that get has returned.
func (p *pool) put(a *blockio.Arena) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed || len(a.Bytes()) != p.size {
		a.Close()
		return
	}
	p.free = append(p.free, a)
}

// close frees what is not in use; the rest goes when it is put back.
func (p *pool) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, a := range p.free {
		a.Close()
	}
	p.free, p.closed = nil, true
}
