package volume

import (
	"sync/atomic"

	"github.com/snapmerge/snapmerge/pkg/readahead"
)

// openAhead begins to read a COW ahead, if the node does that.
func (v *Volume) openAhead(l *layer) {
	if v.cfg.ReadAhead != nil {
		l.ahead = v.cfg.ReadAhead.Open(readahead.Mode(v.rec.Load().ReadAhead), v.loader(l.id))
	}
}

// loader reads the COW of that id for the read-ahead, whatever place the layer has
// by then. While the volume is being opened it has none.
func (v *Volume) loader(id uint64) readahead.Load {
	return func(p []byte, first uint64) (have, until uint64, err error) {
		defer v.epoch.Enter().Leave()
		st := v.stack.Load()
		for i, l := range st.layers {
			if l.id == id {
				return l.view.Load(st.plain[i], p, first)
			}
		}
		return 0, 0, nil
	}
}

// aheadView is a COW over what is below it, read ahead.
type aheadView struct {
	*layerView
	ahead *atomic.Uint64 // bytes that came from the read-ahead
}

func (v *aheadView) ReadAt(p []byte, off int64) (int, error) {
	r := readahead.Reader{
		Committed: v.l.view.Committed,
		Direct: func(p []byte, off int64) error {
			_, err := v.layerView.ReadAt(p, off)
			return err
		},
	}
	n, err := v.l.ahead.Read(r, p, off)
	v.ahead.Add(uint64(n))
	if err != nil {
		return 0, err
	}
	return len(p), nil
}
