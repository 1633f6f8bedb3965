package readahead

import (
	"runtime"
	"time"
)

// task is a window of chunks to be loaded by the pool.
type task struct {
	h         *Handle
	chunks    []*chunk
	arm       *arm
	submitted time.Time
}

// submitLocked queues the chunks from first up to end and a window behind them,
// those left out that are there already. Windows are no shorter than the n chunks of
// the read that asks for them. mu must be held.
func (h *Handle) submitLocked(first, end, n int64) {
	m := h.m
	if h.closed || m.closed || len(m.queue) >= maxQueue {
		return
	}
	window := max(h.window, n)
	end += window
	t := &task{h: h, arm: &arm{next: end}, submitted: m.clock.now()}
	for i := first; i < end; i++ {
		c := h.addLocked(i)
		if c != nil {
			t.chunks = append(t.chunks, c)
		} else {
			c = h.findLocked(i)
		}
		if c != nil && i >= end-max(window/4, 1) { // the last quarter
			c.arm = t.arm
		}
	}
	if len(t.chunks) > 0 {
		m.queue = append(m.queue, t)
		m.work.Signal()
	}
}

// next waits for a task and has the worker do it; false: there will be none.
func (m *Manager) next(w *worker) bool {
	m.mu.Lock()
	for len(m.queue) == 0 && !m.closed {
		m.work.Wait()
	}
	if m.closed {
		m.mu.Unlock()
		return false
	}
	t := m.queue[0]
	m.queue = m.queue[1:]
	t.h.running.Add(1)
	m.mu.Unlock()
	defer t.h.running.Done()
	started := m.clock.now()
	m.stats.queued.observe(started.Sub(t.submitted))
	if !t.h.do(w, t.chunks, started, t.submitted) {
		m.mu.Lock()
		defer m.mu.Unlock()
		t.arm.off = true // there is nothing here; who reads on leaves a note
	}
	return true
}

// do loads chunks, in order, and tells whether any may hold something. w is the
// worker that does, nil if it is a read.
func (h *Handle) do(w *worker, chunks []*chunk, started, submitted time.Time) (worth bool) {
	for _, c := range chunks {
		worth = h.fill(w, c) || worth
		if w != nil {
			runtime.Gosched() // whoever waits for a processor goes first
		}
	}
	end := h.m.clock.now()
	h.m.stats.execution.observe(end.Sub(started))
	h.m.stats.total.observe(end.Sub(submitted))
	return worth
}
