package merge

import (
	"context"
	"fmt"

	"github.com/snapmerge/snapmerge/pkg/blockio"
)

// runOrdered merges the ordered ops window by window. While one window is being
// written others are read, and the scratch content of the next is staged. The last
// window may be left in progress, written but not flushed, as m.redo.
func (m *Merger) runOrdered(ctx context.Context, over func() bool) error {
	ordered := m.cfg.Ops.Ordered()
	if m.layer.Committed() >= ordered {
		return nil
	}
	if err := m.layer.FindSources(); err != nil {
		return err
	}
	mem, err := newPool(min(m.prog.windowBlocks(), int(ordered-m.layer.Committed())) * bs)
	if err != nil {
		return err
	}
	defer mem.close()
	var queues [3]blockio.Queue // each is used by one goroutine at a time
	for i := range queues {
		if queues[i], err = blockio.NewQueue(m.cfg.IO, queueDepth); err != nil {
			return err
		}
		defer queues[i].Close()
		mem.register(queues[i])
	}
	out, in, log := queues[0], queues[1], queues[2]
	aheadCtx, endAhead := context.WithCancel(ctx)
	if pace := m.cfg.PaceAhead; pace != nil {
		in, log = pacedQueue{in, aheadCtx, pace}, pacedQueue{log, aheadCtx, pace}
	}
	defer m.addCounts()

	w := m.redo
	r := newReader(m, m.next(), in, mem)
	defer r.close()
	defer endAhead() // first, lest the reader still waits for its pace
	if w == nil {
		if w, err = m.take(r, log); err != nil {
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
		following := make(chan filled, 1)
		go func() {
			w, err := m.take(r, log)
			following <- filled{w, err}
		}()
		later := w.commitsLater(m.cfg.Ops)
		err := m.cloneBase(ctx, w)
		if err == nil {
			err = m.writeBase(ctx, out, w.writes())
		}
		if err == nil && !later {
			err = m.flushBase()
		}
		n := <-following
		if err != nil {
			if n.w != nil {
				n.w.free()
			}
			return err // w stays begun and published: m.redo
		}
		if later {
			return nil // w stays begun and published until runIndependent commits
		}
		if n.w == nil || ctx.Err() != nil || over() {
			// Nothing follows at once: commit by itself.
			if n.w != nil {
				n.w.free()
			}
			if err := m.commitWindow(w); err != nil {
				return err
			}
			if n.w == nil {
				return n.err
			}
			return ctx.Err()
		}
		m.addCounts()
		w = n.w
	}
}

// take takes the next window from the reader and stages its scratch content; nil
// after the last.
func (m *Merger) take(r *reader, q blockio.Queue) (*window, error) {
	f := <-r.out
	if f.w == nil {
		return nil, f.err
	}
	if err := m.prog.stage(f.w, q); err != nil {
		f.w.free()
		return nil, err
	}
	return f.w, nil
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
