package volume

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/snapmerge/snapmerge/pkg/merge"
)

// Whether what pods read of a COW is merged early; "" stands for what the node has.
const (
	PromotionOn  = "on"
	PromotionOff = "off"
)

// ParsePromotion checks a value of read promotion.
func ParsePromotion(s string) (string, error) {
	if s != PromotionOn && s != PromotionOff {
		return "", fmt.Errorf("read promotion %q is not %s or %s", s, PromotionOn, PromotionOff)
	}
	return s, nil
}

const (
	// promoteQueue bounds the chunks that wait to be promoted; what pods read beyond
	// them is forgotten.
	promoteQueue = 1024
	// promoteMost is how many chunks have two flushes together: as many bytes as are
	// paced as one.
	promoteMost = 16
	// promoteRest is the time between two promotions, in which others are collected.
	promoteRest = 20 * time.Millisecond
	// promoteRetry is how long promotion rests after an error.
	promoteRetry = time.Minute
)

// promotion is what pods have read of the lowest layer, a COW, and is to be merged
// early.
type promotion struct {
	wake bell
	done chan struct{} // closed when the goroutine has ended; nil: not started

	mu     sync.Mutex
	merger *merge.Merger // that the rest is about
	queue  []uint64      // chunks, those read first in front
	queued map[uint64]struct{}
	// refused are chunks that cannot be promoted as long as no more than refusedAt ops
	// are committed.
	refused   map[uint64]struct{}
	refusedAt uint64
}

func (p *promotion) init() {
	p.wake = newBell()
	p.resetLocked(nil)
}

// resetLocked forgets everything. mu must be held, or nobody else be there.
func (p *promotion) resetLocked(m *merge.Merger) {
	p.merger, p.queue, p.queued, p.refused, p.refusedAt = m, nil, map[uint64]struct{}{}, map[uint64]struct{}{}, 0
}

// add notes that a pod has read a chunk that the layer of m has something of.
func (p *promotion) add(m *merge.Merger, chunk uint64) {
	committed := m.Layer().Committed()
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.merger != m {
		p.resetLocked(m)
	}
	if p.refusedAt != committed {
		clear(p.refused)
		p.refusedAt = committed
	}
	if _, no := p.refused[chunk]; no || len(p.queue) >= promoteQueue {
		return
	}
	if _, there := p.queued[chunk]; there {
		return
	}
	p.queued[chunk] = struct{}{}
	p.queue = append(p.queue, chunk)
	p.wake.ring()
}

// waiting is how many chunks of m are queued, at most promoteMost.
func (p *promotion) waiting(m *merge.Merger) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.merger != m {
		p.resetLocked(m)
	}
	return min(len(p.queue), promoteMost)
}

// take takes the first chunks of the queue, if they are still about m.
func (p *promotion) take(m *merge.Merger) []uint64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.merger != m {
		return nil
	}
	n := min(len(p.queue), promoteMost)
	chunks := p.queue[:n:n]
	p.queue = p.queue[n:]
	for _, c := range chunks {
		delete(p.queued, c)
	}
	return chunks
}

// refuse notes which of the chunks were not promoted.
func (p *promotion) refuse(m *merge.Merger, chunks []uint64, promoted func(chunk uint64) bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.merger != m {
		return
	}
	if committed := m.Layer().Committed(); committed != p.refusedAt || len(p.refused) > promoteQueue {
		clear(p.refused)
		p.refusedAt = committed
	}
	for _, c := range chunks {
		if !promoted(c) {
			p.refused[c] = struct{}{}
		}
	}
}

// promotes tells whether what pods read is merged early.
func (v *Volume) promotes() bool {
	if p := v.Record().ReadPromotion; p != "" {
		return p == PromotionOn
	}
	return v.cfg.ReadPromotion
}

// noteReads returns what a view calls when the layer has supplied part of a read of n
// bytes at off; nil if nobody wants to know.
func (v *Volume) noteReads(l *layer) func(off int64, n int) {
	m := l.merger
	if m == nil || !v.promotes() {
		return nil
	}
	return func(off int64, n int) {
		size := m.ChunkBlocks()
		for c := uint64(off/bs) / size; int64(c*size)*bs < off+int64(n); c++ {
			if !m.Layer().Promoted(c*size, size) {
				v.promotion.add(m, c)
			}
		}
	}
}

// forgetPromotions lets older releases have the volume again when the COW is gone of
// which something was promoted.
func (v *Volume) forgetPromotions() {
	if err := v.journal.ForgetPromotions(); err != nil {
		v.cfg.Log.Error(err, "Journal stays one that older releases refuse", "volume", v.ID())
	}
}

// startPromotion starts to promote what pods read. work.mu must be held.
func (v *Volume) startPromotion() {
	if !v.promotes() {
		return
	}
	p := &v.promotion
	p.done = make(chan struct{})
	go func() {
		defer close(p.done)
		ctx := v.work.ctx
		rest := time.Duration(0)
		for {
			select {
			case <-ctx.Done():
				return
			case <-time.After(rest):
			}
			select {
			case <-ctx.Done():
				return
			case <-p.wake:
			}
			rest = promoteRest
			more, err := v.promote(ctx)
			if err != nil {
				v.cfg.Log.Error(err, "Blocks that were read are not merged early", "volume", v.ID())
				rest = promoteRetry
			}
			if more {
				p.wake.ring()
			}
		}
	}()
}

// promote merges a few of the chunks that pods have read, unless background work is
// paused. It tells whether there are more. The goroutine that startPromotion starts
// calls it; tests call it by themselves.
func (v *Volume) promote(ctx context.Context) (more bool, err error) {
	w, p := &v.work, &v.promotion
	layers := v.stack.Load().layers
	if v.failed() != nil || len(layers) == 0 || layers[0].merger == nil {
		return false, nil
	}
	low := layers[0]
	m := low.merger
	size := m.ChunkBlocks()
	n := p.waiting(m)
	if n == 0 {
		return false, nil
	}
	ctx, stop, ok := w.begin(ctx, &w.stopPromoting)
	if !ok {
		return false, nil
	}
	defer stop()
	if err := v.pace(ctx, n*int(size)*bs); err != nil {
		return false, nil // paused, or closed
	}
	chunks := p.take(m)
	if err := m.Promote(chunks); err != nil {
		return true, low.named(err)
	}
	p.refuse(m, chunks, func(chunk uint64) bool { return m.Layer().Promoted(chunk*size, size) })
	return p.waiting(m) > 0, nil
}
