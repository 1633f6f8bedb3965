package merge

import (
	"fmt"
	"io"
	"sync"
	"sync/atomic"

	"github.com/snapmerge/snapmerge/pkg/blockio"
	"github.com/snapmerge/snapmerge/pkg/cow"
)

// state is what readers of a Layer go by. A published state never changes.
type state struct {
	// committed ops are durably in the base: they are read there.
	committed uint64
	// window, if not nil, is in progress: its blocks are read from its buffer.
	window *window
}

// inWindow tells whether the op at pos is in the window in progress.
func (s *state) inWindow(pos uint64) bool {
	return s.window != nil && pos >= s.window.start && pos < s.window.end
}

// Layer is a COW above what lies below it, at any point of its merge. A block
// that an op writes is, in the words of spec merge-engine 5,
//
//	COMPLETED                op committed, or the block promoted: below, at the
//	                         same place
//	RA_READY, IN_PROGRESS    op in the published window: its buffer
//	PENDING                  else: below at the op's source, or the COW's data
//
// Readers stay inside the Epoch that the Merger was given: publishing a window
// drains those that may still read its sources.
type Layer struct {
	ops     cow.Ops
	state   atomic.Pointer[state]
	readers payloadReaders
	sources atomic.Pointer[bitmap]
	// promoted are the chunks in which what independent ops write is durably in the
	// base, committed or not; nil: none.
	promoted atomic.Pointer[chunkSet]
}

func newLayer(ops cow.Ops, data io.ReaderAt, st *state) *Layer {
	l := &Layer{ops: ops, readers: payloadReaders{data: data}}
	l.state.Store(st)
	return l
}

// NewLayer is a COW that is not being merged: the upper one of two, or one that
// is only read. seed, if not nil, is progress that it records itself: the ops it
// says are in what lies below, and the window in its scratch space.
func NewLayer(ops cow.Ops, data io.ReaderAt, seed *Seed) (*Layer, error) {
	st := &state{}
	if seed != nil {
		st.committed = seed.Committed
		if n := len(seed.Window); n > 0 {
			w, err := planRange(ops, seed.Committed, seed.Committed+uint64(n))
			if err != nil {
				return nil, err
			}
			w.data = make([]byte, n*bs)
			for _, b := range seed.Window {
				copy(w.block(b.Block), b.Data)
			}
			st.window = w
		}
	}
	return newLayer(ops, data, st), nil
}

// Committed is the number of ops, in merge order, that are durably in the base.
func (l *Layer) Committed() uint64 { return l.state.Load().committed }

// Ops are the ops of the layer.
func (l *Layer) Ops() cow.Ops { return l.ops }

// ReadAt reads the layer's view over below, len(p) bytes at off; both are
// multiples of the sector size. The caller is inside a stay of the Epoch.
func (l *Layer) ReadAt(below io.ReaderAt, p []byte, off int64) error {
	g := gathering{below: below}
	if err := l.gather(&g, p, off); err != nil {
		return err
	}
	return l.finish(&g)
}

// ReadBatch is ReadAt for several places at the same time.
func (l *Layer) ReadBatch(below io.ReaderAt, batch []blockio.Request) error {
	g := gathering{below: below}
	for _, q := range batch {
		if err := l.gather(&g, q.Buf, q.Off); err != nil {
			return err
		}
	}
	return l.finish(&g)
}

// gather reads len(p) bytes at off, all but what lies below: g gathers that.
func (l *Layer) gather(g *gathering, p []byte, off int64) error {
	st := l.state.Load()
	for len(p) > 0 {
		block := uint64(off / bs)
		op, pos, ok, err := l.ops.Next(block)
		if err != nil {
			return err
		}
		n := int64(len(p))
		if !ok || op.NewBlock > block {
			if ok {
				n = min(n, int64(op.NewBlock)*bs-off)
			}
			g.add(p[:n], off)
		} else {
			skip := off - int64(op.NewBlock)*bs
			n = min(n, int64(op.Blocks)*bs-skip)
			promoted, same := l.promotedRun(st, op, pos, block, uint64((off+n+bs-1)/bs)-block)
			if n = min(n, int64(block+same)*bs-off); promoted {
				g.add(p[:n], off)
			} else {
				err = l.readOp(st, g, op, pos, p[:n], skip)
			}
		}
		if err != nil {
			return err
		}
		p, off = p[n:], off+n
	}
	return nil
}

// readOp reads len(p) bytes of what op writes, from byte skip of it, all but what lies
// below: g gathers that.
func (l *Layer) readOp(st *state, g *gathering, op cow.Op, pos uint64, p []byte, skip int64) error {
	switch w := st.window; {
	case pos < st.committed:
		g.add(p, int64(op.NewBlock)*bs+skip)
		return nil
	case st.inWindow(pos):
		b := w.block(op.NewBlock)
		if b == nil && w.clones(op.NewBlock) {
			g.add(p, int64(op.Source)*bs+skip)
			return nil
		}
		if b == nil {
			return fmt.Errorf("block %d is missing in the window of ops %d to %d", op.NewBlock, w.start, w.end)
		}
		copy(p, b[skip:])
		return nil
	}
	switch op.Type {
	case cow.Copy:
		g.add(p, int64(op.Source)*bs+skip)
		return nil
	case cow.Zero:
		clear(p)
		return nil
	case cow.Xor:
		g.add(p, int64(op.Source)+skip)
		g.xors = append(g.xors, xorPiece{op, pos, p, skip})
		return nil
	default:
		return l.readers.read(op, pos, p, skip)
	}
}

// promotedRun tells whether what the op at pos writes to the block is in the base
// though the op is not committed, and for how many of the n blocks from there on the
// answer is the same.
func (l *Layer) promotedRun(st *state, op cow.Op, pos, block, n uint64) (promoted bool, same uint64) {
	if pos < st.committed || op.Type.Ordered() {
		return false, n
	}
	return l.promoted.Load().run(block, n)
}

// Promoted tells whether ops have been promoted that write to one of the chunks of
// the n blocks from first on, n > 0; see Merger.Promote. What Load has returned of
// these blocks is not right any more then.
func (l *Layer) Promoted(first, n uint64) bool { return l.promoted.Load().any(first, n) }

// Settled tells whether the base may be written directly at n blocks from
// first as far as this layer goes (design, rule 2): no op that writes them, and
// no ordered op that reads them, lacks a durable commit or, the former, promotion.
func (l *Layer) Settled(first, n uint64) (bool, error) {
	committed := l.Committed()
	if committed < l.ops.Ordered() {
		// Until the last ordered op is committed every block that any of them
		// reads counts, and as long as those are not known, every block.
		src := l.sources.Load()
		if src == nil || src.any(first, n) {
			return false, nil
		}
	}
	for b := first; b < first+n; {
		op, pos, ok, err := l.ops.Next(b)
		if err != nil {
			return false, err
		}
		if !ok || op.NewBlock >= first+n {
			return true, nil
		}
		b = max(b, op.NewBlock)
		end := op.NewBlock + uint64(op.Blocks)
		if pos >= committed && (op.Type.Ordered() || !l.promoted.Load().all(b, min(end, first+n)-b)) {
			return false, nil
		}
		b = end
	}
	return true, nil
}

// FindSources walks the ordered ops and notes the blocks they read, one bit a
// block of the base. Settled is needlessly strict until it has run.
func (l *Layer) FindSources() error {
	if l.sources.Load() != nil {
		return nil
	}
	_, bytes := l.ops.Bounds()
	src := newBitmap(bytes/bs + 1)
	for pos := l.Committed(); pos < l.ops.Ordered(); pos++ {
		op, err := l.ops.At(pos)
		if err != nil {
			return err
		}
		first, n := op.SourceBlocks()
		for i := range uint64(n) {
			src.set(first + i)
		}
	}
	l.sources.Store(&src)
	return nil
}

// payloadReaders decode payload for concurrent readers. Each keeps the op it
// decoded last, so that a sequential reader of small requests decodes a large
// op once.
type payloadReaders struct {
	data io.ReaderAt
	mu   sync.Mutex
	idle []*payloadReader // the one used last is last
	made int              // idle and in use
}

type payloadReader struct {
	dec   *cow.Decoder
	pos   uint64
	valid bool
	buf   []byte
}

// maxIdle bounds what a layer at rest keeps in memory.
const maxIdle = 4

// take returns a reader, the one that holds the decoded payload of the op at pos
// if there is one.
func (r *payloadReaders) take(pos uint64) *payloadReader {
	r.mu.Lock()
	defer r.mu.Unlock()
	for i, p := range r.idle {
		if p.valid && p.pos == pos {
			r.idle = append(r.idle[:i], r.idle[i+1:]...)
			return p
		}
	}
	if r.made >= maxIdle && len(r.idle) > 0 {
		p := r.idle[0]
		r.idle = append(r.idle[:0], r.idle[1:]...)
		return p
	}
	r.made++
	return &payloadReader{dec: cow.NewDecoder(r.data)}
}

// get returns a reader that holds the decoded payload of op.
func (r *payloadReaders) get(op cow.Op, pos uint64) (*payloadReader, error) {
	p := r.take(pos)
	if p.valid && p.pos == pos {
		return p, nil
	}
	n := op.Blocks * bs
	if cap(p.buf) < n {
		p.buf = make([]byte, n)
	}
	p.buf, p.pos, p.valid = p.buf[:n], pos, false
	if err := p.dec.Decode(op, p.buf); err != nil {
		r.put(p)
		return nil, err
	}
	p.valid = true
	return p, nil
}

func (r *payloadReaders) put(p *payloadReader) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.idle) < maxIdle {
		r.idle = append(r.idle, p)
	} else {
		r.made--
	}
}

func (r *payloadReaders) read(op cow.Op, pos uint64, dst []byte, skip int64) error {
	if len(dst) == op.Blocks*bs {
		return r.whole(op, pos, dst)
	}
	p, err := r.get(op, pos)
	if err != nil {
		return err
	}
	copy(dst, p.buf[skip:])
	r.put(p)
	return nil
}

// whole reads all of an op: who does that does not come back for the rest, so it
// is decoded to where it has to go.
func (r *payloadReaders) whole(op cow.Op, pos uint64, dst []byte) error {
	p := r.take(pos)
	defer r.put(p)
	if p.valid && p.pos == pos {
		copy(dst, p.buf)
		return nil
	}
	return p.dec.Decode(op, dst)
}

func (r *payloadReaders) xor(op cow.Op, pos uint64, dst []byte, skip int64) error {
	p, err := r.get(op, pos)
	if err != nil {
		return err
	}
	xorBytes(dst, p.buf[skip:skip+int64(len(dst))])
	r.put(p)
	return nil
}
