package crashfs

import (
	"path"
	"slices"
	"strings"
	"sync"
	"syscall"

	"github.com/snapmerge/snapmerge/pkg/blockio"
)

const rootID = 1

// FS is a file system. Its methods, and those of its files, may be called
// concurrently.
type FS struct {
	mu sync.Mutex // guards everything below and every node

	nodes    map[int64]*node // all that is reachable, now or after a crash
	lastID   int64
	capacity int64 // in pages; 0: no limit
	steps    int64
	seq      int64 // of the last unsynced change
	hook     func(Step) error
}

// node is a file or a directory.
type node struct {
	id    int64
	isDir bool

	// Of a file:
	live, durable content
	effects       []*effect // unsynced, in order
	links         int       // live names
	open          int       // handles
	lock          *file     // the handle that holds the lock

	// Of a directory:
	entries, durableEntries map[string]int64
	ops                     []*dirOp // unsynced, in order
}

// effect is an unsynced change of one file.
type effect struct {
	step  Step
	seq   int64 // order among all unsynced changes
	node  int64
	data  []byte // of a write
	value []byte // of an attribute
}

// dirOp is an unsynced change of one or two directories.
type dirOp struct {
	step    Step
	seq     int64
	changes []change
}

// change sets a name of a directory; node 0 removes it.
type change struct {
	dir  int64
	name string
	node int64
}

var _ blockio.FS = (*FS)(nil)

// New makes a file system with the directories, parents included, durably in
// place. Relative names count from the root.
func New(dirs ...string) *FS {
	fsys := &FS{nodes: map[int64]*node{}}
	fsys.newNode(true)
	for _, dir := range dirs {
		at := fsys.nodes[rootID]
		for _, name := range split(dir) {
			if _, ok := at.entries[name]; !ok {
				id := fsys.newNode(true).id
				at.entries[name], at.durableEntries[name] = id, id
			}
			at = fsys.nodes[at.entries[name]]
		}
	}
	return fsys
}

// SetCapacity limits the space of file content, in bytes rounded down to pages
// of 4 KiB; 0 is no limit. What is full answers ENOSPC, after writing or, as ext4
// does, allocating the pages that still fit; space from Allocate is always there.
func (fsys *FS) SetCapacity(bytes int64) {
	fsys.mu.Lock()
	defer fsys.mu.Unlock()
	fsys.capacity = bytes / pageSize
}

// Used is the space that counts against the capacity, in bytes.
func (fsys *FS) Used() int64 {
	fsys.mu.Lock()
	defer fsys.mu.Unlock()
	return fsys.used() * pageSize
}

// Put makes a file with the content durably in place, without a step; its
// directory must be there and the name free.
func (fsys *FS) Put(name string, data []byte) error {
	fsys.mu.Lock()
	defer fsys.mu.Unlock()
	s := Step{Op: OpCreate, Name: clean(name)}
	dir, base, err := fsys.parent(s.Name)
	if err == nil && dir.entries[base] != 0 {
		err = syscall.EEXIST
	}
	if err != nil {
		return pathError(s, err)
	}
	n := fsys.newNode(false)
	n.live.write(0, slices.Clone(data))
	n.durable = n.live.clone()
	n.links = 1
	dir.entries[base], dir.durableEntries[base] = n.id, n.id
	return nil
}

// newNode: mu must be held.
func (fsys *FS) newNode(isDir bool) *node {
	fsys.lastID++
	n := &node{id: fsys.lastID, isDir: isDir}
	if isDir {
		n.entries, n.durableEntries = map[string]int64{}, map[string]int64{}
	}
	fsys.nodes[n.id] = n
	return n
}

func clean(name string) string { return path.Clean("/" + name) }

// split cuts a path into names; the root has none.
func split(name string) []string {
	return strings.FieldsFunc(clean(name), func(r rune) bool { return r == '/' })
}

// lookup finds a path; mu must be held.
func (fsys *FS) lookup(name string) (*node, error) {
	at := fsys.nodes[rootID]
	for _, part := range split(name) {
		if !at.isDir {
			return nil, syscall.ENOTDIR
		}
		id, ok := at.entries[part]
		if !ok {
			return nil, syscall.ENOENT
		}
		at = fsys.nodes[id]
	}
	return at, nil
}

// parent finds the directory that a path lies in; mu must be held.
func (fsys *FS) parent(name string) (dir *node, base string, err error) {
	dir, err = fsys.lookup(path.Dir(name))
	if err == nil && !dir.isDir {
		err = syscall.ENOTDIR
	}
	if base = path.Base(name); err == nil && base == "/" {
		err = syscall.EINVAL
	}
	return dir, base, err
}

// change makes a change of names live and remembers it as unsynced; mu must be
// held.
func (fsys *FS) change(s Step, changes ...change) {
	fsys.seq++
	op := &dirOp{step: s, seq: fsys.seq, changes: changes}
	for _, c := range changes {
		dir := fsys.nodes[c.dir]
		if old, ok := dir.entries[c.name]; ok {
			fsys.nodes[old].links--
		}
		c.apply(dir.entries)
		if c.node != 0 {
			fsys.nodes[c.node].links++
		}
		if n := len(dir.ops); n == 0 || dir.ops[n-1] != op {
			dir.ops = append(dir.ops, op)
		}
	}
}

func (c change) apply(entries map[string]int64) {
	if c.node == 0 {
		delete(entries, c.name)
	} else {
		entries[c.name] = c.node
	}
}

// used is the space of all files that have a name or a handle, in pages; mu
// must be held.
func (fsys *FS) used() (sum int64) {
	for _, n := range fsys.nodes {
		if n.links > 0 || n.open > 0 {
			sum += n.live.used
		}
	}
	return sum
}

// room is how many of the n bytes at off can be written or allocated; mu must
// be held.
func (fsys *FS) room(f *node, off, n int64) int64 {
	if fsys.capacity == 0 {
		return n
	}
	free := fsys.capacity - fsys.used()
	if f.live.missing(off, n) <= free {
		return n
	}
	fits := int64(0)
	pages(off, n, func(i int64, from, to int) {
		if f.live.page(i).data == nil {
			free--
		}
		if free >= 0 {
			fits += int64(to - from)
		}
	})
	return fits
}

// sweep forgets nodes that nothing leads to any more, in any crash image; mu
// must be held.
func (fsys *FS) sweep() {
	reached := map[int64]bool{}
	var visit func(id int64)
	visit = func(id int64) {
		if id == 0 || reached[id] {
			return
		}
		reached[id] = true
		n := fsys.nodes[id]
		for _, child := range n.entries {
			visit(child)
		}
		for _, child := range n.durableEntries {
			visit(child)
		}
		for _, op := range n.ops {
			for _, c := range op.changes {
				visit(c.dir)
				visit(c.node)
			}
		}
	}
	visit(rootID)
	for id, n := range fsys.nodes {
		if !reached[id] && n.open == 0 {
			delete(fsys.nodes, id)
		}
	}
}
