package snapshot

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"io"

	"github.com/snapmerge/snapmerge/pkg/blockio"
)

const (
	pageSize    = 4096
	pageContent = 4064 // bytes of a page that hold something
	numberSize  = 4    // bytes of an item of tree, order and sums
	numbersPage = pageContent / numberSize

	pageNumberOffset = pageContent
	pageCRCOffset    = pageSize - 4
)

var (
	castagnoli = crc32.MakeTable(crc32.Castagnoli)
	le         = binary.LittleEndian
)

// seal completes page number n.
func seal(page []byte, n int64) {
	le.PutUint32(page[pageNumberOffset:], uint32(n))
	le.PutUint32(page[pageCRCOffset:], crc32.Checksum(page[:pageCRCOffset], castagnoli))
}

// pagedFile is an index or a file of sums.
type pagedFile struct {
	blockio.File
	kind error // of format errors
}

func (f pagedFile) bad(off int64, rule string) error {
	return &FormatError{File: f.Name(), Offset: off, Rule: rule, kind: f.kind}
}

// readPage reads and checks page number n into page.
func (f pagedFile) readPage(n int64, page []byte) error {
	off := n * pageSize
	if err := readFull(f, page[:pageSize], off); err != nil {
		return fmt.Errorf("%s: %w: %w", f.Name(), f.kind, err)
	}
	if crc32.Checksum(page[:pageCRCOffset], castagnoli) != le.Uint32(page[pageCRCOffset:]) {
		return f.bad(off+pageCRCOffset, "the page's checksum does not match its content")
	}
	if got := le.Uint32(page[pageNumberOffset:]); int64(got) != n {
		return f.bad(off+pageNumberOffset, "the page is not in its place")
	}
	return nil
}

// pageWriter writes items of one size one after another into the pages of a
// file, some pages at a time. The size divides that of a page's content.
type pageWriter struct {
	w    io.WriterAt
	next int64 // number of the first page in buf
	buf  []byte
	used int // bytes of content in the last page of buf; 0 if there is none yet
}

const pagesAtOnce = 16

// newPageWriter returns a writer whose first page is number first.
func newPageWriter(w io.WriterAt, first int64) *pageWriter {
	return &pageWriter{w: w, next: first, buf: make([]byte, 0, pagesAtOnce*pageSize)}
}

// add appends an item to the page and begins a new page when that is full.
func (w *pageWriter) add(item []byte) error {
	if w.used == 0 {
		if len(w.buf) == cap(w.buf) {
			if err := w.write(); err != nil {
				return err
			}
		}
		w.buf = w.buf[:len(w.buf)+pageSize]
		clear(w.page())
	}
	w.used += copy(w.page()[w.used:], item)
	if w.used == pageContent {
		w.endPage()
	}
	return nil
}

func (w *pageWriter) page() []byte { return w.buf[len(w.buf)-pageSize:] }

// endPage lets the next item begin a new page.
func (w *pageWriter) endPage() {
	if w.used == 0 {
		return
	}
	seal(w.page(), w.next+int64(len(w.buf)/pageSize)-1)
	w.used = 0
}

func (w *pageWriter) write() error {
	if len(w.buf) == 0 {
		return nil
	}
	if _, err := w.w.WriteAt(w.buf, w.next*pageSize); err != nil {
		return err
	}
	w.next += int64(len(w.buf) / pageSize)
	w.buf = w.buf[:0]
	return nil
}

// finish ends the page and writes what is left. The writer may go on, with a new
// page.
func (w *pageWriter) finish() error {
	w.endPage()
	return w.write()
}
