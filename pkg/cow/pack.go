package cow

import (
	"bytes"
	"errors"
	"fmt"

	"github.com/klauspost/compress/zlib"
	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"
)

// packer packs the data of one op after another. What it makes of data does not
// depend on what it packed before. One goroutine uses it at a time.
type packer interface {
	// pack returns the packed data, in dst if its capacity suffices, or nil if
	// the data is to be stored raw.
	pack(dst, data []byte) ([]byte, error)
}

func newPacker(o *WriterOptions) (packer, error) {
	level := o.Level
	if level == 0 {
		level = compressions[o.Compression].level
	}
	switch o.Compression {
	case Gz:
		z, err := zlib.NewWriterLevel(nil, level)
		// Versions 1 and 2 have no way to say that the data of a gz op is raw.
		return &gzPacker{z: z, always: o.Version < 3}, err
	case LZ4:
		return &lz4Packer{}, nil
	case Zstd:
		z, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.EncoderLevelFromZstd(level)),
			zstd.WithEncoderConcurrency(1), zstd.WithWindowSize(o.MaxBlock), zstd.WithEncoderCRC(false), zstd.WithLowerEncoderMem(true))
		return zstdPacker{z}, err
	}
	return nil, fmt.Errorf("%s cannot be written", o.Compression)
}

type gzPacker struct {
	z      *zlib.Writer
	always bool
}

func (p *gzPacker) pack(dst, data []byte) ([]byte, error) {
	out := bytes.NewBuffer(dst)
	p.z.Reset(out)
	if _, err := p.z.Write(data); err != nil {
		return nil, err
	}
	if err := p.z.Close(); err != nil {
		return nil, err
	}
	if !p.always && out.Len() >= len(data) {
		return nil, nil
	}
	return out.Bytes(), nil
}

type lz4Packer struct{ c lz4.Compressor }

func (p *lz4Packer) pack(dst, data []byte) ([]byte, error) {
	dst = dst[:len(data)]
	n, err := p.c.CompressBlock(data, dst)
	// Data that would grow is told in two ways: no bytes if nothing in it repeats,
	// an error if something does.
	if errors.Is(err, lz4.ErrInvalidSourceShortBuffer) || err == nil && (n == 0 || n >= len(data)) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return dst[:n], nil
}

type zstdPacker struct{ z *zstd.Encoder }

func (p zstdPacker) pack(dst, data []byte) ([]byte, error) {
	if out := p.z.EncodeAll(data, dst); len(out) < len(data) {
		return out, nil
	}
	return nil, nil
}
