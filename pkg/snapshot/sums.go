package snapshot

import (
	"context"
	"fmt"
	"hash/crc32"

	"github.com/snapmerge/snapmerge/pkg/blockio"
	"github.com/snapmerge/snapmerge/pkg/cow"
)

const (
	sumsMagic   = "snmgcsum"
	sumsVersion = 1
	chunkSize   = 1 << 20
)

// sumsRoot is the first page of a file of sums.
type sumsRoot struct {
	identity cow.Identity
	merged   uint64 // the COW's count of merged ops
}

func (r *sumsRoot) encode() []byte {
	b := make([]byte, pageSize)
	copy(b, sumsMagic)
	le.PutUint32(b[8:], sumsVersion)
	le.PutUint32(b[12:], chunkSize)
	le.PutUint64(b[16:], uint64(r.identity.Length))
	le.PutUint32(b[24:], r.identity.CRC)
	le.PutUint64(b[32:], r.merged)
	seal(b, 0)
	return b
}

func readSumsRoot(f pagedFile) (r sumsRoot, err error) {
	b, err := f.readRoot(sumsMagic, sumsVersion)
	if err != nil {
		return r, err
	}
	r = sumsRoot{
		identity: cow.Identity{Length: int64(le.Uint64(b[16:])), CRC: le.Uint32(b[24:])},
		merged:   le.Uint64(b[32:]),
	}
	if n := le.Uint32(b[12:]); n != chunkSize {
		return r, f.bad(12, fmt.Sprintf("chunks have %d bytes, not %d", n, chunkSize))
	}
	if r.identity.Length < 0 {
		return r, f.bad(16, "the length is out of range")
	}
	if size, want := f.Size(), r.pages()*pageSize; size != want {
		return r, f.bad(min(size, want), fmt.Sprintf("the file has %d bytes, not %d", size, want))
	}
	return r, nil
}

// pages is the number of pages of the file.
func (r *sumsRoot) pages() int64 {
	chunks := chunksOf(r.identity.Length)
	return 1 + chunks/numbersPage + min(chunks%numbersPage, 1)
}

func chunksOf(length int64) int64 { return length/chunkSize + min(length%chunkSize, 1) }

// WriteSums makes the sums of a COW, in place of some that are there, and reads
// the whole file for it. The COW must not be written meanwhile.
func WriteSums(ctx context.Context, fsys blockio.FS, cowPath string) error {
	f, err := fsys.Open(cowPath, blockio.ReadOnly)
	if err != nil {
		return err
	}
	defer f.Close()
	c, err := cow.Open(f, f.Size(), cow.OpenOptions{})
	if err != nil {
		return fmt.Errorf("%s: %w", cowPath, err)
	}
	identity, err := c.Identity()
	if err != nil {
		return fmt.Errorf("%s: %w", cowPath, err)
	}
	err = makeFile(fsys, SumsPath(cowPath), func(out blockio.File) error {
		w := newSumsWriter(out)
		if err := eachChunk(ctx, f, identity.Length, func(_ int64, chunk []byte) error { return w.add(chunk) }); err != nil {
			return err
		}
		return w.finish(identity, c.Header().NumMergeOps)
	})
	if err != nil {
		return fmt.Errorf("sums of %s: %w", cowPath, err)
	}
	return nil
}

// sumsWriter makes a file of sums from all of a COW, given in order.
type sumsWriter struct {
	f     blockio.File
	pages *pageWriter
	crc   uint32 // of the chunk that is not complete
	have  int    // its bytes
}

func newSumsWriter(f blockio.File) *sumsWriter {
	return &sumsWriter{f: f, pages: newPageWriter(f, 1)}
}

func (w *sumsWriter) add(p []byte) error {
	for len(p) > 0 {
		n := min(len(p), chunkSize-w.have)
		w.crc = crc32.Update(w.crc, castagnoli, p[:n])
		w.have += n
		p = p[n:]
		if w.have == chunkSize {
			if err := w.endChunk(); err != nil {
				return err
			}
		}
	}
	return nil
}

func (w *sumsWriter) endChunk() error {
	var b [numberSize]byte
	le.PutUint32(b[:], w.crc)
	w.crc, w.have = 0, 0
	return w.pages.add(b[:])
}

func (w *sumsWriter) finish(identity cow.Identity, merged uint64) error {
	if w.have > 0 {
		if err := w.endChunk(); err != nil {
			return err
		}
	}
	if err := w.pages.finish(); err != nil {
		return err
	}
	root := sumsRoot{identity: identity, merged: merged}
	_, err := w.f.WriteAt(root.encode(), 0)
	return err
}

// eachChunk reads a file chunk by chunk.
func eachChunk(ctx context.Context, f blockio.File, length int64, do func(off int64, chunk []byte) error) error {
	buf := make([]byte, min(length, chunkSize))
	for off := int64(0); off < length; off += chunkSize {
		if err := ctx.Err(); err != nil {
			return err
		}
		chunk := buf[:min(length-off, chunkSize)]
		if err := readFull(f, chunk, off); err != nil {
			return fmt.Errorf("%s: %w", f.Name(), err)
		}
		if err := do(off, chunk); err != nil {
			return err
		}
	}
	return nil
}

// VerifySums compares a COW with the sums beside it. No sums: fs.ErrNotExist.
// Damaged sums: an error that wraps ErrSums. A COW that differs: one that wraps
// ErrMismatch; so does a file that was merged in place since it was summed, for
// that changes it, and then the error says so. progress, if not nil, is told how
// many bytes of the file were read.
func VerifySums(ctx context.Context, fsys blockio.FS, cowPath string, progress func(done, total int64)) error {
	f, err := fsys.Open(cowPath, blockio.ReadOnly)
	if err != nil {
		return err
	}
	defer f.Close()
	s, err := fsys.Open(SumsPath(cowPath), blockio.ReadOnly)
	if err != nil {
		return err
	}
	defer s.Close()
	sums := pagedFile{s, ErrSums}
	root, err := readSumsRoot(sums)
	if err != nil {
		return err
	}
	mismatch := func(off int64, format string, args ...any) error {
		return &FormatError{File: cowPath, Offset: off, Rule: fmt.Sprintf(format, args...), kind: ErrMismatch}
	}
	length := root.identity.Length
	if size := f.Size(); size != length {
		return mismatch(min(size, length), "the file has %d bytes, %d were summed", size, length)
	}
	c, err := cow.Open(f, length, cow.OpenOptions{})
	if err != nil {
		c = nil // the sum of the first chunk will not match either
	}
	if c != nil && c.Header().NumMergeOps != root.merged {
		return mismatch(cow.NumMergeOpsOffset, "%d ops are merged, %d were when it was summed: it was merged in place since, which its sums don't follow",
			c.Header().NumMergeOps, root.merged)
	}
	page, have := make([]byte, pageSize), int64(0)
	return eachChunk(ctx, f, length, func(off int64, chunk []byte) error {
		n := off / chunkSize
		if want := 1 + n/numbersPage; have != want {
			if err := sums.readPage(want, page); err != nil {
				return err
			}
			have = want
		}
		want := le.Uint32(page[n%numbersPage*numberSize:])
		if sum := crc32.Checksum(chunk, castagnoli); sum != want {
			return mismatch(off, "the checksum of %d bytes is %08x, not %08x%s", len(chunk), sum, want, explain(c, root, off))
		}
		if progress != nil {
			progress(off+int64(len(chunk)), length)
		}
		return nil
	})
}

// explain adds what can be said about a chunk at off that differs. c is nil if the
// header is not that of a COW.
func explain(c *cow.File, root sumsRoot, off int64) string {
	if c == nil {
		return ""
	}
	h := c.Header()
	if identity, err := c.Identity(); err == nil && identity != root.identity {
		return "; header or ops differ, so the sums may be those of another COW"
	}
	if off < int64(h.HeaderSize)+int64(h.BufferSize) {
		return "; a merge in place changes the scratch in it"
	}
	return ""
}
