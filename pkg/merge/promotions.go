package merge

import (
	"errors"
	"fmt"
	"hash/crc32"
	"slices"

	"github.com/snapmerge/snapmerge/pkg/blockio"
)

const (
	// A sector of the promotions; see the package comment.
	promotedBits   = 28
	promotedCRC    = 508
	sectorWords    = (promotedCRC - promotedBits) / 8
	sectorChunks   = sectorWords * 64
	blockSectors   = bs / blockio.SectorSize / 2 // each is there twice
	blockChunks    = blockSectors * sectorChunks
	maxChunkBlocks = 1 << 16
	// maxPromotions is what a reader accepts: as many chunks as there can be blocks.
	maxPromotions = 1 << 32
)

// promotions is what the file header says of the promotions.
type promotions struct {
	chunks uint64 // for which there is room, a multiple of blockChunks
	blocks uint64 // of a chunk
	layer  uint64 // whose they are; 0: none
}

func (p promotions) bytes() int64 { return int64(p.chunks/blockChunks) * bs }

func (p promotions) check() error {
	if p.chunks%blockChunks != 0 || p.chunks > maxPromotions || p.blocks == 0 || p.blocks > maxChunkBlocks {
		return fmt.Errorf("promotions of %d chunks of %d blocks", p.chunks, p.blocks)
	}
	return nil
}

// reservePromotions makes room in the file for promotions of the present layer. From
// then on programs that do not know of promotions refuse the journal.
func (j *Journal) reservePromotions(chunks, blocks uint64) (*chunkSet, error) {
	p := promotions{chunks: max((chunks+blockChunks-1)/blockChunks*blockChunks, j.promoted.chunks), blocks: blocks, layer: j.layer}
	if err := p.check(); err != nil {
		return nil, err
	}
	if err := blockio.Extend(j.f, JournalBytes(j.capacity), p.bytes()); err != nil {
		return nil, err
	}
	if err := j.putFileHeader(p); err != nil {
		return nil, err
	}
	j.promoted = p
	j.early.Store(p.layer)
	j.promotedBlocks = make([]uint64, p.chunks/sectorChunks)
	return newChunkSet(p.chunks, p.blocks), nil
}

// ForgetPromotions makes the journal one without promotions again, which older
// programs take. The layer that they are of is merged, and nobody will ask for it
// again; no merge goes on.
func (j *Journal) ForgetPromotions() error {
	switch l := j.promoted.layer; {
	case l == 0:
		return nil
	case l > j.cur.layer, l == j.cur.layer && !j.cur.done:
		return fmt.Errorf("%w: %s has promotions of layer %d, which is not merged", ErrMismatch, j.f.Name(), l)
	}
	if err := j.putFileHeader(promotions{}); err != nil {
		return err
	}
	j.promoted = promotions{}
	j.early.Store(0)
	return nil
}

// putPromoted notes durably that chunks are promoted, beside those of the set; blocks
// are how many of each.
func (j *Journal) putPromoted(set *chunkSet, chunks, blocks []uint64) error {
	arena, err := blockio.NewArena(bs)
	if err != nil {
		return err
	}
	defer arena.Close()
	p := arena.Bytes()[:bs]
	totals := slices.Clone(j.promotedBlocks)
	for i := 0; i < len(chunks); {
		k, end := chunks[i]/blockChunks, i
		for ; end < len(chunks) && chunks[end]/blockChunks == k; end++ {
			totals[chunks[end]/sectorChunks] += blocks[end]
		}
		for s := range uint64(blockSectors) {
			sector := p[s*blockio.SectorSize : (s+1)*blockio.SectorSize]
			index := k*blockSectors + s
			j.encodePromoted(sector, set, index, totals[index])
			for _, chunk := range chunks[i:end] {
				if chunk/sectorChunks == index {
					bit := chunk % sectorChunks
					sector[promotedBits+bit/8] |= 1 << (bit % 8)
				}
			}
			le.PutUint32(sector[promotedCRC:], crc32.Checksum(sector[:promotedCRC], castagnoli))
			copy(p[bs/2+s*blockio.SectorSize:], sector)
		}
		if _, err := j.f.WriteAt(p, JournalBytes(j.capacity)+int64(k)*bs); err != nil {
			return err
		}
		i = end
	}
	if err := j.f.Flush(); err != nil {
		return err
	}
	j.promotedBlocks = totals
	return nil
}

// encodePromoted fills a sector but for its checksum.
func (j *Journal) encodePromoted(p []byte, set *chunkSet, index, blocks uint64) {
	clear(p)
	le.PutUint64(p, j.layer)
	le.PutUint64(p[8:], index)
	le.PutUint64(p[16:], blocks)
	le.PutUint32(p[24:], j.identity.CRC)
	for i := range uint64(sectorWords) {
		le.PutUint64(p[promotedBits+8*i:], set.words[index*sectorWords+i].Load())
	}
}

// readPromotions reads what is promoted of the present layer, nil if nothing is, and
// how many blocks that are.
func (j *Journal) readPromotions() (*chunkSet, uint64, error) {
	switch l := j.promoted.layer; {
	case l > j.layer:
		return nil, 0, fmt.Errorf("%w: %s has promotions of layer %d, not %d", ErrMismatch, j.f.Name(), l, j.layer)
	case l < j.layer:
		return nil, 0, nil
	}
	set := newChunkSet(j.promoted.chunks, j.promoted.blocks)
	j.promotedBlocks = make([]uint64, j.promoted.chunks/sectorChunks)
	buf := make([]byte, min(j.promoted.bytes(), requestBytes))
	total := uint64(0)
	start := JournalBytes(j.capacity)
	for off := int64(0); off < j.promoted.bytes(); off += int64(len(buf)) {
		buf = buf[:min(int64(len(buf)), j.promoted.bytes()-off)]
		if err := blockio.ReadFull(j.f, buf, start+off); err != nil {
			return nil, 0, err
		}
		for at := 0; at < len(buf); at += bs {
			for s := range blockSectors {
				index := uint64(off/bs+int64(at/bs))*blockSectors + uint64(s)
				p := buf[at+s*blockio.SectorSize:]
				err := j.decodePromoted(p[:blockio.SectorSize], set, index)
				// Of a write that was not completed one copy may have more: it is
				// right, since what it says was in the base before.
				if err2 := j.decodePromoted(p[bs/2:][:blockio.SectorSize], set, index); err != nil && err2 != nil {
					return nil, 0, j.damaged(start+off+int64(at)+int64(s)*blockio.SectorSize, err.Error())
				}
				total += j.promotedBlocks[index]
			}
		}
	}
	return set, total, nil
}

// decodePromoted adds what a sector says.
func (j *Journal) decodePromoted(p []byte, set *chunkSet, index uint64) error {
	if !slices.ContainsFunc(p, func(b byte) bool { return b != 0 }) {
		return nil // never written
	}
	layer := le.Uint64(p)
	switch {
	case crc32.Checksum(p[:promotedCRC], castagnoli) != le.Uint32(p[promotedCRC:]):
		return errors.New("wrong checksum of promotions")
	case le.Uint64(p[8:]) != index:
		return fmt.Errorf("promotions number %d in place of %d", le.Uint64(p[8:]), index)
	case layer > j.layer, layer == j.layer && le.Uint32(p[24:]) != j.identity.CRC:
		return fmt.Errorf("promotions of layer %d of a COW with checksum %08x", layer, le.Uint32(p[24:]))
	case layer < j.layer:
		return nil // long merged
	}
	j.promotedBlocks[index] = max(j.promotedBlocks[index], le.Uint64(p[16:]))
	for i := range uint64(sectorWords) {
		set.words[index*sectorWords+i].Or(le.Uint64(p[promotedBits+8*i:]))
	}
	return nil
}
