package merge

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/snapmerge/snapmerge/pkg/blockio"
	"github.com/snapmerge/snapmerge/pkg/cow"
)

const (
	// batchBytes bounds the data that one batch of independent ops writes, in
	// bytes.
	batchBytes = 4 << 20
	// zeroBlocks bounds the blocks of a batch that has no data.
	zeroBlocks = 64 << 20 / bs
)

// batch is a run of replace and zero ops made ready for writing. Nothing about
// it has to be durable before it is written: doing it again is harmless, and
// its blocks are read from the COW until it is committed.
type batch struct {
	start, end uint64
	blocks     uint64 // blocks written, zeros included
	writes     []blockio.Request
	zeros      []extent // of the base
}

// extent is a range in bytes.
type extent struct{ off, n int64 }

// batcher makes batches one after the other. Its buffers come in two halves, so
// that one batch can be written while the next is made.
type batcher struct {
	m    *Merger
	out  *blockio.Arena
	half int
	ops  []cow.Op
}

func newBatcher(m *Merger) (*batcher, error) {
	out, err := blockio.NewArena(2 * m.batchBytes)
	if err != nil {
		return nil, err
	}
	return &batcher{m: m, out: out}, nil
}

func (b *batcher) close() { b.out.Close() }

// make prepares the ops from start on. No ops left: a batch with start = end.
func (b *batcher) make(start uint64) (batch, error) {
	t := batch{start: start, end: start}
	b.ops = b.ops[:0]
	out, stored := 0, 0
	for t.end < b.m.cfg.Ops.Len() {
		op, err := b.m.cfg.Ops.At(t.end)
		if err != nil {
			return t, err
		}
		if op.Type.Ordered() {
			return t, fmt.Errorf("op %d: %v follows an op that reads no source", t.end, op.Type)
		}
		if op.Type == cow.Replace {
			room := (&payload{op: op}).room()
			if out+op.Blocks*bs > b.m.batchBytes || stored+room > storedBytes {
				break
			}
			out += op.Blocks * bs
			stored += room
		} else if t.blocks >= zeroBlocks {
			break
		}
		b.ops = append(b.ops, op)
		t.blocks += uint64(op.Blocks)
		t.end++
	}
	slices.SortFunc(b.ops, func(x, y cow.Op) int { return cmp.Compare(x.NewBlock, y.NewBlock) })

	n := b.m.batchBytes
	buf := b.out.Bytes()[b.half*n : (b.half+1)*n]
	b.half ^= 1
	var load []payload
	for _, op := range b.ops {
		off, n := int64(op.NewBlock)*bs, op.Blocks*bs
		if op.Type == cow.Zero {
			if k := len(t.zeros) - 1; k >= 0 && t.zeros[k].off+t.zeros[k].n == off {
				t.zeros[k].n += int64(n)
			} else {
				t.zeros = append(t.zeros, extent{off, int64(n)})
			}
			continue
		}
		load = append(load, payload{op: op, dst: buf[:n:n]})
		if k := len(t.writes) - 1; k >= 0 && t.writes[k].Off+int64(len(t.writes[k].Buf)) == off && len(t.writes[k].Buf)+n <= requestBytes {
			t.writes[k].Buf = t.writes[k].Buf[:len(t.writes[k].Buf)+n]
		} else {
			t.writes = append(t.writes, blockio.Request{Buf: buf[:n], Off: off})
		}
		buf = buf[n:]
	}
	return t, b.m.loader.load(load)
}

// runIndependent merges what follows the ordered ops. Commits come by bytes and
// time; reads of an uncommitted op are served from the COW.
func (m *Merger) runIndependent(ctx context.Context) error {
	q, err := blockio.NewQueue(m.cfg.IO, queueDepth)
	if err != nil {
		return err
	}
	defer q.Close()
	b, err := newBatcher(m)
	if err != nil {
		return err
	}
	defer b.close()
	q.Register(b.out)
	defer m.addCounts()

	type made struct {
		t   batch
		err error
	}
	next := make(chan made, 1)
	prepare := func(start uint64) {
		t, err := b.make(start)
		next <- made{t, err}
	}
	pos, bytes, last := m.layer.Committed(), uint64(0), time.Now()
	if m.redo != nil { // what the ordered ops have left, all of it written
		pos, bytes = m.redo.end, uint64(len(m.redo.ops))*bs
	}
	go prepare(pos)
	for {
		n := <-next
		if n.err == nil && n.t.start == n.t.end { // the end
			return m.commitIndependent(pos, bytes)
		}
		err := n.err
		if err == nil {
			err = ctx.Err()
		}
		if err == nil {
			go prepare(n.t.end)
			if err = m.writeBatch(ctx, q, n.t); err != nil {
				<-next
			}
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
		pos, bytes = n.t.end, bytes+n.t.blocks*bs
		if bytes >= m.commitBytes || time.Since(last) >= commitTime {
			if err := m.commitIndependent(pos, bytes); err != nil {
				<-next
				return err
			}
			bytes, last = 0, time.Now()
		}
	}
}

func (m *Merger) writeBatch(ctx context.Context, q blockio.Queue, t batch) error {
	if len(t.zeros) > 0 {
		if err := m.pace(ctx, min(len(t.zeros)*bs, paceBytes)); err != nil {
			return err
		}
	}
	for _, z := range t.zeros {
		if err := m.cfg.Base.Zero(z.off, z.n); err != nil {
			return fmt.Errorf("zeroing of the base: %w", err)
		}
		m.counters.BlocksWritten.Add(uint64(z.n) / bs)
	}
	return m.writeBase(ctx, q, t.writes)
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
