package snapshot

import (
	"fmt"
	"sort"

	"github.com/snapmerge/snapmerge/pkg/blockio"
	"github.com/snapmerge/snapmerge/pkg/cow"
)

// Index finds the ops of a COW on disk, in the index file beside it. It keeps
// nothing in memory that grows with the ops; what it reads goes through a Cache.
// All ops with data have checksums. Errors of its methods wrap ErrIndex where
// the index is damaged.
type Index struct {
	file   pagedFile
	cache  *Cache
	root   indexRoot
	layout indexLayout
}

var _ cow.Ops = (*Index)(nil)

// OpenIndex opens the index of the COW that is cowSize bytes long and has the
// given header, as it is stored, and reads nothing but its root. A file that is
// no index, or that of another COW, is refused with an error that wraps
// ErrIndex. Not found out here is a COW that differs in its ops alone: whoever
// replaces a COW removes its index first, and OpenCOWOptions.CheckIndex is for
// where that cannot be relied on. f remains the caller's and must stay open. A nil
// cache stands for one of DefaultCacheBytes for this index alone.
func OpenIndex(f blockio.File, cowSize int64, cowHeader []byte, cache *Cache) (*Index, error) {
	file := pagedFile{f, ErrIndex}
	root, err := readIndexRoot(file)
	if err != nil {
		return nil, err
	}
	x := newIndex(file, root, cache)
	switch want, size := x.layout.pages*pageSize, f.Size(); {
	case size != want:
		return nil, file.bad(size, fmt.Sprintf("the file has %d bytes, not %d", size, want))
	case root.identity.Length != cowSize:
		return nil, file.bad(16, fmt.Sprintf("index of a COW of %d bytes; this one has %d", root.identity.Length, cowSize))
	case root.header != headerSum(cowHeader):
		return nil, file.bad(28, "index of a COW with another header")
	}
	return x, nil
}

// checkOps refuses to be the index of a COW that has other ops.
func (x *Index) checkOps(file *cow.File) error {
	id, err := file.Identity()
	if err == nil && id != x.root.identity {
		err = x.file.bad(24, fmt.Sprintf("index of a COW whose ops have checksum %08x; those of this one have %08x", x.root.identity.CRC, id.CRC))
	}
	return err
}

func newIndex(file pagedFile, root indexRoot, cache *Cache) *Index {
	if cache == nil {
		cache = NewCache(0)
	}
	return &Index{file: file, cache: cache, root: root, layout: root.layout()}
}

// Identity is that of the COW when the index was made.
func (x *Index) Identity() cow.Identity { return x.root.identity }

// Len implements cow.Ops.
func (x *Index) Len() uint64 { return x.root.ops }

// Ordered implements cow.Ops.
func (x *Index) Ordered() uint64 { return x.root.ordered }

// TargetBlocks implements cow.Ops.
func (x *Index) TargetBlocks() uint64 { return x.root.blocks }

// Bounds implements cow.Ops.
func (x *Index) Bounds() (targetBlocks, sourceBytes uint64) {
	return x.root.targetEnd, x.root.sourceEnd
}

// At implements cow.Ops.
func (x *Index) At(pos uint64) (cow.Op, error) {
	if pos >= x.root.ops {
		return cow.Op{}, fmt.Errorf("op %d of a list of %d", pos, x.root.ops)
	}
	n := int64(pos)
	if !x.root.blockOrder {
		var err error
		if n, err = x.entryAt(pos); err != nil {
			return cow.Op{}, err
		}
	}
	e, err := x.entry(n)
	if err != nil {
		return cow.Op{}, err
	}
	if uint64(e.pos) != pos {
		return cow.Op{}, x.badEntry(n, fmt.Sprintf("entry has position %d in the merge order, not %d", e.pos, pos))
	}
	return e.op, nil
}

// entryAt is the number of the entry at a position of the merge order, by the
// order pages.
func (x *Index) entryAt(pos uint64) (int64, error) {
	number, i := x.layout.order.first+int64(pos/numbersPage), int64(pos%numbersPage)
	p, err := x.page(number)
	if err != nil {
		return 0, err
	}
	n := le.Uint32(p[i*numberSize:])
	if uint64(n) >= x.root.ops {
		return 0, x.file.bad(number*pageSize+i*numberSize, fmt.Sprintf("merge order names entry %d of %d", n, x.root.ops))
	}
	return int64(n), nil
}

// Find implements cow.Ops.
func (x *Index) Find(block uint64) (op cow.Op, pos uint64, ok bool, err error) {
	_, e, ok, err := x.covering(block)
	if err != nil || !ok {
		return cow.Op{}, 0, false, err
	}
	return e.op, uint64(e.pos), true, nil
}

// Next implements cow.Ops.
func (x *Index) Next(block uint64) (op cow.Op, pos uint64, ok bool, err error) {
	n, e, ok, err := x.covering(block)
	if err == nil && !ok {
		if n++; uint64(n) < x.root.ops {
			e, err = x.entry(n)
			ok = true
			if err == nil && e.op.NewBlock <= block { // first of a page that search did not look into
				err = x.badEntry(n, "entries are not in the order of their blocks")
			}
		}
	}
	if err != nil || !ok {
		return cow.Op{}, 0, false, err
	}
	return e.op, uint64(e.pos), true, nil
}

// covering returns the last entry that starts at or below the block, -1 if
// there is none, and whether it writes the block.
func (x *Index) covering(block uint64) (n int64, e entry, ok bool, err error) {
	n, err = x.search(block)
	if err != nil || n < 0 {
		return n, e, false, err
	}
	e, err = x.entry(n)
	return n, e, err == nil && block < e.op.NewBlock+uint64(e.op.Blocks), err
}

// search returns the number of the last entry that starts at or below the block,
// or -1.
func (x *Index) search(block uint64) (int64, error) {
	// child is the page to look into, counted in its level; above the top level
	// there is only the one.
	child := int64(0)
	begins := uint32(0) // its first block, as the level above says
	top := len(x.layout.levels) - 1
	for level := top; ; level-- {
		items, perPage, size := x.itemsOf(level)
		in := min(items-child*perPage, perPage) // items of the page
		if in <= 0 {
			return -1, nil // no op at all
		}
		p, err := x.page(x.layout.levels[level].first + child)
		if err != nil {
			return 0, err
		}
		// An item starts with a block, be it an entry or a number of the tree.
		above := sort.Search(int(in), func(i int) bool { return uint64(le.Uint32(p[int64(i)*size:])) > block })
		if level < top && le.Uint32(p[:]) != begins {
			return 0, x.file.bad((x.layout.levels[level].first+child)*pageSize, "the page begins at another block than the tree says")
		}
		item := child*perPage + int64(above) - 1
		if level == 0 || item < 0 {
			return item, nil
		}
		child, begins = item, le.Uint32(p[(int64(above)-1)*size:])
	}
}

// itemsOf returns the number of items of a level of the tree, how many of them
// a page holds and how many bytes they have.
func (x *Index) itemsOf(level int) (items, perPage, size int64) {
	if level == 0 {
		return int64(x.root.ops), entriesPage, entrySize
	}
	return x.layout.levels[level-1].n, numbersPage, numberSize
}

// entry returns entry n, which exists.
func (x *Index) entry(n int64) (entry, error) {
	p, err := x.page(entryPagesFrom + n/entriesPage)
	if err != nil {
		return entry{}, err
	}
	e, rule := x.root.decodeEntry(p[n%entriesPage*entrySize:][:entrySize])
	if rule != "" {
		return entry{}, x.badEntry(n, rule)
	}
	return e, nil
}

func (x *Index) badEntry(n int64, rule string) error {
	return x.file.bad((entryPagesFrom+n/entriesPage)*pageSize+n%entriesPage*entrySize, rule)
}

// page returns a page of the index, which must not be changed.
func (x *Index) page(n int64) (*indexPage, error) {
	key := pageKey{x.root.id, uint32(n)}
	if p, ok := x.cache.pages.Get(key); ok {
		return p, nil
	}
	p := new(indexPage)
	if err := x.file.readPage(n, p[:]); err != nil {
		return nil, err
	}
	x.cache.pages.Add(key, p)
	return p, nil
}
