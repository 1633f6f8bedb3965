package cow

import (
	"errors"
	"fmt"
	"io"
	"math/bits"
)

// DefaultScratchSize is the size of the scratch in bytes that Android's engine
// expects.
const DefaultScratchSize = 2 << 20

// Sink is where a Writer writes: a file.
type Sink interface {
	io.WriterAt
	// Truncate sets the length in bytes.
	Truncate(size int64) error
	// Flush makes what was written durable.
	Flush() error
}

// WriterOptions says what kind of file to write.
type WriterOptions struct {
	Version int // 2 or 3
	// Compression packs the data; Brotli cannot be written. Level 0 is the
	// algorithm's default.
	Compression Compression
	Level       int
	// ClusterOps is the number of slots of an op table in version 2; 0 puts each
	// op in front of its data. 1024 is what Android writes.
	ClusterOps uint32
	// ScratchSize is the room for read-ahead in bytes: 0 for none, or
	// DefaultScratchSize, without which Android's engine cannot merge ordered
	// ops safely.
	ScratchSize uint32
	// MaxBlock is the uncompressed size of the largest op of version 3 in bytes:
	// 4096, or a power of two up to 262144. 0 is 4096.
	MaxBlock int
	// OpCountMax is the number of ops that a file of version 3 has room for. The
	// table is not enlarged later; slots that stay empty are a hole in the file.
	OpCountMax uint64
	// Sequence is the merge order: the new blocks of the ops that come first. The
	// Writer does not change it. See the package comment for the order without.
	Sequence []uint32
	// NumMergeOps presets the count of ops that are merged already.
	NumMergeOps uint64
	// Jobs is the number of goroutines that pack data; 0 is 1. The file does not
	// depend on it.
	Jobs int
}

// errFinished answers calls on a Writer after Finalize.
var errFinished = errors.New("the copy-on-write file is finished")

// Writer writes a copy-on-write file. One goroutine uses it at a time. What
// makes a file valid as a whole is the caller's business: each block written
// once, ordered ops in an order in which none reads what an earlier one has
// overwritten, ops for all numbers of the sequence. Load checks it.
//
// After an error of the sink, all methods return that error and the file is of
// no use. A call with bad arguments fails alone and writes nothing. Memory is
// bounded, whatever is written. A Writer that is dropped needs no clean-up.
type Writer struct {
	o      WriterOptions
	format format
	err    error // sticky

	// filling takes new ops while packing is packed in the background.
	filling, packing *batch
	packers          []packer // none if data is stored raw
	// sawIndependent is set by the first replace or zero op.
	sawIndependent bool
}

// format lays ops out in the file; one for each version.
type format interface {
	// start writes header and sequence.
	start(sequence []uint32) error
	// put writes one op with its stored data and gives replace ops their source.
	put(r RawOp, data []byte) error
	// label writes a label and makes it durable.
	label(v uint64) error
	// finalize completes the file and makes it durable.
	finalize() error
}

// NewWriter empties the sink and starts a file there.
func NewWriter(s Sink, o WriterOptions) (*Writer, error) {
	o.MaxBlock = max(o.MaxBlock, BlockSize)
	o.Jobs = max(o.Jobs, 1)
	h := Header{
		Major: uint16(o.Version), BlockSize: BlockSize, ClusterOps: o.ClusterOps,
		NumMergeOps: o.NumMergeOps, BufferSize: o.ScratchSize,
	}
	if err := o.check(); err != nil {
		return nil, fmt.Errorf("write a copy-on-write file: %w", err)
	}
	w := &Writer{o: o}
	switch o.Version {
	case 2:
		h.HeaderSize, h.FooterSize, h.OpSize = headerSizeV2, footerSize, opSizeV2
		w.format = newFormatV2(s, h)
	case 3:
		h.HeaderSize, h.OpSize = headerSizeV3, opSizeV3
		h.SequenceCount = uint64(len(o.Sequence))
		h.ResumePointMax, h.OpCountMax = resumePoints, o.OpCountMax
		h.Compression, h.MaxCompressionSize = o.Compression, uint32(o.MaxBlock)
		w.format = newFormatV3(s, h)
	}
	for range o.Jobs {
		if o.Compression == None {
			break
		}
		p, err := newPacker(&o)
		if err != nil {
			return nil, fmt.Errorf("write a copy-on-write file: %w", err)
		}
		w.packers = append(w.packers, p)
	}
	w.filling, w.packing = newBatch(&o), newBatch(&o)
	if err := s.Truncate(0); err != nil {
		return nil, err
	}
	if err := w.format.start(o.Sequence); err != nil {
		return nil, err
	}
	return w, nil
}

func (o *WriterOptions) check() error {
	switch {
	case o.Version != 2 && o.Version != 3:
		return fmt.Errorf("version %d is not 2 or 3", o.Version)
	case o.Compression == Brotli:
		return errors.New("brotli can be read but not written")
	case !o.Compression.known():
		return fmt.Errorf("%s is not known", o.Compression)
	case o.ScratchSize != 0 && o.ScratchSize < minScratch:
		return fmt.Errorf("scratch of %d bytes is smaller than %d", o.ScratchSize, minScratch)
	case o.Version == 2 && o.ClusterOps == 1:
		return errors.New("clusters of 1 op have no room for an op")
	case o.Version == 2 && o.ClusterOps == 0 && len(o.Sequence) > 0:
		return errors.New("version 2 cannot hold a sequence without clusters")
	case o.Version == 2 && o.MaxBlock != BlockSize:
		return fmt.Errorf("version 2 has no ops of %d bytes, only of %d", o.MaxBlock, BlockSize)
	case o.Version == 3 && o.ClusterOps != 0:
		return errors.New("version 3 has no clusters")
	case o.Version == 3 && (bits.OnesCount(uint(o.MaxBlock)) != 1 || o.MaxBlock > BlockSize<<maxFactor):
		return fmt.Errorf("largest op of %d bytes is not 4096 to 262144 and a power of two", o.MaxBlock)
	case o.Version == 3 && o.OpCountMax > maxBlocks:
		return fmt.Errorf("an op table of %d slots is larger than the 2^32 blocks there can be", o.OpCountMax)
	case uint64(len(o.Sequence)) > maxBlocks:
		return fmt.Errorf("a sequence of %d numbers names blocks twice", len(o.Sequence))
	}
	return nil
}

// Copy adds ops that copy n blocks, the block source+i of the source image to
// newBlock+i.
func (w *Writer) Copy(newBlock, source uint64, n int) error {
	return w.add(item{typ: Copy, newBlock: newBlock, source: source, blocks: n}, nil)
}

// Replace adds ops that write data, whole blocks, from newBlock on. In version 3
// they are grouped into ops of up to MaxBlock bytes, the largest power of two
// blocks that is left each time.
func (w *Writer) Replace(newBlock uint64, data []byte) error {
	return w.add(item{typ: Replace, newBlock: newBlock, blocks: len(data) / BlockSize}, data)
}

// Xor adds ops for the blocks from newBlock on. data, whole blocks, is the new
// content xor-ed with the source image from byte sourceByte on.
func (w *Writer) Xor(newBlock, sourceByte uint64, data []byte) error {
	return w.add(item{typ: Xor, newBlock: newBlock, source: sourceByte, blocks: len(data) / BlockSize}, data)
}

// Zero adds ops that zero n blocks.
func (w *Writer) Zero(newBlock uint64, n int) error {
	return w.add(item{typ: Zero, newBlock: newBlock, blocks: n}, nil)
}

// Label makes all ops so far durable under the label v, at which the file can be
// opened if its writing is cut off later. In version 3 labels must ascend, or
// the later ones are dropped, and only the newest four are kept.
func (w *Writer) Label(v uint64) error { return w.complete(func() error { return w.format.label(v) }) }

// Finalize writes out what is left, completes the file and makes it durable. It
// ends the Writer.
func (w *Writer) Finalize() error {
	if err := w.complete(w.format.finalize); err != nil {
		return err
	}
	w.err = errFinished
	return nil
}

// add takes n blocks of one type. data, if any, is copied.
func (w *Writer) add(it item, data []byte) error {
	if w.err != nil {
		return w.err
	}
	if err := w.check(it, data); err != nil {
		return err
	}
	if it.blocks > 0 && !it.typ.Ordered() {
		w.sawIndependent = true
	}
	if data == nil {
		// A run without data is one item.
		return w.queue(it, nil)
	}
	largest := 1
	if it.typ == Replace {
		largest = w.o.MaxBlock / BlockSize
	}
	for left := it.blocks; left > 0; left -= it.blocks {
		it.blocks = min(largest, 1<<(bits.Len(uint(left))-1))
		size := it.blocks * BlockSize
		if err := w.queue(it, data[:size]); err != nil {
			return err
		}
		data = data[size:]
		it.newBlock += uint64(it.blocks)
		if it.typ == Xor {
			it.source += BlockSize
		}
	}
	return nil
}

// check checks the arguments of a call.
func (w *Writer) check(it item, data []byte) error {
	n := uint64(max(it.blocks, 0))
	sourceEnd := it.source + n
	if it.typ == Xor {
		sourceEnd = it.source + n*BlockSize
	}
	switch {
	case it.blocks < 0:
		return fmt.Errorf("%s op of %d blocks", it.typ, it.blocks)
	case len(data)%BlockSize != 0:
		return fmt.Errorf("data of %d bytes for %s ops is not whole blocks", len(data), it.typ)
	case it.newBlock > maxBlocks || n > maxBlocks-it.newBlock:
		return fmt.Errorf("%s ops of %d blocks from block %d on: block numbers have 32 bits", it.typ, n, it.newBlock)
	case it.source > maxSource || sourceEnd > maxSource:
		return fmt.Errorf("%s ops of %d blocks from source %d on: sources have 48 bits", it.typ, n, it.source)
	case w.o.Version == 3 && len(w.o.Sequence) == 0 && it.typ.Ordered() && w.sawIndependent:
		return fmt.Errorf("%s op of block %d after a replace or zero op: version 3 without a sequence merges in this order", it.typ, it.newBlock)
	}
	return nil
}

// complete writes out all ops and then does what is left to do.
func (w *Writer) complete(then func() error) error {
	if w.err != nil {
		return w.err
	}
	// The first turn sends off what is being filled, the second waits for it.
	for range 2 {
		if err := w.turn(); err != nil {
			return err
		}
	}
	w.err = then()
	return w.err
}
