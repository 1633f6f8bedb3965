package volume

import (
	"io"
	"sync/atomic"

	"github.com/snapmerge/snapmerge/pkg/blockio"
	"github.com/snapmerge/snapmerge/pkg/readahead"
)

// openAhead begins to read a COW ahead, if the node does that. Volumes restored
// from one snapshot have its COW by hard link. What replace and zero ops write is
// the same in all of them and is shared; what copy and xor ops do depends on the
// base, so chunks that have such ops are read ahead for each volume by itself.
func (v *Volume) openAhead(l *layer, r *COWRecord) error {
	if v.cfg.ReadAhead == nil {
		return nil
	}
	var share any
	if r.Label == nil {
		id, err := l.cow.File.ID()
		if err != nil {
			return err
		}
		share = id
	}
	l.ahead = v.cfg.ReadAhead.Open(readahead.Mode(v.rec.Load().ReadAhead), readahead.Source{Share: share, Load: v.loader(l.id, share != nil)})
	return nil
}

// loader reads the COW of that id for the read-ahead, whatever place the layer has
// by then. While the volume is being opened it has none.
func (v *Volume) loader(id uint64, shared bool) readahead.Load {
	return func(p []byte, first uint64) (got readahead.Loaded, err error) {
		defer v.epoch.Enter().Leave()
		st := v.stack.Load()
		for i, l := range st.layers {
			if l.id == id {
				got.Have, got.Until, got.Apart, err = l.view.Load(st.plain[i], p, first, shared)
				return got, err
			}
		}
		return readahead.Loaded{}, nil
	}
}

// aheadView is what is read ahead: the base, or a COW over what is below it.
type aheadView struct {
	direct io.ReaderAt // the same without read-ahead
	handle *readahead.Handle
	reader readahead.Reader
	ahead  *atomic.Uint64 // bytes that came from the read-ahead
	// onRead, if not nil, is told of reads of which some did.
	onRead func(off int64, n int)
}

// newAheadView: Direct of r is not set.
func (v *Volume) newAheadView(h *readahead.Handle, direct io.ReaderAt, r readahead.Reader, onRead func(off int64, n int)) *aheadView {
	r.Direct = func(p []byte, off int64) error {
		_, err := direct.ReadAt(p, off)
		return err
	}
	return &aheadView{direct: direct, handle: h, reader: r, ahead: &v.counts.fromAhead, onRead: onRead}
}

func (v *aheadView) ReadAt(p []byte, off int64) (int, error) {
	n, err := v.handle.Read(v.reader, p, off)
	v.ahead.Add(uint64(n))
	if n > 0 && v.onRead != nil {
		v.onRead(off, len(p))
	}
	if err != nil {
		return 0, err
	}
	return len(p), nil
}

// ReadBatch goes past the read-ahead, also where the places are the gaps between what a
// layer above has, of which it may have some.
func (v *aheadView) ReadBatch(batch []blockio.Request) error {
	return blockio.ReadBatch(v.direct, batch)
}

// layerReader is what the read-ahead has to know of a COW: its view changes when its
// merge begins.
func layerReader(l *layer) readahead.Reader {
	return readahead.Reader{
		Committed: func() uint64 { return l.view.Committed() },
		Promoted:  func(off, n int64) bool { return l.view.Promoted(uint64(off/bs), uint64(n/bs)) },
	}
}
