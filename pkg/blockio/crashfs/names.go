package crashfs

import (
	"errors"
	"io/fs"
	"maps"
	"path"
	"slices"
	"strings"
	"syscall"

	"github.com/snapmerge/snapmerge/pkg/blockio"
)

// Open ignores blockio.Direct.
func (fsys *FS) Open(name string, flag blockio.Flag) (blockio.File, error) {
	f := &file{fsys: fsys, name: clean(name), readOnly: flag&blockio.ReadOnly != 0}
	fsys.mu.Lock()
	err := fsys.openFile(f, flag)
	fsys.mu.Unlock()
	if err == nil {
		return f, nil
	}
	if !errors.Is(err, syscall.ENOENT) || flag&blockio.Create == 0 {
		return nil, pathError(Step{Op: "open", Name: f.name}, err)
	}
	s := Step{Op: OpCreate, Name: f.name}
	var dir *node
	var base string
	err = fsys.do(s, func() (err error) {
		if dir, base, err = fsys.parent(f.name); err == nil && dir.entries[base] != 0 {
			err = syscall.EEXIST // another goroutine made it
		}
		return err
	}, func(s Step) {
		f.node = fsys.newNode(false)
		f.node.open++
		fsys.change(s, change{dir.id, base, f.node.id})
	})
	if errors.Is(err, syscall.EEXIST) && flag&blockio.Excl == 0 {
		return fsys.Open(name, flag)
	}
	if err != nil {
		return nil, err
	}
	return f, nil
}

// openFile opens what is there; mu must be held.
func (fsys *FS) openFile(f *file, flag blockio.Flag) error {
	n, err := fsys.lookup(f.name)
	switch {
	case err != nil:
		return err
	case flag&blockio.Create != 0 && flag&blockio.Excl != 0:
		return syscall.EEXIST
	case n.isDir:
		return syscall.EISDIR
	}
	f.node = n
	n.open++
	return nil
}

// ReadFile returns the whole content.
func (fsys *FS) ReadFile(name string) ([]byte, error) {
	f, err := fsys.Open(name, blockio.ReadOnly)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data := make([]byte, f.Size())
	_, err = f.ReadAt(data, 0)
	return data, err
}

// Rename replaces what is there under the new name, in one atomic step.
func (fsys *FS) Rename(oldName, newName string) error {
	s := Step{Op: OpRename, Name: clean(oldName), Other: clean(newName)}
	var from, to *node
	var oldBase, newBase string
	var same bool
	return fsys.do(s, func() error {
		n, err := fsys.lookup(s.Name)
		if err != nil {
			return err
		}
		if from, oldBase, err = fsys.parent(s.Name); err != nil {
			return err
		}
		if to, newBase, err = fsys.parent(s.Other); err != nil {
			return err
		}
		if n.isDir && strings.HasPrefix(s.Other, s.Name+"/") {
			return syscall.EINVAL
		}
		target, ok := fsys.nodes[to.entries[newBase]]
		same = ok && target == n // two names of one file: rename does nothing
		switch {
		case !ok || same:
			return nil
		case n.isDir && !target.isDir:
			return syscall.ENOTDIR
		case !n.isDir && target.isDir:
			return syscall.EISDIR
		case target.isDir && len(target.entries) > 0:
			return syscall.ENOTEMPTY
		}
		return nil
	}, func(s Step) {
		if !same {
			fsys.change(s, change{from.id, oldBase, 0}, change{to.id, newBase, from.entries[oldBase]})
		}
	})
}

// Link makes a hard link.
func (fsys *FS) Link(oldName, newName string) error {
	s := Step{Op: OpLink, Name: clean(oldName), Other: clean(newName)}
	var n, dir *node
	var base string
	return fsys.do(s, func() (err error) {
		if n, err = fsys.lookup(s.Name); err != nil {
			return err
		}
		if n.isDir {
			return syscall.EPERM
		}
		if dir, base, err = fsys.parent(s.Other); err == nil && dir.entries[base] != 0 {
			err = syscall.EEXIST
		}
		return err
	}, func(s Step) {
		fsys.change(s, change{dir.id, base, n.id})
	})
}

// Remove removes a file or an empty directory.
func (fsys *FS) Remove(name string) error {
	s := Step{Op: OpRemove, Name: clean(name)}
	var dir *node
	var base string
	return fsys.do(s, func() error {
		n, err := fsys.lookup(s.Name)
		if err == nil && n.isDir && len(n.entries) > 0 {
			err = syscall.ENOTEMPTY
		}
		if err == nil {
			dir, base, err = fsys.parent(s.Name)
		}
		return err
	}, func(s Step) {
		fsys.change(s, change{dir.id, base, 0})
	})
}

// RemoveAll removes a tree, one step for each name in it.
func (fsys *FS) RemoveAll(name string) error {
	names, err := fsys.ReadDir(name)
	if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, syscall.ENOTDIR) {
		return err
	}
	for _, child := range names {
		if err := fsys.RemoveAll(path.Join(name, child)); err != nil {
			return err
		}
	}
	err = fsys.Remove(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// Mkdir makes a directory.
func (fsys *FS) Mkdir(name string) error {
	s := Step{Op: OpMkdir, Name: clean(name)}
	var dir *node
	var base string
	return fsys.do(s, func() (err error) {
		if dir, base, err = fsys.parent(s.Name); err == nil && dir.entries[base] != 0 {
			err = syscall.EEXIST
		}
		return err
	}, func(s Step) {
		fsys.change(s, change{dir.id, base, fsys.newNode(true).id})
	})
}

// ReadDir returns the names in a directory, sorted.
func (fsys *FS) ReadDir(name string) ([]string, error) {
	fsys.mu.Lock()
	defer fsys.mu.Unlock()
	n, err := fsys.lookup(name)
	if err == nil && !n.isDir {
		err = syscall.ENOTDIR
	}
	if err != nil {
		return nil, pathError(Step{Op: "read dir", Name: clean(name)}, err)
	}
	return slices.Sorted(maps.Keys(n.entries)), nil
}

// Exists tells whether the name is there.
func (fsys *FS) Exists(name string) (bool, error) {
	fsys.mu.Lock()
	defer fsys.mu.Unlock()
	_, err := fsys.lookup(name)
	switch err {
	case nil:
		return true, nil
	case syscall.ENOENT:
		return false, nil
	}
	return false, pathError(Step{Op: "stat", Name: clean(name)}, err)
}

// SyncDir makes the directory's changes durable.
func (fsys *FS) SyncDir(name string) error {
	s := Step{Op: OpSyncDir, Name: clean(name)}
	var dir *node
	return fsys.do(s, func() (err error) {
		if dir, err = fsys.lookup(s.Name); err == nil && !dir.isDir {
			err = syscall.ENOTDIR
		}
		return err
	}, func(Step) {
		fsys.commit(dir, len(dir.ops))
		fsys.sweep()
	})
}

// commit makes the first n unsynced changes of a directory durable, and what
// must not be torn from them; mu must be held.
func (fsys *FS) commit(dir *node, n int) {
	for ; n > 0; n-- {
		op := dir.ops[0]
		dir.ops = dir.ops[1:]
		for _, c := range op.changes {
			if c.dir == dir.id {
				c.apply(dir.durableEntries)
				continue
			}
			other := fsys.nodes[c.dir]
			if i := slices.Index(other.ops, op); i >= 0 {
				fsys.commit(other, i+1)
			}
		}
	}
}
