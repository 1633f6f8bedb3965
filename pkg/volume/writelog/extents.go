package writelog

import "github.com/tidwall/btree"

// extent is a range of the volume whose newest content in this log is at one
// place. Ranges in a map never overlap.
type extent struct {
	start, n uint64 // sectors
	off      int64  // file offset of the first sector's data; < 0: zeros
	seg      int    // segment of the record
}

func (e extent) end() uint64 { return e.start + e.n }

// from returns the part of e from sector s on.
func (e extent) from(s uint64) extent {
	d := s - e.start
	e.start, e.n = s, e.n-d
	if e.off >= 0 {
		e.off += int64(d) * sector
	}
	return e
}

// to returns the part of e before sector s.
func (e extent) to(s uint64) extent {
	e.n = s - e.start
	return e
}

// extents maps sectors to the newest record that wrote them.
type extents struct {
	tree btree.Map[uint64, extent] // by start
}

// overlapping calls fn for the extents that share a sector with [start, end), in
// order, until it returns false.
func (m *extents) overlapping(start, end uint64, fn func(extent) bool) {
	first := start
	m.tree.Descend(start, func(_ uint64, e extent) bool {
		if e.end() > start {
			first = e.start
		}
		return false
	})
	m.tree.Ascend(first, func(_ uint64, e extent) bool {
		return e.start < end && fn(e)
	})
}

// insert puts e over what was there. changed is told how the number of extents
// and of data sectors of each segment change.
func (m *extents) insert(e extent, changed func(seg int, refs, sectors int)) {
	var hit []extent
	m.overlapping(e.start, e.end(), func(o extent) bool {
		hit = append(hit, o)
		return true
	})
	count := func(x extent, sign int) {
		sectors := 0
		if x.off >= 0 {
			sectors = int(x.n)
		}
		changed(x.seg, sign, sign*sectors)
	}
	put := func(x extent) {
		m.tree.Set(x.start, x)
		count(x, 1)
	}
	for _, o := range hit {
		m.tree.Delete(o.start)
		count(o, -1)
		if o.start < e.start {
			put(o.to(e.start))
		}
		if o.end() > e.end() {
			put(o.from(e.end()))
		}
	}
	put(e)
}
