package merge

import (
	"io"

	"github.com/snapmerge/snapmerge/pkg/blockio"
	"github.com/snapmerge/snapmerge/pkg/cow"
)

// gathering is what a read of a layer has to read below it. Neighbours are joined, and
// all is read at the same time: sources may lie anywhere, and each by itself would be a
// wait for the disk.
type gathering struct {
	below   io.ReaderAt
	last    blockio.Request // its capacity reaches to the end of the layer's read
	earlier []blockio.Request
	xors    []xorPiece
}

// xorPiece is a part of an xor op: p, once its source was read there, is to be combined
// with the payload from byte skip on.
type xorPiece struct {
	op   cow.Op
	pos  uint64
	p    []byte
	skip int64
}

// add has p be read at off. p continues the layer's read where the last piece ended or
// starts anew.
func (g *gathering) add(p []byte, off int64) {
	last := &g.last
	n := len(last.Buf)
	if n > 0 && off == last.Off+int64(n) && cap(last.Buf) >= n+len(p) && &last.Buf[:n+1][n] == &p[0] {
		last.Buf = last.Buf[:n+len(p)]
		return
	}
	if n > 0 {
		g.earlier = append(g.earlier, *last)
	}
	*last = blockio.Request{Buf: p, Off: off}
}

// finish reads what was gathered.
func (l *Layer) finish(g *gathering) error {
	var err error
	switch {
	case len(g.earlier) > 0:
		err = blockio.ReadBatch(g.below, append(g.earlier, g.last))
	case len(g.last.Buf) > 0:
		err = blockio.ReadFull(g.below, g.last.Buf, g.last.Off)
	}
	if err != nil {
		return err
	}
	for _, x := range g.xors {
		if err := l.readers.xor(x.op, x.pos, x.p, x.skip); err != nil {
			return err
		}
	}
	return nil
}
