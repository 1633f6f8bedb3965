package crashfs

import (
	"cmp"
	"maps"
	"slices"

	"github.com/snapmerge/snapmerge/pkg/blockio"
)

// Policy says what survives a crash of what is not durable.
type Policy struct {
	// Keep tells whether an effect on a file survives; nil: none does. Survivors
	// apply in their order.
	Keep func(Step) bool
	// Dir tells how many of a directory's unsynced changes survive, counted from
	// the first; nil: none. A rename between directories takes the lesser of the
	// two answers.
	Dir func(dir string, changes []Step) int
}

var (
	// Nothing unsynced survives.
	Nothing = Policy{}
	// Everything survives, and is durable afterwards.
	Everything = Policy{
		Keep: func(Step) bool { return true },
		Dir:  func(_ string, changes []Step) int { return len(changes) },
	}
)

// Kill makes what a new process finds after the death of the old one, the
// machine going on: all content and names, still unsynced where they were, and
// no locks. Steps go on counting from where they were; the hook is not copied.
func (fsys *FS) Kill() *FS {
	fsys.mu.Lock()
	defer fsys.mu.Unlock()
	fsys.sweep()
	clone := &FS{nodes: make(map[int64]*node, len(fsys.nodes)), lastID: fsys.lastID, seq: fsys.seq, steps: fsys.steps, capacity: fsys.capacity}
	for id, n := range fsys.nodes {
		clone.nodes[id] = &node{
			id: n.id, isDir: n.isDir,
			live: n.live.clone(), durable: n.durable.clone(),
			effects: slices.Clone(n.effects), links: n.links,
			entries: maps.Clone(n.entries), durableEntries: maps.Clone(n.durableEntries),
			ops: slices.Clone(n.ops),
		}
	}
	clone.sweep() // handles died with the process
	return clone
}

// Crash makes what is left after a power cut.
func (fsys *FS) Crash(keep Policy) *FS {
	frozen := fsys.Kill()
	sel := selection{dirs: map[int64]int{}}
	if keep.Keep != nil {
		for i, e := range frozen.effects() {
			if keep.Keep(e.step) {
				sel.keep = append(sel.keep, survivor{index: i})
			}
		}
	}
	if keep.Dir != nil {
		for _, dir := range frozen.unsyncedDirs() {
			steps := make([]Step, len(dir.ops))
			for i, op := range dir.ops {
				steps[i] = op.step
			}
			sel.dirs[dir.id] = keep.Dir(frozen.path(dir.id), steps)
		}
	}
	return frozen.image(frozen.effects(), sel)
}

// selection is what survives.
type selection struct {
	keep []survivor    // in the order in which they apply
	dirs map[int64]int // how many changes of a directory; absent: none
}

// survivor is an effect that survives, whole if sectors is nil, else only those
// of its sectors that it says yes to.
type survivor struct {
	index   int
	sectors []bool
}

// effects lists all unsynced effects in order. The file system must be frozen:
// a clone that nobody else uses yet.
func (fsys *FS) effects() []*effect {
	var all []*effect
	for _, n := range fsys.nodes {
		all = append(all, n.effects...)
	}
	slices.SortFunc(all, func(a, b *effect) int { return cmp.Compare(a.seq, b.seq) })
	return all
}

// unsyncedDirs lists the directories with unsynced changes, by id.
func (fsys *FS) unsyncedDirs() []*node {
	var dirs []*node
	for _, n := range fsys.nodes {
		if len(n.ops) > 0 {
			dirs = append(dirs, n)
		}
	}
	slices.SortFunc(dirs, func(a, b *node) int { return cmp.Compare(a.id, b.id) })
	return dirs
}

// path finds a live or durable name of a directory, for messages.
func (fsys *FS) path(id int64) string {
	if id == rootID {
		return "/"
	}
	for _, n := range fsys.nodes {
		for _, entries := range []map[string]int64{n.entries, n.durableEntries} {
			for name, child := range entries {
				if child == id {
					return clean(fsys.path(n.id) + "/" + name)
				}
			}
		}
	}
	return "(removed)"
}

// untear lowers the numbers of surviving changes until no change survives in
// one directory alone.
func (fsys *FS) untear(dirs map[int64]int) {
	for again := true; again; {
		again = false
		for id, n := range dirs {
			for i, op := range fsys.nodes[id].ops[:n] {
				for _, c := range op.changes {
					if !slices.Contains(fsys.nodes[c.dir].ops[:dirs[c.dir]], op) {
						dirs[id] = i
						again = true
					}
				}
				if again {
					break
				}
			}
			if again {
				break
			}
		}
	}
}

// image builds what a selection leaves of a frozen file system. all is
// fsys.effects().
func (fsys *FS) image(all []*effect, sel selection) *FS {
	fsys.untear(sel.dirs)
	img := &FS{nodes: map[int64]*node{}, lastID: fsys.lastID, seq: fsys.seq, steps: fsys.steps, capacity: fsys.capacity}
	img.survive(fsys, rootID, sel.dirs)
	for _, s := range sel.keep {
		if n := img.nodes[all[s.index].node]; n != nil {
			all[s.index].applySectors(&n.live, s.sectors)
		}
	}
	for _, n := range img.nodes {
		n.durable = n.live.clone()
	}
	return img
}

// survive copies the node with the durable content, and what it leads to.
func (fsys *FS) survive(from *FS, id int64, dirs map[int64]int) {
	if fsys.nodes[id] != nil {
		return
	}
	old := from.nodes[id]
	n := &node{id: id, isDir: old.isDir}
	fsys.nodes[id] = n
	if !old.isDir {
		n.live = old.durable.clone()
		return
	}
	n.entries = maps.Clone(old.durableEntries)
	for _, op := range old.ops[:dirs[id]] {
		for _, c := range op.changes {
			if c.dir == id {
				c.apply(n.entries)
			}
		}
	}
	n.durableEntries = maps.Clone(n.entries)
	for _, child := range n.entries {
		fsys.survive(from, child, dirs)
		fsys.nodes[child].links++
	}
}

// apply does the whole effect.
func (e *effect) apply(c *content) {
	switch e.step.Op {
	case OpWrite:
		c.write(e.step.Off, e.data)
	case OpTruncate:
		c.truncate(e.step.Off)
	case OpZero:
		c.zero(e.step.Off, e.step.Len)
	case OpAllocate:
		c.allocate(e.step.Off, e.step.Len)
	case OpSetXattr, OpRemoveXattr:
		c.setXattr(e.step.Other, e.value)
	}
}

// sectors is how many sectors of the file the effect touches; 0: it cannot be
// torn.
func (e *effect) sectors() int {
	if e.step.Op != OpWrite && e.step.Op != OpZero {
		return 0
	}
	first := e.step.Off / blockio.SectorSize
	end := e.step.Off + e.step.Len
	return int((end+blockio.SectorSize-1)/blockio.SectorSize - first)
}

// applySectors does the sectors of the effect that survive; nil: all.
func (e *effect) applySectors(c *content, survive []bool) {
	if survive == nil {
		e.apply(c)
		return
	}
	end := e.step.Off + e.step.Len
	off := e.step.Off
	for _, keep := range survive {
		next := min(end, (off/blockio.SectorSize+1)*blockio.SectorSize)
		if keep && e.step.Op == OpWrite {
			c.write(off, e.data[off-e.step.Off:next-e.step.Off])
		} else if keep {
			c.zero(off, next-off)
		}
		off = next
	}
}
