package crashfs

import (
	"fmt"
	"iter"
	"math/rand/v2"
	"slices"
	"strings"
)

const (
	// allSubsets is the most effects of which every subset is tried.
	allSubsets = 6
	// allDirs is the most combinations of directory prefixes that are all tried.
	allDirs = 32
	// randomImages is how many images a class of random ones gives when the
	// number of images is not limited.
	randomImages = 64
	// maxStale is how many selections in a row may repeat earlier ones before
	// there is taken to be nothing new.
	maxStale = 2000
)

// CrashImages enumerates file systems that a crash at this moment could leave,
// each with the name of its class, at most max of them (max <= 0: all of the
// finite classes and some of the random ones). Every image is independent of
// fsys and of the other images, and the moment is that of the call's first
// step, so fsys may go on being used. The classes:
//
//	killed      the process died: all is there, still unsynced (see Kill)
//	nothing     nothing unsynced survived
//	everything  everything did, durably
//	drop, keep  each single effect missing, each single one alone
//	prefix      each prefix of the effects
//	moment      everything up to some moment, effects and names
//	torn        an effect survives in part, by sectors: first the last one, cut
//	            at each sector, then any in any pattern
//	reversed    all effects, applied in the opposite order
//	subset      all subsets of up to six effects, random ones of more
//	names       each combination of directory prefixes (random ones of many),
//	            with all, none, and random ones of the effects
//
// The classes take turns, so that a low max sees something of
// every class; rng shuffles within a class (nil: a fixed seed). Images with the
// same survivors are given once.
func (fsys *FS) CrashImages(max int, rng *rand.Rand) iter.Seq2[string, *FS] {
	return func(yield func(string, *FS) bool) {
		if rng == nil {
			rng = rand.New(rand.NewPCG(1, 1))
		}
		e := newEnumeration(fsys.Kill(), rng)
		if max <= 0 {
			max = 1 << 62
			e.random = randomImages
		} else {
			e.random = 1 << 62
		}
		if !yield("killed", e.frozen.Kill()) {
			return
		}
		given := 1
		stale := 0 // in a row
		for name, sel := range e.selections() {
			if given >= max || stale >= maxStale {
				return
			}
			if !e.fresh(sel) {
				stale++
				continue
			}
			given++
			stale = 0
			if !yield(name, e.frozen.image(e.effects, sel)) {
				return
			}
		}
	}
}

// enumeration is the state of one walk through the crash images.
type enumeration struct {
	frozen  *FS
	effects []*effect
	dirs    []*node // with unsynced changes
	rng     *rand.Rand
	random  int // images that a random class tries
	seen    map[string]bool
	reached map[string]map[int64]*node // by how many changes of each directory survive
}

func newEnumeration(frozen *FS, rng *rand.Rand) *enumeration {
	return &enumeration{
		frozen: frozen, effects: frozen.effects(), dirs: frozen.unsyncedDirs(),
		rng: rng, seen: map[string]bool{}, reached: map[string]map[int64]*node{},
	}
}

// fresh tells whether no selection with the same survivors was tried before.
func (e *enumeration) fresh(sel selection) bool {
	e.frozen.untear(sel.dirs)
	var key []byte
	for _, d := range e.dirs {
		key = fmt.Appendf(key, "%d.", sel.dirs[d.id])
	}
	reached, ok := e.reached[string(key)]
	if !ok {
		names := &FS{nodes: map[int64]*node{}}
		names.survive(e.frozen, rootID, sel.dirs)
		reached = names.nodes
		e.reached[string(key)] = reached
	}
	for _, s := range sel.keep {
		if reached[e.effects[s.index].node] == nil {
			continue
		}
		key = fmt.Appendf(key, ",%d", s.index)
		for _, keep := range s.sectors {
			if keep {
				key = append(key, '+')
			} else {
				key = append(key, '-')
			}
		}
	}
	if e.seen[string(key)] {
		return false
	}
	e.seen[string(key)] = true
	return true
}

// class makes the selections of one class: false after the last.
type class func() (name string, sel selection, ok bool)

// selections goes through the classes in turn.
func (e *enumeration) selections() iter.Seq2[string, selection] {
	return func(yield func(string, selection) bool) {
		for _, s := range []struct {
			name string
			sel  selection
		}{
			{"nothing", selection{nil, e.noDirs()}},
			{"everything", selection{e.all(), e.allDirs()}},
			{"nothing but names", selection{nil, e.allDirs()}},
			{"everything but names", selection{e.all(), e.noDirs()}},
		} {
			if !yield(s.name, s.sel) {
				return
			}
		}
		classes := []class{
			e.drop(), e.keep(), e.prefix(), e.moment(), e.tornLast(), e.tornAny(), e.reversed(), e.subsets(), e.names(), e.mixed(),
		}
		for len(classes) > 0 {
			left := classes[:0]
			for _, c := range classes {
				name, sel, ok := c()
				if !ok {
					continue
				}
				left = append(left, c)
				if !yield(name, sel) {
					return
				}
			}
			classes = left
		}
	}
}

func (e *enumeration) all() []survivor {
	keep := make([]survivor, len(e.effects))
	for i := range keep {
		keep[i].index = i
	}
	return keep
}

// some is a random subset.
func (e *enumeration) some() []survivor {
	return slices.DeleteFunc(e.all(), func(survivor) bool { return e.rng.IntN(2) == 0 })
}

func (e *enumeration) noDirs() map[int64]int { return map[int64]int{} }

func (e *enumeration) allDirs() map[int64]int {
	dirs := map[int64]int{}
	for _, d := range e.dirs {
		dirs[d.id] = len(d.ops)
	}
	return dirs
}

func (e *enumeration) someDirs() map[int64]int {
	dirs := map[int64]int{}
	for _, d := range e.dirs {
		dirs[d.id] = e.rng.IntN(len(d.ops) + 1)
	}
	return dirs
}

// each makes a class of n selections in random order.
func (e *enumeration) each(n int, make func(i int) (string, selection)) class {
	order := e.rng.Perm(n)
	return func() (string, selection, bool) {
		if len(order) == 0 {
			return "", selection{}, false
		}
		name, sel := make(order[0])
		order = order[1:]
		return name, sel, true
	}
}

// randomly makes a class of up to e.random selections.
func (e *enumeration) randomly(make func(try int) (string, selection)) class {
	try := 0
	return func() (string, selection, bool) {
		if try >= e.random {
			return "", selection{}, false
		}
		name, sel := make(try)
		try++
		return name, sel, true
	}
}

// of names an effect for messages.
func (e *enumeration) of(i int) string {
	return fmt.Sprintf("effect %d of %d (%s)", i+1, len(e.effects), e.effects[i].step)
}

func (e *enumeration) drop() class {
	return e.each(len(e.effects), func(i int) (string, selection) {
		return "drop " + e.of(i), selection{slices.Delete(e.all(), i, i+1), e.allDirs()}
	})
}

func (e *enumeration) keep() class {
	return e.each(len(e.effects), func(i int) (string, selection) {
		return "keep " + e.of(i), selection{[]survivor{{index: i}}, e.allDirs()}
	})
}

func (e *enumeration) prefix() class {
	return e.each(len(e.effects), func(i int) (string, selection) {
		return "prefix before " + e.of(i), selection{e.all()[:i], e.allDirs()}
	})
}

// moment cuts effects and names at the same place in their common order.
func (e *enumeration) moment() class {
	var seqs []int64
	for _, f := range e.effects {
		seqs = append(seqs, f.seq)
	}
	for _, d := range e.dirs {
		for _, op := range d.ops {
			seqs = append(seqs, op.seq)
		}
	}
	return e.each(len(seqs), func(i int) (string, selection) {
		sel := selection{keep: e.all(), dirs: e.noDirs()}
		sel.keep = slices.DeleteFunc(sel.keep, func(s survivor) bool { return e.effects[s.index].seq >= seqs[i] })
		for _, d := range e.dirs {
			for _, op := range d.ops {
				if op.seq < seqs[i] {
					sel.dirs[d.id]++
				}
			}
		}
		return e.nameOf("moment", sel), sel
	})
}

// tornLast cuts the last effect that can be torn at each of its sectors.
func (e *enumeration) tornLast() class {
	last, sectors := -1, 0
	for i, f := range e.effects {
		if n := f.sectors(); n > 1 {
			last, sectors = i, n
		}
	}
	return e.each(max(sectors-1, 0), func(cut int) (string, selection) {
		cut++
		survive := make([]bool, sectors)
		for s := range cut {
			survive[s] = true
		}
		keep := e.all()
		keep[last].sectors = survive
		return fmt.Sprintf("torn after sector %d of %s", cut, e.of(last)), selection{keep, e.allDirs()}
	})
}

// tornAny tears one effect in a random pattern, among all or some of the others.
func (e *enumeration) tornAny() class {
	var can []int
	for i, f := range e.effects {
		if f.sectors() > 1 {
			can = append(can, i)
		}
	}
	if len(can) == 0 {
		return e.each(0, nil)
	}
	return e.randomly(func(try int) (string, selection) {
		torn := can[e.rng.IntN(len(can))]
		keep := e.all()
		if try%2 == 1 {
			keep = slices.DeleteFunc(keep, func(s survivor) bool { return s.index != torn && e.rng.IntN(2) == 0 })
		}
		e.tear(keep, torn)
		return fmt.Sprintf("torn %s, %d others", e.of(torn), len(keep)-1), selection{keep, e.allDirs()}
	})
}

// tear picks the surviving sectors of effect i at random.
func (e *enumeration) tear(keep []survivor, i int) {
	survive := make([]bool, e.effects[i].sectors())
	for s := range survive {
		survive[s] = e.rng.IntN(2) == 0
	}
	for k := range keep {
		if keep[k].index == i {
			keep[k].sectors = survive
		}
	}
}

func (e *enumeration) reversed() class {
	return e.each(1, func(int) (string, selection) {
		keep := e.all()
		slices.Reverse(keep)
		return "reversed", selection{keep, e.allDirs()}
	})
}

func (e *enumeration) subsets() class {
	if n := len(e.effects); n > allSubsets {
		return e.randomly(func(int) (string, selection) {
			keep := e.some()
			return e.subsetName(keep), selection{keep, e.allDirs()}
		})
	}
	return e.each(1<<len(e.effects), func(set int) (string, selection) {
		keep := slices.DeleteFunc(e.all(), func(s survivor) bool { return set>>s.index&1 == 0 })
		return e.subsetName(keep), selection{keep, e.allDirs()}
	})
}

func (e *enumeration) subsetName(keep []survivor) string {
	var b strings.Builder
	fmt.Fprintf(&b, "subset of %d effects:", len(e.effects))
	for _, s := range keep {
		fmt.Fprintf(&b, " %d", s.index+1)
	}
	return b.String()
}

// names goes through the combinations of directory prefixes.
func (e *enumeration) names() class {
	combinations := 1
	for _, d := range e.dirs {
		if combinations <= allDirs {
			combinations *= len(d.ops) + 1
		}
	}
	data := []func() []survivor{e.all, func() []survivor { return nil }, e.some}
	if combinations > allDirs {
		return e.randomly(func(try int) (string, selection) {
			sel := selection{data[try%3](), e.someDirs()}
			return e.nameOf("names", sel), sel
		})
	}
	return e.each(3*combinations, func(i int) (string, selection) {
		sel := selection{data[i%3](), e.noDirs()}
		rest := i / 3
		for _, d := range e.dirs {
			sel.dirs[d.id] = rest % (len(d.ops) + 1)
			rest /= len(d.ops) + 1
		}
		return e.nameOf("names", sel), sel
	})
}

// mixed is random in everything.
func (e *enumeration) mixed() class {
	if len(e.dirs) == 0 {
		return e.each(0, nil) // torn and subset have it all
	}
	return e.randomly(func(try int) (string, selection) {
		sel := selection{e.some(), e.someDirs()}
		if n := len(sel.keep); n > 0 && try%2 == 1 {
			if i := sel.keep[e.rng.IntN(n)].index; e.effects[i].sectors() > 1 {
				e.tear(sel.keep, i)
			}
		}
		return e.nameOf("mixed", sel), sel
	})
}

// nameOf tells everything about a selection.
func (e *enumeration) nameOf(class string, sel selection) string {
	var b strings.Builder
	b.WriteString(class)
	for _, d := range e.dirs {
		fmt.Fprintf(&b, " %s %d/%d,", e.frozen.path(d.id), sel.dirs[d.id], len(d.ops))
	}
	b.WriteByte(' ')
	b.WriteString(e.subsetName(sel.keep))
	return b.String()
}
