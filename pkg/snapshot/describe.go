package snapshot

import (
	"context"
	"fmt"
	"hash/crc32"

	"github.com/snapmerge/snapmerge/pkg/blockio"
	"github.com/snapmerge/snapmerge/pkg/cow"
)

// describer writes index and sums of a finished COW. It reads the file once,
// from its first byte to its last, so what it writes is about what lies there.
type describer struct {
	f     blockio.File // version 3, sorted by block, with replace and zero ops alone
	index *indexWriter
	sums  *sumsWriter
	pace  func(ctx context.Context, bytes int) error

	at  int64 // read and summed so far
	buf []byte
}

// describe writes the index and the sums of the COW f.
func describe(ctx context.Context, f, index, sums blockio.File, pace func(context.Context, int) error) (Info, error) {
	c, err := cow.Open(f, f.Size(), cow.OpenOptions{})
	if err != nil {
		return Info{}, err
	}
	identity, err := c.Identity()
	if err != nil {
		return Info{}, err
	}
	header, err := storedHeader(f, c.Header())
	if err != nil {
		return Info{}, err
	}
	d := describer{
		f: f, index: newIndexWriter(index), sums: newSumsWriter(sums), pace: pace,
		buf: make([]byte, maxStored),
	}
	if err := c.Walk(func(r cow.RawOp) error { return d.add(ctx, r) }); err != nil {
		return Info{}, err
	}
	if err := d.readTo(ctx, identity.Length); err != nil {
		return Info{}, err
	}
	root := &d.index.root
	if !root.blockOrder || root.ordered != 0 {
		return Info{}, fmt.Errorf("%s has other ops than a full snapshot", f.Name())
	}
	if err := d.index.finish(ctx, identity, header, nil); err != nil {
		return Info{}, err
	}
	if err := d.sums.finish(identity, c.Header().NumMergeOps); err != nil {
		return Info{}, err
	}
	return Info{
		Length: identity.Length, CRC: identity.CRC,
		Ops: root.ops, Blocks: root.blocks, Compression: c.Header().Compression.String(),
	}, nil
}

func (d *describer) add(ctx context.Context, r cow.RawOp) error {
	op := cow.Op{Type: r.Type, NewBlock: r.NewBlock, Blocks: r.Blocks, DataOffset: r.DataOffset, DataLength: r.DataLength}
	if r.Type == cow.Replace {
		if r.DataLength < r.Blocks*cow.BlockSize { // else stored raw
			op.Compression = r.Compression
		}
		if err := d.readTo(ctx, r.DataOffset); err != nil {
			return err
		}
		data := d.buf[:r.DataLength]
		if err := d.read(ctx, data); err != nil {
			return err
		}
		op.Checksum = crc32.Checksum(data, castagnoli)
	}
	return d.index.add(op, uint32(d.index.root.ops))
}

// readTo reads up to end what belongs to no op: the header, the op table and its
// empty slots.
func (d *describer) readTo(ctx context.Context, end int64) error {
	for d.at < end {
		if err := d.read(ctx, d.buf[:min(end-d.at, int64(len(d.buf)))]); err != nil {
			return err
		}
	}
	return nil
}

// read fills p with what comes next and sums it.
func (d *describer) read(ctx context.Context, p []byte) error {
	if err := d.pace(ctx, len(p)); err != nil {
		return err
	}
	if err := readFull(d.f, p, d.at); err != nil {
		return fmt.Errorf("%s: %w", d.f.Name(), err)
	}
	d.at += int64(len(p))
	return d.sums.add(p)
}
