package cow

import (
	"bytes"
	"errors"
	"fmt"
	"hash/crc32"
	"io"

	"github.com/andybalholm/brotli"
	"github.com/klauspost/compress/zlib"
	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"
)

var (
	errShort    = errors.New("the stream ends early")
	errLong     = errors.New("the stream goes on")
	errTrailing = errors.New("bytes follow the stream")
)

// Decoder reads and unpacks the data of ops. It keeps its buffers and codecs, so
// that a call allocates nothing once each algorithm in use has been seen (but
// for some dozen bytes in the brotli library). One goroutine uses it at a time.
type Decoder struct {
	r      io.ReaderAt
	stored []byte // buffer for packed data
	packed bytes.Reader
	extra  [1]byte

	zlib   io.ReadCloser // a zlib.Resetter
	brotli *brotli.Reader
	zstd   *zstd.Decoder
}

// NewDecoder returns a Decoder that reads the file through r. r may be nil if
// only DecodeBytes is used.
func NewDecoder(r io.ReaderAt) *Decoder { return &Decoder{r: r} }

// Decode fills dst, of op.Blocks × BlockSize bytes, with what op stores: the new
// content of its blocks for Replace, zeros for Zero, and for Xor what is still
// to be xor-ed with the source. A Copy stores nothing. Data that does not unpack
// to just that length, or does not have the checksum that op carries, is a
// *FormatError; then the content of dst is undefined.
func (d *Decoder) Decode(op Op, dst []byte) error {
	if op.Type == Zero {
		return d.DecodeBytes(op, nil, dst)
	}
	stored := dst
	if op.Compression != None {
		if cap(d.stored) < op.DataLength {
			d.stored = make([]byte, op.DataLength)
		}
		stored = d.stored[:op.DataLength]
	}
	if err := checkLengths(op, len(stored), len(dst)); err != nil {
		return err
	}
	if err := readAt(d.r, stored, op.DataOffset); err != nil {
		return err
	}
	return d.DecodeBytes(op, stored, dst)
}

// DecodeBytes is Decode for a caller that has read the op.DataLength stored
// bytes itself. stored and dst may be the same slice if the data is not packed,
// but must not overlap otherwise.
func (d *Decoder) DecodeBytes(op Op, stored, dst []byte) error {
	if err := checkLengths(op, len(stored), len(dst)); err != nil {
		return err
	}
	if op.Type == Zero {
		clear(dst)
		return nil
	}
	if op.HasChecksum {
		if sum := crc32.Checksum(stored, castagnoli); sum != op.Checksum {
			return badFormat(op.DataOffset, "data of the %s op of block %d has checksum %08x, not %08x", op.Type, op.NewBlock, sum, op.Checksum)
		}
	}
	if err := d.unpack(op.Compression, stored, dst); err != nil {
		return badFormat(op.DataOffset, "data of the %s op of block %d is not %d bytes packed with %s: %v",
			op.Type, op.NewBlock, len(dst), op.Compression, err)
	}
	return nil
}

// checkLengths guards against callers that mix up ops and buffers.
func checkLengths(op Op, stored, dst int) error {
	if dst != op.Blocks*BlockSize || (op.Type != Zero && stored != op.DataLength) {
		return fmt.Errorf("decode %d bytes of a %s op of %d blocks and %d stored bytes into %d bytes", stored, op.Type, op.Blocks, op.DataLength, dst)
	}
	if op.Type != Zero && op.Type != Replace && op.Type != Xor {
		return fmt.Errorf("decode a %s op, which stores nothing", op.Type)
	}
	return nil
}

func (d *Decoder) unpack(c Compression, stored, dst []byte) error {
	switch c {
	case None:
		copy(dst, stored)
		return nil
	case Gz:
		return d.unpackGz(stored, dst)
	case Brotli:
		return d.unpackBrotli(stored, dst)
	case LZ4:
		n, err := lz4.UncompressBlock(stored, dst)
		if err == nil && n < len(dst) {
			err = errShort
		}
		return err
	case Zstd:
		return d.unpackZstd(stored, dst)
	}
	return fmt.Errorf("%s is not known", c)
}

func (d *Decoder) unpackGz(stored, dst []byte) error {
	d.packed.Reset(stored)
	var err error
	if d.zlib == nil {
		d.zlib, err = zlib.NewReader(&d.packed)
	} else {
		err = d.zlib.(zlib.Resetter).Reset(&d.packed, nil)
	}
	if err != nil {
		return err
	}
	return d.drain(d.zlib, dst)
}

func (d *Decoder) unpackBrotli(stored, dst []byte) error {
	d.packed.Reset(stored)
	if d.brotli == nil {
		d.brotli = brotli.NewReader(&d.packed)
	} else if err := d.brotli.Reset(&d.packed); err != nil {
		return err
	}
	return d.drain(d.brotli, dst)
}

func (d *Decoder) unpackZstd(stored, dst []byte) error {
	if d.zstd == nil {
		// Without a reader the decoder has no goroutines, so it needs no Close.
		z, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecodeAllCapLimit(true))
		if err != nil {
			return err
		}
		d.zstd = z
	}
	out, err := d.zstd.DecodeAll(stored, dst[:0:len(dst)])
	if err == nil && len(out) < len(dst) {
		err = errShort
	}
	return err
}

// drain fills dst from a stream over d.packed and checks that stream and packed
// data end there.
func (d *Decoder) drain(stream io.Reader, dst []byte) error {
	if _, err := io.ReadFull(stream, dst); err != nil {
		if err == io.EOF || err == io.ErrUnexpectedEOF {
			err = errShort
		}
		return err
	}
	// The first read past the end may still have to find the end.
	for {
		n, err := stream.Read(d.extra[:])
		switch {
		case n > 0:
			return errLong
		case err == io.EOF && d.packed.Len() > 0:
			return errTrailing
		case err == io.EOF:
			return nil
		case err != nil:
			return err
		}
	}
}
