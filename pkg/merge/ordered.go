package merge

import (
	"context"
	"fmt"

	"github.com/snapmerge/snapmerge/pkg/blockio"
)

// runOrdered merges the ordered ops window by window. While one window is being
// written the next is read and its scratch content staged. The last window may be
// left in progress, written but not flushed, as m.redo.
func (m *Merger) runOrdered(ctx context.Context) error {
	ordered := m.cfg.Ops.Ordered()
	if m.layer.Committed() >= ordered {
		return nil
	}
	if err := m.layer.FindSources(); err != nil {
		return err
	}
	out, err := blockio.NewQueue(m.cfg.IO, queueDepth)
	if err != nil {
		return err
	}
	defer out.Close()
	in, err := blockio.NewQueue(m.cfg.IO, queueDepth)
	if err != nil {
		return err
	}
	defer in.Close()
	mem, err := newPool(min(m.prog.windowBlocks(), int(ordered-m.layer.Committed())) * bs)
	if err != nil {
		return err
	}
	defer mem.close()
	mem.register(out)
	mem.register(in)
	defer m.addCounts()

	w := m.redo
	if w == nil {
		if w, err = m.prepare(m.layer.Committed(), in, mem); err != nil {
			return err
		}
	}
	for {
		if err := ctx.Err(); err != nil {
			if !w.begun {
				w.free()
			}
			return err
		}
		if !w.begun {
			if err := m.begin(w, out); err != nil {
				w.free()
				return err
			}
		}
		next := make(chan prepared, 1)
		if w.end < ordered {
			go func() {
				w, err := m.prepare(w.end, in, mem)
				next <- prepared{w, err}
			}()
		} else {
			next <- prepared{}
		}
		err := m.cloneBase(ctx, w)
		if err == nil {
			err = m.writeBase(ctx, out, w.writes())
		}
		if err == nil && w.commitsLater(m.cfg.Ops) {
			m.addCounts()
			return nil // w stays begun and published until runIndependent commits
		}
		if err == nil {
			err = m.flushBase()
		}
		n := <-next
		if err != nil {
			if n.w != nil {
				n.w.free()
			}
			return err // w stays begun and published: m.redo
		}
		if n.w == nil || n.err != nil || ctx.Err() != nil {
			// Nothing follows at once: commit by itself.
			if n.w != nil {
				n.w.free()
			}
			if err := m.commitWindow(w); err != nil {
				return err
			}
			if n.err != nil {
				return n.err
			}
			if n.w == nil {
				return nil
			}
			return ctx.Err()
		}
		m.addCounts()
		w = n.w
	}
}

type prepared struct {
	w   *window
	err error
}

// prepare plans and reads the window at start and stages its scratch content.
func (m *Merger) prepare(start uint64, q blockio.Queue, mem *pool) (*window, error) {
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
	if err := w.alloc(mem); err != nil {
		return nil, err
	}
	if err := m.fill(w, q, nil); err != nil {
		w.free()
		return nil, err
	}
	if err := m.prog.stage(w, q); err != nil {
		w.free()
		return nil, err
	}
	return w, nil
}

// begin makes w the window in progress, which commits what came before it, and
// frees the window that was.
func (m *Merger) begin(w *window, q blockio.Queue) error {
	before := m.redo
	if err := m.prog.begin(w, q); err != nil {
		return fmt.Errorf("progress of the merge: %w", err)
	}
	w.begun = true
	m.counters.Windows.Add(1)
	if before != nil {
		m.committedBytes += uint64(len(before.ops)) * bs
	}
	m.redo = w
	m.publish(&state{committed: w.start, window: w})
	if before != nil {
		before.free()
	}
	return nil
}

// commitWindow commits w, all of which is flushed to the base, and leaves no
// window in progress.
func (m *Merger) commitWindow(w *window) error {
	bytes := m.committedBytes + uint64(len(w.ops))*bs
	if err := m.prog.commit(w.end, bytes); err != nil {
		return fmt.Errorf("progress of the merge: %w", err)
	}
	m.committedBytes = bytes
	m.redo = nil
	m.publish(&state{committed: w.end})
	w.free()
	return nil
}

// queueDepth bounds the transfers of one queue that are in flight.
const queueDepth = 32
