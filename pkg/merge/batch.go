package merge

import (
	"cmp"
	"fmt"
	"slices"
	"sync"

	"github.com/snapmerge/snapmerge/pkg/blockio"
	"github.com/snapmerge/snapmerge/pkg/cow"
)

const (
	// batchBytes bounds the data that one batch of independent ops writes, in
	// bytes.
	batchBytes = 4 << 20
	// zeroBlocks bounds the blocks of a batch that has no data, and batchOps its ops,
	// of which all may be promoted.
	zeroBlocks = 64 << 20 / bs
	batchOps   = 1 << 16
	// batchesAtOnce are those that have memory at a time: one is read, one decoded
	// and one written.
	batchesAtOnce = 3
)

// batch is a run of replace and zero ops made ready for writing. Nothing about
// it has to be durable before it is written: doing it again is harmless, and
// its blocks are read from the COW until it is committed.
type batch struct {
	start, end uint64
	blocks     uint64 // blocks written, zeros included, promoted ones not
	writes     []blockio.Request
	zeros      []extent // of the base
	err        error    // why it could not be made; of the rest only start holds then

	out    []byte // memory of the writes
	ops    []cow.Op
	load   []payload
	stored []byte // memory of what is read from the COW
}

// extent is a range in bytes.
type extent struct{ off, n int64 }

// batcher makes batches in order, reading one while another is decoded and the
// caller writes a third.
type batcher struct {
	m    *Merger
	mem  *blockio.Arena
	free chan *batch
	made chan *batch // ends with one that has an error or no ops

	stop chan struct{}
	wg   sync.WaitGroup
}

// newBatcher begins with the op at start.
func newBatcher(m *Merger, start uint64) (*batcher, error) {
	mem, err := blockio.NewArena(batchesAtOnce * m.batchBytes)
	if err != nil {
		return nil, err
	}
	b := &batcher{m: m, mem: mem, free: make(chan *batch, batchesAtOnce), made: make(chan *batch), stop: make(chan struct{})}
	for out := range slices.Chunk(mem.Bytes()[:batchesAtOnce*m.batchBytes], m.batchBytes) {
		b.free <- &batch{out: out}
	}
	read := make(chan *batch)
	b.wg.Go(func() { b.read(start, read) })
	b.wg.Go(func() { b.decode(read) })
	return b, nil
}

// close may be called at any time.
func (b *batcher) close() {
	close(b.stop)
	b.wg.Wait()
	b.mem.Close()
}

// put gives a batch that is written back.
func (b *batcher) put(t *batch) { b.free <- t }

func (b *batcher) read(start uint64, to chan<- *batch) {
	defer close(to)
	for {
		select {
		case <-b.stop:
			return
		case t := <-b.free:
			if t.err = t.plan(b.m, start); t.err == nil {
				t.err = b.m.loader.read(t.load, &t.stored)
			}
			start = t.end
			last := t.err != nil || t.start == t.end
			select {
			case <-b.stop:
				return
			case to <- t:
			}
			if last {
				return
			}
		}
	}
}

func (b *batcher) decode(from <-chan *batch) {
	for t := range from {
		if t.err == nil {
			t.err = b.m.loader.decode(t.load)
		}
		select {
		case <-b.stop:
			return
		case b.made <- t:
		}
	}
}

// plan makes t the batch of the ops from start on. No ops left: start = end.
func (t *batch) plan(m *Merger, start uint64) error {
	t.start, t.end, t.blocks = start, start, 0
	t.ops, t.load, t.writes, t.zeros = t.ops[:0], t.load[:0], t.writes[:0], t.zeros[:0]
	out, stored := 0, 0
	for t.end < m.cfg.Ops.Len() && t.end < start+batchOps {
		op, err := m.cfg.Ops.At(t.end)
		if err != nil {
			return err
		}
		if op.Type.Ordered() {
			return fmt.Errorf("op %d: %v follows an op that reads no source", t.end, op.Type)
		}
		m.early.take(op, t.end)
		if m.layer.promoted.Load().all(op.NewBlock, uint64(op.Blocks)) {
			t.end++
			continue
		}
		if op.Type == cow.Replace {
			room := (&payload{op: op}).room()
			if out+op.Blocks*bs > m.batchBytes || stored+room > storedBytes {
				break
			}
			out += op.Blocks * bs
			stored += room
		} else if t.blocks >= zeroBlocks {
			break
		}
		t.ops = append(t.ops, op)
		t.blocks += uint64(op.Blocks)
		t.end++
	}
	slices.SortFunc(t.ops, func(x, y cow.Op) int { return cmp.Compare(x.NewBlock, y.NewBlock) })
	t.blocks = 0
	buf := t.out
	for _, op := range t.ops {
		var out []byte // of the op; zeros have none
		if n := op.Blocks * bs; op.Type == cow.Replace {
			t.load = append(t.load, payload{op: op, dst: buf[:n:n]})
			out, buf = buf[:n], buf[n:]
		}
		for b, end := op.NewBlock, op.NewBlock+uint64(op.Blocks); b < end; {
			promoted, n := m.layer.promoted.Load().run(b, end-b)
			if !promoted {
				t.add(b, n, out)
			}
			b += n
			if out != nil {
				out = out[n*bs:]
			}
		}
	}
	return nil
}

// add has n blocks from block on written from buf, whose capacity reaches to the end of
// t.out, or zeroed if there is none.
func (t *batch) add(block, n uint64, buf []byte) {
	t.blocks += n
	off, bytes := int64(block)*bs, int64(n)*bs
	if buf == nil {
		if k := len(t.zeros) - 1; k >= 0 && t.zeros[k].off+t.zeros[k].n == off {
			t.zeros[k].n += bytes
		} else {
			t.zeros = append(t.zeros, extent{off, bytes})
		}
		return
	}
	if k := len(t.writes) - 1; k >= 0 {
		last := t.writes[k].Buf
		// Ends of memory are the same, so this tells that buf follows last.
		if t.writes[k].Off+int64(len(last)) == off && cap(last)-len(last) == cap(buf) && int64(len(last))+bytes <= requestBytes {
			t.writes[k].Buf = last[:int64(len(last))+bytes]
			return
		}
	}
	t.writes = append(t.writes, blockio.Request{Buf: buf[:bytes], Off: off})
}
