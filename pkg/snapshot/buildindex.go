package snapshot

import (
	"context"
	"crypto/sha256"
	"fmt"
	"hash"
	"hash/crc32"
	"strings"

	"github.com/snapmerge/snapmerge/pkg/blockio"
	"github.com/snapmerge/snapmerge/pkg/cow"
)

const cowSuffix = ".cow"

// IndexPath is the name of the index of a COW.
func IndexPath(cowPath string) string { return strings.TrimSuffix(cowPath, cowSuffix) + ".idx" }

// SumsPath is the name of the sums of a COW.
func SumsPath(cowPath string) string { return strings.TrimSuffix(cowPath, cowSuffix) + ".sum" }

// BuildIndex makes the index of a COW, in place of one that is there. It checks
// all of the COW but the packed data, and reads that once to sum it. The COW must
// not be written meanwhile.
func BuildIndex(ctx context.Context, fsys blockio.FS, cowPath string) error {
	f, err := fsys.Open(cowPath, blockio.ReadOnly)
	if err != nil {
		return err
	}
	defer f.Close()
	c, err := cow.Open(f, f.Size(), cow.OpenOptions{})
	if err != nil {
		return fmt.Errorf("%s: %w", cowPath, err)
	}
	t, err := c.Load()
	if err != nil {
		return fmt.Errorf("%s: %w", cowPath, err)
	}
	header, err := storedHeader(f, c.Header())
	if err != nil {
		return fmt.Errorf("%s: %w", cowPath, err)
	}
	err = makeFile(fsys, IndexPath(cowPath), func(out blockio.File) error {
		w := newIndexWriter(out)
		if err := addAll(ctx, w, t, f); err != nil {
			return err
		}
		return w.finish(ctx, t.Identity(), header, t)
	})
	if err != nil {
		return fmt.Errorf("index of %s: %w", cowPath, err)
	}
	return nil
}

// storedHeader reads the header of a COW as it is stored.
func storedHeader(f blockio.File, h cow.Header) ([]byte, error) {
	b := make([]byte, h.HeaderSize)
	return b, readFull(f, b, 0)
}

// addAll adds all ops of t, whose data lies in f, by block.
func addAll(ctx context.Context, w *indexWriter, t *cow.Table, f blockio.File) error {
	stored := make([]byte, maxStored)
	for block := uint64(0); ; {
		op, pos, ok, err := t.Next(block)
		if err != nil {
			return err
		}
		if !ok {
			return nil
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		if op.Type == cow.Replace || op.Type == cow.Xor {
			data := stored[:op.DataLength]
			if err := readFull(f, data, op.DataOffset); err != nil {
				return err
			}
			op.Checksum = crc32.Checksum(data, castagnoli)
		}
		if err := w.add(op, uint32(pos)); err != nil {
			return err
		}
		block = op.NewBlock + uint64(op.Blocks)
	}
}

// indexWriter writes an index. Its memory does not grow with the ops.
type indexWriter struct {
	f     blockio.File
	pages *pageWriter
	root  indexRoot // blockOrder holds for what was added so far
	hash  hash.Hash
}

func newIndexWriter(f blockio.File) *indexWriter {
	return &indexWriter{
		f:     f,
		pages: newPageWriter(f, entryPagesFrom),
		root:  indexRoot{blockOrder: true},
		hash:  sha256.New(),
	}
}

// add adds an op at a position of the merge order. Ops come sorted by block and
// with the checksum of their data.
func (w *indexWriter) add(op cow.Op, pos uint32) error {
	r := &w.root
	if op.NewBlock < r.targetEnd {
		return fmt.Errorf("op of block %d is indexed after one of block %d", op.NewBlock, r.targetEnd-1)
	}
	if uint64(pos) != r.ops {
		r.blockOrder = false
	}
	r.ops++
	r.blocks += uint64(op.Blocks)
	r.targetEnd = op.NewBlock + uint64(op.Blocks)
	if op.Type.Ordered() {
		r.ordered++
	}
	switch op.Type {
	case cow.Copy:
		r.sourceEnd = max(r.sourceEnd, (op.Source+1)*cow.BlockSize)
	case cow.Xor:
		r.sourceEnd = max(r.sourceEnd, op.Source+cow.BlockSize)
	}
	var b [entrySize]byte
	e := entry{op: op, pos: pos}
	e.encode(&b)
	w.hash.Write(b[:])
	return w.pages.add(b[:])
}

// finish writes the rest once all ops are there; identity and header are those of
// the finished COW, ops the same ops in merge order.
func (w *indexWriter) finish(ctx context.Context, identity cow.Identity, header []byte, ops cow.Ops) error {
	w.root.identity, w.root.header = identity, headerSum(header)
	if err := w.pages.finish(); err != nil {
		return err
	}
	if err := w.writeTree(); err != nil {
		return err
	}
	if !w.root.blockOrder {
		if err := w.writeOrder(ctx, ops); err != nil {
			return err
		}
	}
	copy(w.root.id[:], w.hash.Sum(nil))
	_, err := w.f.WriteAt(w.root.encode(), 0)
	return err
}

// writeTree writes the levels of the tree, each from the pages of the one below.
func (w *indexWriter) writeTree() error {
	var first [numberSize]byte
	levels := w.root.layout().levels
	for _, below := range levels[:len(levels)-1] {
		for n := range below.n {
			if err := readFull(w.f, first[:], (below.first+n)*pageSize); err != nil {
				return err
			}
			if err := w.pages.add(first[:]); err != nil {
				return err
			}
		}
		if err := w.pages.finish(); err != nil {
			return err
		}
	}
	return nil
}

// writeOrder writes the order pages. The number of each entry is found with the
// very index that is being made, which has all that is needed for it by now.
func (w *indexWriter) writeOrder(ctx context.Context, ops cow.Ops) error {
	x := newIndex(pagedFile{w.f, ErrIndex}, w.root, nil)
	for pos := range w.root.ops {
		if err := ctx.Err(); err != nil {
			return err
		}
		op, err := ops.At(pos)
		if err != nil {
			return err
		}
		n, err := x.search(op.NewBlock)
		if err != nil {
			return err
		}
		var b [numberSize]byte
		le.PutUint32(b[:], uint32(n))
		w.hash.Write(b[:])
		if err := w.pages.add(b[:]); err != nil {
			return err
		}
	}
	return w.pages.finish()
}
