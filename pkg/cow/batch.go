package cow

import (
	"errors"
	"sync"
	"sync/atomic"
)

const (
	// batchBytes is how much data a batch collects: enough that the workers
	// seldom wait for each other, little enough to keep two batches in memory.
	batchBytes = 2 << 20
	batchItems = 4096
	// slotMargin is what packed data may be longer than the data without an
	// allocation. Only gz in version 2 is stored then, and needs 11 bytes.
	slotMargin = 64
)

// item is one op with data, or a run of ops without.
type item struct {
	typ      OpType
	blocks   int
	newBlock uint64
	source   uint64
	data     []byte // as given, later as stored
	slot     []byte // empty, with the capacity for packed data
}

// batch is a number of items whose data is packed together, in the background.
type batch struct {
	items []item
	// given holds the data of the items, slots has room for the packed data.
	given, slots []byte
	next         atomic.Int64 // the item that a worker takes next
	workers      sync.WaitGroup
	errs         []error // by worker
}

func newBatch(o *WriterOptions) *batch {
	b := &batch{given: make([]byte, 0, batchBytes), errs: make([]error, o.Jobs)}
	if o.Compression != None {
		b.slots = make([]byte, 0, batchBytes+batchBytes/BlockSize*slotMargin)
	}
	return b
}

// hasRoom tells whether an item with the data, of at most the largest op's size,
// can be added.
func (b *batch) hasRoom(data []byte) bool {
	return len(b.items) < batchItems && len(b.given)+len(data) <= cap(b.given)
}

func (b *batch) add(it item, data []byte) {
	if data != nil {
		it.data = carve(&b.given, len(data))
		copy(it.data, data)
		if b.slots != nil {
			it.slot = carve(&b.slots, len(data)+slotMargin)[:0]
		}
	}
	b.items = append(b.items, it)
}

// carve takes the next n bytes of the capacity of b.
func carve(b *[]byte, n int) []byte {
	start := len(*b)
	*b = (*b)[:start+n]
	return (*b)[start : start+n : start+n]
}

// start packs the items with as many workers as there are packers.
func (b *batch) start(packers []packer) {
	if len(b.items) == 0 {
		return
	}
	b.next.Store(0)
	for i, p := range packers {
		b.workers.Go(func() { b.errs[i] = b.pack(p) })
	}
}

// pack takes items until none is left.
func (b *batch) pack(p packer) error {
	for {
		i := b.next.Add(1) - 1
		if i >= int64(len(b.items)) {
			return nil
		}
		it := &b.items[i]
		if it.data == nil {
			continue
		}
		stored, err := p.pack(it.slot, it.data)
		if err != nil {
			return err
		}
		if stored != nil {
			it.data = stored
		}
	}
}

// wait waits until all items are packed.
func (b *batch) wait() error {
	b.workers.Wait()
	return errors.Join(b.errs...)
}

func (b *batch) reset() {
	b.items, b.given, b.slots = b.items[:0], b.given[:0], b.slots[:0]
}

// queue adds an item to the batch that is being filled.
func (w *Writer) queue(it item, data []byte) error {
	if !w.filling.hasRoom(data) {
		if err := w.turn(); err != nil {
			return err
		}
	}
	w.filling.add(it, data)
	return nil
}

// turn waits for the batch that is being packed, starts packing the one that was
// being filled, and meanwhile writes out the former, which is filled next.
func (w *Writer) turn() error {
	done := w.packing
	err := done.wait()
	w.packing, w.filling = w.filling, done
	w.packing.start(w.packers)
	if err == nil {
		err = w.emit(done.items)
	}
	done.reset()
	w.err = err
	return err
}

// emit writes items, in order.
func (w *Writer) emit(items []item) error {
	for _, it := range items {
		r := RawOp{Type: it.typ, NewBlock: it.newBlock, Source: it.source, DataLength: len(it.data), Blocks: it.blocks}
		if it.data != nil {
			r.Compression = w.o.Compression
			if err := w.format.put(r, it.data); err != nil {
				return err
			}
			continue
		}
		r.Blocks = 1
		for range it.blocks {
			if err := w.format.put(r, nil); err != nil {
				return err
			}
			r.NewBlock++
			if it.typ == Copy {
				r.Source++
			}
		}
	}
	return nil
}
