package merge

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/snapmerge/snapmerge/pkg/blockio"
)

// runIndependent merges what follows the ordered ops. Commits come by bytes and
// time, sooner if the merge was interrupted before; reads of an uncommitted op
// are served from the COW.
func (m *Merger) runIndependent(ctx context.Context, over func() bool) error {
	q, err := blockio.NewQueue(m.cfg.IO, queueDepth)
	if err != nil {
		return err
	}
	defer q.Close()
	wait := m.cfg.CommitEvery
	if m.commitSoon {
		wait = 0
	}
	pos, bytes, last := m.layer.Committed(), uint64(0), time.Now()
	if m.redo != nil { // what the ordered ops have left, all of it written
		pos, bytes = m.redo.end, uint64(len(m.redo.ops))*bs
	} else if err := m.prog.note(); err != nil {
		return fmt.Errorf("progress of the merge: %w", err)
	}
	defer m.early.release() // when b is closed
	b, err := newBatcher(m, pos)
	if err != nil {
		return err
	}
	defer b.close()
	q.Register(b.mem)
	defer m.addCounts()

	for {
		t := <-b.made
		if t.err == nil && t.start == t.end { // the end
			return m.commitIndependent(pos, bytes)
		}
		err := t.err
		if err == nil {
			err = ctx.Err()
		}
		if err == nil {
			err = m.writeBatch(ctx, q, t)
		}
		if err != nil {
			if ctx.Err() != nil {
				// Asked to stop: what is whole counts.
				if cerr := m.commitIndependent(pos, bytes); cerr != nil {
					return cerr
				}
			}
			return err
		}
		pos, bytes = t.end, bytes+t.blocks*bs
		b.put(t)
		if over() {
			return m.commitIndependent(pos, bytes)
		}
		if bytes >= m.commitBytes || time.Since(last) >= wait {
			if err := m.commitIndependent(pos, bytes); err != nil {
				return err
			}
			bytes, last, wait = 0, time.Now(), min(max(2*wait, commitFirst), m.cfg.CommitEvery)
		}
	}
}

func (m *Merger) writeBatch(ctx context.Context, q blockio.Queue, t *batch) error {
	// What zeroing costs a file depends little on the length of the range, so each
	// counts for a block.
	for part := range slices.Chunk(t.zeros, paceZeros) {
		if err := m.pace(ctx, len(part)*bs); err != nil {
			return err
		}
		if err := m.zeroBase(part); err != nil {
			return err
		}
	}
	return m.writeBase(ctx, q, t.writes)
}

func (m *Merger) zeroBase(ranges []extent) error {
	for _, z := range ranges {
		if err := m.cfg.Base.Zero(z.off, z.n); err != nil {
			return fmt.Errorf("zeroing of the base: %w", err)
		}
		m.counters.BlocksWritten.Add(uint64(z.n) / bs)
	}
	return nil
}

// commitIndependent makes the ops before pos, which wrote bytes since the last
// commit, durable and counts them, those of the window in progress too.
func (m *Merger) commitIndependent(pos, bytes uint64) error {
	if pos == m.layer.Committed() {
		return nil
	}
	if err := m.flushBase(); err != nil {
		return err
	}
	if err := m.prog.commit(pos, m.committedBytes+bytes); err != nil {
		return fmt.Errorf("progress of the merge: %w", err)
	}
	m.addCounts()
	m.committedBytes += bytes
	m.publish(&state{committed: pos})
	if m.redo != nil {
		m.redo.free()
		m.redo = nil
	}
	return nil
}
