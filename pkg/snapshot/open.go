package snapshot

import (
	"errors"
	"fmt"
	"io/fs"

	"github.com/snapmerge/snapmerge/pkg/blockio"
	"github.com/snapmerge/snapmerge/pkg/cow"
)

// OpenCOWOptions says how to open a COW.
type OpenCOWOptions struct {
	// Cache is for the pages of the index; nil stands for a cache of
	// DefaultCacheBytes for this COW alone.
	Cache *Cache
	// Label opens an unfinished file at a label, as cow.OpenOptions does. An index
	// covers a whole file, so it is not used then.
	Label *uint64
	// NoIndex loads the ops even if there is an index.
	NoIndex bool
	// CheckIndex reads the ops of the COW once to see that the index is of just
	// these. It is for COWs that others than this project may have replaced without
	// their index: one of the same length and header is not told apart otherwise.
	CheckIndex bool
}

// COW is an open COW with its ops.
type COW struct {
	File     blockio.File
	Ops      cow.Ops
	Identity cow.Identity
	Header   cow.Header
	// IndexError says why the index beside the file is not in use; nil if it is,
	// if there is none, or if it was not asked for.
	IndexError error

	index blockio.File // nil without an index
}

// OpenCOW opens a COW for reading. With an index beside it nothing is read but
// the header of the one and the root of the other, so that neither time nor
// memory grow with its size. Without an index, or if the index is not good, the
// ops are checked and loaded (cow.Table). Damage deeper in an index shows as
// errors of Ops that wrap ErrIndex; the COW can be opened with NoIndex then.
func OpenCOW(fsys blockio.FS, path string, o OpenCOWOptions) (*COW, error) {
	f, err := fsys.Open(path, blockio.ReadOnly)
	if err != nil {
		return nil, err
	}
	c := &COW{File: f}
	if err := c.open(fsys, path, o); err != nil {
		return nil, errors.Join(fmt.Errorf("%s: %w", path, err), f.Close())
	}
	return c, nil
}

func (c *COW) open(fsys blockio.FS, path string, o OpenCOWOptions) error {
	file, err := cow.Open(c.File, c.File.Size(), cow.OpenOptions{Label: o.Label})
	if err != nil {
		return err
	}
	c.Header = file.Header()
	if o.Label == nil && !o.NoIndex {
		c.IndexError = c.openIndex(fsys, IndexPath(path), file, o)
		if c.Ops != nil {
			return nil
		}
	}
	t, err := file.Load()
	if err != nil {
		return err
	}
	c.Ops, c.Identity = t, t.Identity()
	return nil
}

// openIndex sets Ops if there is a good index.
func (c *COW) openIndex(fsys blockio.FS, path string, file *cow.File, o OpenCOWOptions) error {
	f, err := fsys.Open(path, blockio.ReadOnly)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("%w: %w", ErrIndex, err)
	}
	x, err := c.checkIndex(f, o.Cache)
	if err == nil && o.CheckIndex {
		err = x.checkOps(file)
	}
	if err != nil {
		return errors.Join(err, f.Close())
	}
	c.Ops, c.Identity, c.index = x, x.Identity(), f
	return nil
}

func (c *COW) checkIndex(f blockio.File, cache *Cache) (*Index, error) {
	header, err := storedHeader(c.File, c.Header)
	if err != nil {
		return nil, err
	}
	x, err := OpenIndex(f, c.File.Size(), header, cache)
	if err == nil && c.Header.NumMergeOps > x.Len() {
		// If the COW is at fault, loading it will say so.
		err = pagedFile{f, ErrIndex}.bad(32, fmt.Sprintf("%d ops, of which %d are merged, as the COW says", x.Len(), c.Header.NumMergeOps))
	}
	return x, err
}

// Indexed tells whether Ops come from an index.
func (c *COW) Indexed() bool { return c.index != nil }

// Close closes the files. Ops must not be used any more.
func (c *COW) Close() error {
	err := c.File.Close()
	if c.index != nil {
		err = errors.Join(err, c.index.Close())
	}
	return err
}
