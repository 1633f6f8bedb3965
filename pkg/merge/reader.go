package merge

import (
	"fmt"

	"github.com/snapmerge/snapmerge/pkg/blockio"
)

// reader reads the sources of windows ahead of the merge, as many as its pool has
// memory for. No op reads what an earlier one wrote, so this may run while the
// windows before are being written.
type reader struct {
	m    *Merger
	q    blockio.Queue
	mem  *pool
	out  chan filled // ends after the last ordered op, or with an error
	stop chan struct{}
}

// filled is a window that has its data, or why there is none.
type filled struct {
	w   *window
	err error
}

// newReader begins with the ordered op at start.
func newReader(m *Merger, start uint64, q blockio.Queue, mem *pool) *reader {
	r := &reader{m: m, q: q, mem: mem, out: make(chan filled), stop: make(chan struct{})}
	go r.run(start)
	return r
}

func (r *reader) run(start uint64) {
	defer close(r.out)
	for start < r.m.cfg.Ops.Ordered() {
		select {
		case <-r.stop:
			return
		default:
		}
		w, err := r.read(start)
		select {
		case <-r.stop:
			if w != nil {
				w.free()
			}
			return
		case r.out <- filled{w, err}:
		}
		if err != nil {
			return
		}
		start = w.end
	}
}

// read plans the window at start and reads its data.
func (r *reader) read(start uint64) (*window, error) {
	m := r.m
	scratch := m.prog.scratch() && !m.cfg.NoReadAhead
	w, err := plan(m.cfg.Ops, start, m.prog.windowBlocks(), scratch)
	if err != nil {
		return nil, err
	}
	if w.loggedOps() > 0 && !m.prog.scratch() {
		return nil, fmt.Errorf("op %d reads the block it writes, which without scratch space cannot be merged safely", start)
	}
	if m.cloning.Load() && !(m.prog.logsWhole() && w.loggedOps() > 0) {
		w.findClones(m.cloneBlocks)
	}
	if err := w.allocFrom(r.mem, r.stop); err != nil {
		return nil, err
	}
	if err := m.fill(w, r.q, nil); err != nil {
		w.free()
		return nil, err
	}
	return w, nil
}

// close may be called at any time, but for beside a receive from out.
func (r *reader) close() {
	close(r.stop)
	for f := range r.out {
		if f.w != nil {
			f.w.free()
		}
	}
}
