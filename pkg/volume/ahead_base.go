package volume

import (
	"io"
	"math"
	"math/bits"

	"github.com/snapmerge/snapmerge/pkg/readahead"
)

// The base is read ahead where no layer is yet to write it. What is kept of it is
// never older than a write:
//
//   - The guest's writes to the base are told before they begin and when they have
//     ended (toBase): nothing of them is kept from before, nor loaded meanwhile.
//   - The merge writes only blocks whose ops are neither committed nor promoted, so
//     does a promotion, and a fold writes only blocks that the log has. What such
//     layers are yet to write is not loaded, be they the lowest or above it
//     (loadBase).
//   - A block may come into a log only later. It is read from there until the log
//     is dropped, and before that all that is kept of the base is forgotten
//     (dropLowest).
//   - While requests go past the volume nothing is kept (markNative).

// openAheadBase begins to read the base ahead, if the volume is read ahead at all.
func (v *Volume) openAheadBase(rec *Record) {
	mode := readahead.Mode(rec.ReadAhead)
	if v.cfg.ReadAhead == nil || v.cfg.ReadAhead.Mode(mode) == readahead.None {
		return
	}
	v.aheadBase = v.cfg.ReadAhead.Open(mode, readahead.Source{Load: v.loadBase, Inner: true})
	if rec.Native != "" {
		v.aheadBase.BeginWrite(0, math.MaxInt64)
	}
}

// loadBase is the readahead.Load of the base.
func (v *Volume) loadBase(p []byte, first uint64) (got readahead.Loaded, err error) {
	defer v.epoch.Enter().Leave()
	st := v.stack.Load()
	n := min(uint64(len(p)/bs), uint64(v.Size()/bs)-min(first, uint64(v.Size()/bs)))
	got.Until = math.MaxUint64
	if got.Have, err = st.final(first, n); err != nil || got.Have == 0 {
		return got, err
	}
	from, to := uint64(bits.TrailingZeros64(got.Have)), uint64(bits.Len64(got.Have))
	_, err = io.ReadFull(io.NewSectionReader(st.plain[0], int64(first+from)*bs, int64(to-from)*bs), p[from*bs:to*bs])
	return got, err
}

// final tells which of n blocks of the base, 64 at most, from first on no layer is
// yet to write: bit i stands for block first+i.
func (s *stack) final(first, n uint64) (blocks uint64, err error) {
	blocks = 1<<n - 1
	for _, l := range s.layers {
		if l.log == nil {
			unwritten, err := l.view.Unwritten(first, n)
			if err != nil {
				return 0, err
			}
			blocks &^= unwritten
			continue
		}
		if !l.log.Has(int64(first)*bs, int64(n)*bs) {
			continue
		}
		for i := range n {
			if l.log.Has(int64(first+i)*bs, bs) {
				blocks &^= 1 << i
			}
		}
	}
	return blocks, nil
}

// toBase does a write of n bytes at off of the base.
func (v *Volume) toBase(off, n int64, write func() error) error {
	v.aheadBase.BeginWrite(off, n)
	defer v.aheadBase.EndWrite(off, n)
	err := write()
	v.baseDirty.Store(true) // after it: a flush in between would take the mark and leave what was written
	return err
}
