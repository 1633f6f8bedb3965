package merge

import (
	"sync"
	"sync/atomic"
)

// Epoch lets readers go on without locks while what they look at is replaced.
// A reader enters, loads the published pointers, does its I/O and leaves. Who
// publishes something new calls Synchronize before destroying what the old
// state refers to: it returns when every reader that may have seen the old
// state has left. Readers never wait.
//
// The zero Epoch is not usable; call NewEpoch.
type Epoch struct {
	cur atomic.Pointer[generation]
	mu  sync.Mutex // held by Synchronize
}

// generation counts the readers that entered during one period, plus one for
// as long as the period is the current one.
type generation struct {
	refs atomic.Int64
	gone chan struct{}
}

// NewEpoch makes an Epoch without readers.
func NewEpoch() *Epoch {
	e := &Epoch{}
	e.cur.Store(newGeneration())
	return e
}

func newGeneration() *generation {
	g := &generation{gone: make(chan struct{})}
	g.refs.Store(1)
	return g
}

func (g *generation) leave() {
	if g.refs.Add(-1) == 0 {
		close(g.gone)
	}
}

// Reader is the token of one stay inside an Epoch.
type Reader struct{ g *generation }

// Enter starts a stay. Published pointers must be loaded after it.
func (e *Epoch) Enter() Reader {
	for {
		g := e.cur.Load()
		n := g.refs.Load()
		// A generation whose count has reached 0 is over and must not be
		// revived: its Synchronize has returned.
		if n > 0 && g.refs.CompareAndSwap(n, n+1) {
			return Reader{g}
		}
	}
}

// Leave ends the stay.
func (r Reader) Leave() { r.g.leave() }

// Synchronize returns when every reader that entered before the call has left.
// It must not be called from inside a stay.
func (e *Epoch) Synchronize() {
	// One at a time: the second must not return while readers that only the
	// first waits for are still in.
	e.mu.Lock()
	defer e.mu.Unlock()
	old := e.cur.Swap(newGeneration())
	old.leave()
	<-old.gone
}
