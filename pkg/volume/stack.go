package volume

import (
	"errors"
	"io"
	"sync/atomic"

	"github.com/snapmerge/snapmerge/pkg/blockio"
	"github.com/snapmerge/snapmerge/pkg/cow"
	"github.com/snapmerge/snapmerge/pkg/merge"
	"github.com/snapmerge/snapmerge/pkg/readahead"
	"github.com/snapmerge/snapmerge/pkg/snapshot"
	"github.com/snapmerge/snapmerge/pkg/volume/writelog"
)

// layer is one COW or one write log of a volume.
type layer struct {
	id   uint64
	file string // as in the record

	// A COW: the lowest one is merged, others wait.
	cow    *snapshot.COW
	view   *merge.Layer
	merger *merge.Merger     // of the lowest layer, else nil
	ahead  *readahead.Handle // nil: nothing is read ahead

	log *writelog.Log
}

func (l *layer) close() error {
	if l.ahead != nil {
		l.ahead.Close() // before what it reads
	}
	if l.merger != nil {
		l.merger.Close()
	}
	if l.cow != nil {
		return l.cow.Close()
	}
	return l.log.Close()
}

// cowError is damage of a COW, and where it lies.
type cowError struct {
	file string
	err  error
}

func (e *cowError) Error() string { return e.file + ": " + e.err.Error() }
func (e *cowError) Unwrap() error { return e.err }

// named adds the layer's file to an error that names an offset in it, unless that is
// one of a COW below, which is named already.
func (l *layer) named(err error) error {
	var format *cow.FormatError
	var already *cowError
	if l.cow == nil || !errors.As(err, &format) || errors.As(err, &already) {
		return err
	}
	return &cowError{l.cow.File.Name(), err}
}

// stack is what readers and writers of a volume go by. A published stack never
// changes; what changes inside its layers is their own affair.
type stack struct {
	layers []*layer // the lowest first
	// views[i] reads what the layers below number i show; views[0] is the base
	// and the last one the whole volume.
	views []io.ReaderAt
	// plain are the same without read-ahead: for what is read ahead itself, and for
	// encoders, which would crowd the guest out.
	plain []io.ReaderAt
}

func (v *Volume) newStack(layers []*layer) *stack {
	base := &baseView{v.base, v.cfg.Reads, &v.counts.fromBase}
	s := &stack{layers: layers, views: []io.ReaderAt{base}, plain: []io.ReaderAt{base}}
	if v.aheadBase != nil {
		s.views[0] = v.newAheadView(v.aheadBase, base, readahead.Reader{Committed: func() uint64 { return 0 }}, nil)
	}
	for i, l := range layers {
		supplied := &v.counts.fromCOW
		if l.log != nil {
			supplied = &v.counts.fromLog
		}
		plain := &layerView{l, s.plain[i], supplied, nil}
		s.plain = append(s.plain, plain)
		over := &layerView{l, s.views[i], supplied, v.noteReads(l)}
		if l.ahead == nil {
			s.views = append(s.views, over)
		} else {
			s.views = append(s.views, v.newAheadView(l.ahead, over, layerReader(l), over.onRead))
		}
	}
	return s
}

// view is the whole volume.
func (s *stack) view() io.ReaderAt { return s.views[len(s.layers)] }

// below is the view under the layer of that id, without read-ahead.
func (s *stack) below(id uint64) io.ReaderAt {
	for i, l := range s.layers {
		if l.id == id {
			return s.plain[i]
		}
	}
	return s.plain[len(s.layers)]
}

// top is the log that guest writes go to, or nil.
func (s *stack) top() *layer {
	if n := len(s.layers); n > 0 && s.layers[n-1].log != nil {
		return s.layers[n-1]
	}
	return nil
}

// layerView is a layer over what is below it.
type layerView struct {
	l     *layer
	below io.ReaderAt
	// supplied counts the bytes of reads that did not come from below.
	supplied *atomic.Uint64
	// onRead, if not nil, is told of reads that did not all come from below.
	onRead func(off int64, n int)
}

func (v *layerView) ReadAt(p []byte, off int64) (int, error) {
	var err error
	below := passedDown{r: v.below}
	if v.l.log != nil {
		err = v.l.log.ReadAt(&below, p, off)
	} else {
		err = v.l.view.ReadAt(&below, p, off)
	}
	if err != nil {
		return 0, v.l.named(err)
	}
	if n := len(p) - below.n; n > 0 {
		v.supplied.Add(uint64(n))
		if v.onRead != nil {
			v.onRead(off, len(p))
		}
	}
	return len(p), nil
}

// ReadBatch reads from several places of a COW at the same time.
func (v *layerView) ReadBatch(batch []blockio.Request) error {
	if v.l.log != nil {
		for _, q := range batch {
			if _, err := v.ReadAt(q.Buf, q.Off); err != nil {
				return err
			}
		}
		return nil
	}
	below := passedDown{r: v.below}
	if err := v.l.view.ReadBatch(&below, batch); err != nil {
		return v.l.named(err)
	}
	if n := bytesOf(batch) - below.n; n > 0 {
		v.supplied.Add(uint64(n))
		for _, q := range batch {
			if v.onRead != nil {
				v.onRead(q.Off, len(q.Buf))
			}
		}
	}
	return nil
}

// passedDown counts what a read of a layer reads below it.
type passedDown struct {
	r io.ReaderAt
	n int // bytes
}

func (d *passedDown) ReadAt(p []byte, off int64) (int, error) {
	d.n += len(p)
	return d.r.ReadAt(p, off)
}

func (d *passedDown) ReadBatch(batch []blockio.Request) error {
	d.n += bytesOf(batch)
	return blockio.ReadBatch(d.r, batch)
}

// settled tells whether the base may be written directly at n blocks from
// first: no layer writes them, and no ordered op reads them, short of a durable
// commit (design, rule 2; the caller sees to frozen views).
func (s *stack) settled(first, n uint64) (bool, error) {
	for _, l := range s.layers {
		if l.log != nil {
			if l.log.Has(int64(first)*blockio.BlockSize, int64(n)*blockio.BlockSize) {
				return false, nil
			}
			continue
		}
		if ok, err := l.view.Settled(first, n); !ok || err != nil {
			return false, err
		}
	}
	return true, nil
}
