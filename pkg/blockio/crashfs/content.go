package crashfs

import (
	"io"
	"maps"
	"slices"
)

const (
	pageSize   = 4096
	chunkPages = 256
	chunkSize  = chunkPages * pageSize
)

// owner is an identity: whoever holds the same pointer may change the memory.
type owner struct{ _ byte }

// page is 4 KiB of a file. data nil is a hole; &reserved is space that was
// allocated and never written.
type page struct {
	data  *[pageSize]byte
	owner *owner
}

var reserved [pageSize]byte // never written to: no page with it has an owner

type chunk struct {
	pages [chunkPages]page
	owner *owner
}

// content is what a file holds. Pages are shared among clones and copied on
// the first change; bytes beyond size in the last page are zero.
type content struct {
	size   int64
	chunks []*chunk // nil: all holes
	used   int64    // pages that take space
	xattrs map[string][]byte
	self   *owner // nil: everything is shared
}

// clone makes an independent copy. It writes to c.self, so c must not be in use
// elsewhere.
func (c *content) clone() content {
	c.self = nil
	d := *c
	d.chunks = slices.Clone(c.chunks)
	d.xattrs = maps.Clone(c.xattrs)
	return d
}

func (c *content) page(i int64) page {
	if n := i / chunkPages; n < int64(len(c.chunks)) && c.chunks[n] != nil {
		return c.chunks[n].pages[i%chunkPages]
	}
	return page{}
}

// slot is where page i is kept, for changing.
func (c *content) slot(i int64) *page {
	if c.self == nil {
		c.self = new(owner)
	}
	n := i / chunkPages
	if missing := n + 1 - int64(len(c.chunks)); missing > 0 {
		c.chunks = append(c.chunks, make([]*chunk, missing)...)
	}
	switch ch := c.chunks[n]; {
	case ch == nil:
		c.chunks[n] = &chunk{owner: c.self}
	case ch.owner != c.self:
		own := *ch
		own.owner = c.self
		c.chunks[n] = &own
	}
	return &c.chunks[n].pages[i%chunkPages]
}

// set replaces page i.
func (c *content) set(i int64, p page) {
	s := c.slot(i)
	if s.data == nil {
		c.used++
	}
	if p.data == nil {
		c.used--
	}
	*s = p
}

// bytes is the memory of page i, for changing.
func (c *content) bytes(i int64) *[pageSize]byte {
	s := c.slot(i)
	if s.data == nil || s.owner != c.self {
		own := new([pageSize]byte)
		if s.data != nil {
			*own = *s.data
		}
		c.set(i, page{data: own, owner: c.self})
		return own
	}
	return s.data
}

// pages calls f for each page that [off, off+n) touches, with the part of the
// page that lies in the range.
func pages(off, n int64, f func(i int64, from, to int)) {
	for end := off + n; off < end; {
		i := off / pageSize
		to := min(end, (i+1)*pageSize)
		f(i, int(off-i*pageSize), int(to-i*pageSize))
		off = to
	}
}

func (c *content) readAt(p []byte, off int64) (int, error) {
	n := max(min(int64(len(p)), c.size-off), 0)
	done := 0
	pages(off, n, func(i int64, from, to int) {
		if data := c.page(i).data; data != nil {
			copy(p[done:], data[from:to])
		} else {
			clear(p[done : done+to-from])
		}
		done += to - from
	})
	if done < len(p) {
		return done, io.EOF
	}
	return done, nil
}

// write keeps references to data, which must not change any more.
func (c *content) write(off int64, data []byte) {
	c.size = max(c.size, off+int64(len(data)))
	done := 0
	pages(off, int64(len(data)), func(i int64, from, to int) {
		part := data[done : done+to-from]
		done += to - from
		if len(part) == pageSize {
			c.set(i, page{data: (*[pageSize]byte)(part)})
		} else {
			copy(c.bytes(i)[from:to], part)
		}
	})
}

// zero makes holes of the whole pages in the range.
func (c *content) zero(off, n int64) {
	c.size = max(c.size, off+n)
	pages(off, n, func(i int64, from, to int) {
		switch data := c.page(i).data; {
		case data == nil:
		case to-from == pageSize:
			c.set(i, page{})
		case data != &reserved:
			clear(c.bytes(i)[from:to])
		}
	})
}

func (c *content) truncate(size int64) {
	if size < c.size {
		// The pages of all chunks that stay, then the chunks that go.
		last := (size + chunkSize - 1) / chunkSize
		for n := last; n < int64(len(c.chunks)); n++ {
			if c.chunks[n] == nil {
				continue
			}
			for _, p := range c.chunks[n].pages {
				if p.data != nil {
					c.used--
				}
			}
		}
		if last < int64(len(c.chunks)) {
			clear(c.chunks[last:])
			c.chunks = c.chunks[:last]
		}
		c.zero(size, last*chunkSize-size)
	}
	c.size = size
}

func (c *content) allocate(off, n int64) {
	c.size = max(c.size, off+n)
	pages(off, n, func(i int64, _, _ int) {
		if c.page(i).data == nil {
			c.set(i, page{data: &reserved})
		}
	})
}

// missing is how many of the pages that a range touches take no space yet.
func (c *content) missing(off, n int64) (count int64) {
	pages(off, n, func(i int64, _, _ int) {
		if c.page(i).data == nil {
			count++
		}
	})
	return count
}

// nextData finds the first stretch of written pages at or after off.
func (c *content) nextData(off int64) (start, end int64, err error) {
	isData := func(i int64) bool {
		data := c.page(i).data
		return data != nil && data != &reserved
	}
	if off >= c.size {
		return 0, 0, io.EOF
	}
	last := (c.size + pageSize - 1) / pageSize
	i := off / pageSize
	for i < last && !isData(i) {
		i++
	}
	if i >= last {
		return 0, 0, io.EOF
	}
	start = max(off, i*pageSize)
	for i < last && isData(i) {
		i++
	}
	return start, min(i*pageSize, c.size), nil
}

// setXattr sets an attribute, or removes it if value is nil. Maps may be shared
// with nobody: clone copies them.
func (c *content) setXattr(name string, value []byte) {
	if value == nil {
		delete(c.xattrs, name)
		return
	}
	if c.xattrs == nil {
		c.xattrs = map[string][]byte{}
	}
	c.xattrs[name] = value
}
