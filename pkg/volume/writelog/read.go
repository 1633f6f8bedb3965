package writelog

import (
	"fmt"
	"io"

	"github.com/snapmerge/snapmerge/pkg/blockio"
)

// Extent is a range whose newest content is in the log, in bytes.
type Extent struct {
	Off, N int64
	// Zero says that it reads as zeros and has no data.
	Zero bool
}

// piece is a part of a request: from the log at off, zeros if off < 0, or from
// below if missing.
type piece struct {
	n       int64 // bytes
	off     int64
	missing bool
}

// ReadAt reads len(p) bytes at off: from the log what it has, the rest from
// below. The caller keeps segments from being freed meanwhile (see Free).
func (l *Log) ReadAt(below io.ReaderAt, p []byte, off int64) error {
	var few [8]piece
	for _, c := range l.pieces(few[:0], off, int64(len(p))) {
		dst := p[:c.n]
		switch {
		case c.missing:
			if err := blockio.ReadFull(below, dst, off); err != nil {
				return err
			}
		case c.off < 0:
			clear(dst)
		default:
			if err := blockio.ReadFull(l.f, dst, c.off); err != nil {
				return fmt.Errorf("write log: %w", err)
			}
		}
		p, off = p[c.n:], off+c.n
	}
	return nil
}

func (l *Log) pieces(out []piece, off, n int64) []piece {
	start, end := uint64(off)/sector, uint64(off+n)/sector
	l.mu.RLock()
	defer l.mu.RUnlock()
	at := start
	l.index.overlapping(start, end, func(e extent) bool {
		if e.start > at {
			out = append(out, piece{n: int64(e.start-at) * sector, missing: true})
		}
		if e.start < start {
			e = e.from(start)
		}
		if e.end() > end {
			e = e.to(end)
		}
		out = append(out, piece{n: int64(e.n) * sector, off: e.off})
		at = e.end()
		return true
	})
	if at < end {
		out = append(out, piece{n: int64(end-at) * sector, missing: true})
	}
	return out
}

// Has tells whether any sector of the range is in the log.
func (l *Log) Has(off, n int64) bool {
	found := false
	l.mu.RLock()
	l.index.overlapping(uint64(off)/sector, uint64(off+n+sector-1)/sector, func(extent) bool {
		found = true
		return false
	})
	l.mu.RUnlock()
	return found
}

// Next returns the first range at or after off that is in the log, cut at off;
// false if there is none. A sealed log can be walked with it.
func (l *Log) Next(off int64) (Extent, bool) {
	s := uint64(off) / sector
	var out Extent
	ok := false
	l.mu.RLock()
	l.index.overlapping(s, 1<<63, func(e extent) bool {
		if e.start < s {
			e = e.from(s)
		}
		out, ok = Extent{Off: int64(e.start) * sector, N: int64(e.n) * sector, Zero: e.off < 0}, true
		return false
	})
	l.mu.RUnlock()
	return out, ok
}
