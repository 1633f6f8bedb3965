package snapshot

import (
	"fmt"
	"hash/crc32"
	"math"

	"github.com/snapmerge/snapmerge/pkg/cow"
)

const (
	indexMagic   = "snmgcidx"
	indexVersion = 1
	entrySize    = 32
	entriesPage  = pageContent / entrySize

	flagBlockOrder = 1 << 0
)

// indexRoot is the first page of an index.
type indexRoot struct {
	blockOrder bool // the merge order is that of the blocks
	identity   cow.Identity
	header     uint32 // headerSum of the COW
	ops        uint64
	ordered    uint64
	blocks     uint64
	targetEnd  uint64
	sourceEnd  uint64
	id         indexID
}

// headerSum is the checksum of a COW's stored header without the count that
// changes when the file is merged in place.
func headerSum(stored []byte) uint32 {
	const count, end = cow.NumMergeOpsOffset, cow.NumMergeOpsOffset + 8
	sum := crc32.Checksum(stored[:count], castagnoli)
	sum = crc32.Update(sum, castagnoli, make([]byte, end-count))
	return crc32.Update(sum, castagnoli, stored[end:])
}

func (r *indexRoot) encode() []byte {
	b := make([]byte, pageSize)
	copy(b, indexMagic)
	le.PutUint32(b[8:], indexVersion)
	if r.blockOrder {
		le.PutUint32(b[12:], flagBlockOrder)
	}
	le.PutUint64(b[16:], uint64(r.identity.Length))
	le.PutUint32(b[24:], r.identity.CRC)
	le.PutUint32(b[28:], r.header)
	le.PutUint64(b[32:], r.ops)
	le.PutUint64(b[40:], r.ordered)
	le.PutUint64(b[48:], r.blocks)
	le.PutUint64(b[56:], r.targetEnd)
	le.PutUint64(b[64:], r.sourceEnd)
	copy(b[72:], r.id[:])
	seal(b, 0)
	return b
}

// readIndexRoot reads and checks the root of an index by itself.
func readIndexRoot(f pagedFile) (r indexRoot, err error) {
	b, err := f.readRoot(indexMagic, indexVersion)
	if err != nil {
		return r, err
	}
	flags := le.Uint32(b[12:])
	r = indexRoot{
		blockOrder: flags&flagBlockOrder != 0,
		identity:   cow.Identity{Length: int64(le.Uint64(b[16:])), CRC: le.Uint32(b[24:])},
		header:     le.Uint32(b[28:]),
		ops:        le.Uint64(b[32:]),
		ordered:    le.Uint64(b[40:]),
		blocks:     le.Uint64(b[48:]),
		targetEnd:  le.Uint64(b[56:]),
		sourceEnd:  le.Uint64(b[64:]),
		id:         indexID(b[72:88]),
	}
	switch {
	case flags&^flagBlockOrder != 0:
		return r, f.bad(12, fmt.Sprintf("flags %#x are not known", flags))
	case r.ops > math.MaxUint32:
		return r, f.bad(32, fmt.Sprintf("%d ops are too many", r.ops))
	case r.ordered > r.ops:
		return r, f.bad(40, fmt.Sprintf("%d of %d ops are ordered", r.ordered, r.ops))
	case r.targetEnd > maxTargetEnd:
		return r, f.bad(56, fmt.Sprintf("ops write up to block %d; block numbers have 32 bits", r.targetEnd-1))
	case r.sourceEnd > maxSourceEnd:
		return r, f.bad(64, fmt.Sprintf("ops read up to byte %d; sources have 48 bits", r.sourceEnd-1))
	}
	return r, nil
}

// readRoot reads page 0 and checks what all roots have in common.
func (f pagedFile) readRoot(magic string, version uint32) ([]byte, error) {
	size := f.Size()
	if size < pageSize || size%pageSize != 0 {
		return nil, f.bad(0, fmt.Sprintf("the file has %d bytes, not a whole number of pages", size))
	}
	b := make([]byte, pageSize)
	err := f.readPage(0, b)
	if err != nil {
		return nil, err
	}
	if string(b[:8]) != magic {
		return nil, f.bad(0, "the magic number is not there")
	}
	if v := le.Uint32(b[8:]); v != version {
		return nil, f.bad(8, fmt.Sprintf("format version is %d, not %d", v, version))
	}
	return b, nil
}

// indexLayout says in which pages the parts of an index lie.
type indexLayout struct {
	// levels are the levels of the tree from the lowest, the entries first.
	levels []pageRun
	// order has no pages if the merge order is that of the blocks.
	order pageRun
	pages int64 // of the file
}

// pageRun is a run of pages of a file.
type pageRun struct{ first, n int64 }

const entryPagesFrom = 1

func (r *indexRoot) layout() indexLayout {
	var l indexLayout
	next := int64(entryPagesFrom)
	run := func(items, perPage int64) pageRun {
		p := pageRun{first: next, n: (items + perPage - 1) / perPage}
		next += p.n
		return p
	}
	l.levels = []pageRun{run(int64(r.ops), entriesPage)}
	for {
		below := l.levels[len(l.levels)-1].n
		if below < 2 {
			break
		}
		l.levels = append(l.levels, run(below, numbersPage))
	}
	if !r.blockOrder {
		l.order = run(int64(r.ops), numbersPage)
	}
	l.pages = next
	return l
}

// entry is an op with its place in the merge order.
type entry struct {
	op  cow.Op
	pos uint32
}

func (e *entry) encode(b *[entrySize]byte) {
	o := &e.op
	factor := uint64(0)
	for 1<<factor < o.Blocks {
		factor++
	}
	le.PutUint32(b[0:], uint32(o.NewBlock))
	le.PutUint32(b[4:], uint32(o.DataLength))
	le.PutUint64(b[8:], o.Source|uint64(o.Compression)<<48|factor<<51|uint64(o.Type)<<56)
	le.PutUint64(b[16:], uint64(o.DataOffset))
	le.PutUint32(b[24:], o.Checksum)
	le.PutUint32(b[28:], e.pos)
}

// decodeEntry reads entry b of a page that was found good. rule says what is
// wrong with an entry that was never right, if not empty: entries are not to
// be believed so far that one could make a reader fail in odd ways.
func (r *indexRoot) decodeEntry(b []byte) (e entry, rule string) {
	word := le.Uint64(b[8:])
	factor := word >> 51 & 7
	e = entry{
		op: cow.Op{
			Type:        cow.OpType(word >> 56 & 0xf),
			Compression: cow.Compression(word >> 48 & 7),
			NewBlock:    uint64(le.Uint32(b)),
			Blocks:      1 << factor,
			Source:      word & (1<<48 - 1),
			DataOffset:  int64(le.Uint64(b[16:])),
			DataLength:  int(le.Uint32(b[4:])),
			Checksum:    le.Uint32(b[24:]),
		},
		pos: le.Uint32(b[28:]),
	}
	o := &e.op
	stores := o.Type == cow.Replace || o.Type == cow.Xor
	o.HasChecksum = stores
	switch {
	case !stores && o.Type != cow.Copy && o.Type != cow.Zero:
		return e, fmt.Sprintf("op %s of an entry is not known", o.Type)
	case word>>60 != 0 || word>>54&3 != 0:
		return e, "unused bits of an entry are set"
	case factor > maxFactor || o.Type != cow.Replace && factor != 0:
		return e, fmt.Sprintf("%s op of an entry writes %d blocks", o.Type, o.Blocks)
	case o.Compression > cow.Zstd:
		return e, fmt.Sprintf("%s of an entry is not known", o.Compression)
	case stores && o.DataLength == 0:
		return e, fmt.Sprintf("%s op of an entry has no data", o.Type)
	case o.DataLength > maxStored || o.DataOffset < 0 || o.DataOffset > r.identity.Length-int64(o.DataLength):
		return e, fmt.Sprintf("data of an entry, %d bytes at %d, is not inside the COW of %d bytes", o.DataLength, o.DataOffset, r.identity.Length)
	case o.NewBlock+uint64(o.Blocks) > r.targetEnd:
		return e, fmt.Sprintf("entry writes block %d, the last that is written is %d", o.NewBlock+uint64(o.Blocks)-1, int64(r.targetEnd)-1)
	case sourceEnd(*o) > r.sourceEnd:
		return e, fmt.Sprintf("entry reads up to byte %d, the last that is read is %d", sourceEnd(*o)-1, int64(r.sourceEnd)-1)
	case uint64(e.pos) >= r.ops:
		return e, fmt.Sprintf("entry has position %d in a merge list of %d", e.pos, r.ops)
	}
	return e, ""
}

// sourceEnd is the end of what the op reads of the base, in bytes; 0 if it reads
// nothing.
func sourceEnd(op cow.Op) uint64 {
	switch op.Type {
	case cow.Copy:
		return (op.Source + 1) * cow.BlockSize
	case cow.Xor:
		return op.Source + cow.BlockSize
	}
	return 0
}

const (
	maxFactor = 6 // an op writes up to 2^6 blocks
	// maxStored is the longest stored data of an op in bytes.
	maxStored = 1 << maxFactor * cow.BlockSize
	// maxTargetEnd and maxSourceEnd are as far as the numbers of an op go: blocks of
	// 32 bits, and of a copy source blocks of 48.
	maxTargetEnd = 1 << 32
	maxSourceEnd = 1 << 48 * cow.BlockSize
)
