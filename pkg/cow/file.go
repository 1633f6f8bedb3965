package cow

import (
	"hash/crc32"
	"io"
)

// OpenOptions says how to open a file.
type OpenOptions struct {
	// Label opens a file whose writing was cut off: the file ends, as far as the
	// reader is concerned, at the first label (versions 1 and 2) or the resume
	// point (version 3) of that value. Without it an unfinished file of version 1
	// or 2 is refused; version 3 does not show whether it was finished.
	Label *uint64
}

// File is an open file. It reads through the io.ReaderAt that it was given and
// keeps nothing but the header, so that its methods may be called concurrently.
type File struct {
	r      io.ReaderAt
	size   int64
	label  *uint64
	header Header
	// stored is the header as it lies in the file.
	stored []byte
}

// Open reads and checks the header of a file of size bytes, and nothing else.
func Open(r io.ReaderAt, size int64, o OpenOptions) (*File, error) {
	if size < 0 || size > maxOffset {
		return nil, badFormat(0, "a file of %d bytes, where offsets have 48 bits", size)
	}
	h, stored, err := readHeader(r, size)
	if err != nil {
		return nil, err
	}
	return &File{r: r, size: size, label: o.Label, header: h, stored: stored}, nil
}

// Header returns the header as it was when the file was opened.
func (f *File) Header() Header { return f.header }

// Walk calls fn for every op in file order, metadata included, up to the footer
// (which is passed too), the label asked for, or the end of the op table. Each
// op is checked by itself before it is passed, its place in the file and the
// range of its data included; what needs a view of all ops is left to Load. An
// error of fn ends the walk and is returned as it is.
func (f *File) Walk(fn func(RawOp) error) error {
	s := scan{File: f, op: fn}
	return s.run()
}

// Identity names the content of a file. It stays the same while the file is
// merged in place: scratch, resume points and the count of merged ops do not
// enter into it. Nor does the data of the ops.
type Identity struct {
	// Length is the file's size in bytes.
	Length int64
	// CRC is the CRC-32C of the header with its count of merged ops zeroed, the
	// sequence data and the ops, in the order of the file.
	CRC uint32
}

// Identity reads the whole file but the data and returns its identity.
func (f *File) Identity() (Identity, error) {
	s := scan{File: f}
	err := s.run()
	return s.identity(), err
}

// ResumePoint is a label and what it covers.
type ResumePoint struct {
	Label uint64
	// Ops is the number of ops before the label in the file; in versions 1 and 2
	// metadata counts.
	Ops uint64
}

// Labels returns the labels of the file in file order. Those found before an
// error are returned with it, so that an unfinished file can be asked for the
// labels that it can be opened at. Of version 3 only the newest four survive.
func (f *File) Labels() ([]ResumePoint, error) {
	if f.header.Major == 3 {
		return f.resumePoints()
	}
	var (
		labels []ResumePoint
		ops    uint64
	)
	err := f.Walk(func(op RawOp) error {
		if op.Type == Label {
			labels = append(labels, ResumePoint{Label: op.Source, Ops: ops})
		}
		ops++
		return nil
	})
	return labels, err
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// scan is one pass over the file: it checks each op by itself, sums the
// identity and hands ops and sequence numbers on.
type scan struct {
	*File
	// op is called for every op in file order, if not nil.
	op func(RawOp) error
	// sequence is called with the sequence numbers in order, some at a time, as
	// they are stored; off is the file offset of the first. May be nil.
	sequence func(off int64, numbers []byte) error

	crc     uint32
	numbers []byte // buffer of readSequence
}

func (s *scan) run() error {
	header := append([]byte(nil), s.stored...)
	clear(header[NumMergeOpsOffset : NumMergeOpsOffset+8])
	s.sum(header)
	if s.header.Major == 3 {
		return s.runV3()
	}
	return s.runV2()
}

func (s *scan) sum(p []byte) { s.crc = crc32.Update(s.crc, castagnoli, p) }

func (s *scan) identity() Identity { return Identity{Length: s.size, CRC: s.crc} }

func (s *scan) pass(op RawOp) error {
	if s.op == nil {
		return nil
	}
	return s.op(op)
}

// readSequence sums and hands on the n bytes of sequence numbers at off, which
// lie inside the file.
func (s *scan) readSequence(off, n int64) error {
	if s.numbers == nil && n > 0 {
		s.numbers = make([]byte, readChunk)
	}
	for n > 0 {
		b := s.numbers[:min(n, readChunk)]
		if err := readAt(s.r, b, off); err != nil {
			return err
		}
		s.sum(b)
		if s.sequence != nil {
			if err := s.sequence(off, b); err != nil {
				return err
			}
		}
		off += int64(len(b))
		n -= int64(len(b))
	}
	return nil
}

// readChunk is the size of the buffers of a scan, in bytes: a multiple of the
// sizes of a sequence number and of a version 3 op.
const readChunk = 64 << 10

// checkData checks the data of a replace or xor op that writes blocks blocks
// and tells whether it is stored raw.
func (s *scan) checkData(r RawOp) (raw bool, err error) {
	full := r.Blocks * BlockSize
	switch {
	case r.DataLength == 0:
		return false, badFormat(r.Offset, "%s op of block %d has no data", r.Type, r.NewBlock)
	case r.Compression == None && r.DataLength != full:
		return false, badFormat(r.Offset, "%s op of block %d has %d bytes of raw data, not %d", r.Type, r.NewBlock, r.DataLength, full)
	case s.header.Major == 3 && r.DataLength > full:
		return false, badFormat(r.Offset, "%s op of block %d has %d bytes of data, more than the %d it writes", r.Type, r.NewBlock, r.DataLength, full)
	}
	if err := s.checkInside(r); err != nil {
		return false, err
	}
	if s.header.Major < 3 && r.Compression.alwaysPacked() {
		return false, nil
	}
	return r.DataLength == full, nil
}

// checkInside checks that the op's data ends inside the file.
func (s *scan) checkInside(r RawOp) error {
	if end := r.DataOffset + int64(r.DataLength); end > s.size {
		return badFormat(r.Offset, "data of the %s op ends at byte %d, past the end of the file at %d", r.Type, end, s.size)
	}
	return nil
}

// checkBlocks checks the blocks that an op writes and reads.
func (s *scan) checkBlocks(r RawOp) error {
	if r.NewBlock > maxBlocks-uint64(r.Blocks) {
		return badFormat(r.Offset, "%s op writes block %d and %d more; block numbers have 32 bits", r.Type, r.NewBlock, r.Blocks-1)
	}
	if r.Type.Ordered() && r.Source >= maxSource {
		return badFormat(r.Offset, "%s op of block %d has source %d; sources have 48 bits", r.Type, r.NewBlock, r.Source)
	}
	return nil
}
