package crashfs

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"path"
	"slices"
	"strings"
	"testing"

	"github.com/snapmerge/snapmerge/pkg/blockio"
)

// model is the same file system done naively: the history of everything that
// ever happened, replayed from the start for each question.
type model struct {
	history []*event
	files   int
}

// event is one step. A change of content has a file, a change of names has
// entries.
type event struct {
	n       int64
	file    int
	content func(data []byte) []byte
	xattr   func(map[string]string)
	entries map[string]int // full name: file number, or 0 for removed
	durable bool
}

func (m *model) flush(file int) {
	for _, e := range m.history {
		if e.file == file && e.entries == nil {
			e.durable = true
		}
	}
}

func (e *event) in(dir string) bool {
	for name := range e.entries {
		if path.Dir(name) == dir {
			return true
		}
	}
	return false
}

// syncDir marks the directory's changes, and all that precedes a marked one in
// any of its directories.
func (m *model) syncDir(dir string) {
	for _, e := range m.history {
		if e.in(dir) {
			e.durable = true
		}
	}
	for changed := true; changed; {
		changed = false
		for i, e := range m.history {
			for _, later := range m.history[i:] {
				for name := range later.entries {
					if later.durable && !e.durable && e.in(path.Dir(name)) {
						e.durable, changed = true, true
					}
				}
			}
		}
	}
}

// state replays the events that survive: names and contents by name.
func (m *model) state(survives func(*event) bool) map[string]string {
	data := map[int][]byte{}
	xattrs := map[int]map[string]string{}
	names := map[string]int{}
	for _, e := range m.history {
		if !survives(e) {
			continue
		}
		if xattrs[e.file] == nil {
			xattrs[e.file] = map[string]string{}
		}
		switch {
		case e.entries != nil:
			for name, file := range e.entries {
				if file == 0 {
					delete(names, name)
				} else {
					names[name] = file
				}
			}
		case e.content != nil:
			data[e.file] = e.content(slices.Clone(data[e.file]))
		default:
			e.xattr(xattrs[e.file])
		}
	}
	out := map[string]string{}
	for name, file := range names {
		out[name] = fmt.Sprintf("%q %v", data[file], xattrs[file])
	}
	return out
}

// observe is the state of a real one in the same form.
func observe(t *testing.T, fsys *FS) map[string]string {
	t.Helper()
	out := map[string]string{}
	for _, dir := range []string{"/a", "/b"} {
		names, err := fsys.ReadDir(dir)
		ok(t, err)
		for _, base := range names {
			name := path.Join(dir, base)
			f := open(t, fsys, name, blockio.ReadOnly)
			xattrs := map[string]string{}
			for _, x := range []string{"user.x", "user.y"} {
				if v, err := f.Xattr(x); err == nil {
					xattrs[x] = string(v)
				}
			}
			out[name] = fmt.Sprintf("%q %v", readAll(fsys, name), xattrs)
			ok(t, f.Close())
		}
	}
	return out
}

func compare(t *testing.T, when string, got, want map[string]string) {
	t.Helper()
	for _, name := range []string{"/a/1", "/a/2", "/a/3", "/b/1", "/b/2", "/b/3"} {
		if g, w := short(got[name]), short(want[name]); got[name] != want[name] {
			t.Fatalf("%s: %s is\n%s\nwant\n%s", when, name, g, w)
		}
	}
}

// short writes runs of one byte as the byte and its count.
func short(s string) string {
	var b strings.Builder
	s = strings.ReplaceAll(s, `\x00`, "0")
	for len(s) > 0 {
		rest := strings.TrimLeft(s, s[:1])
		fmt.Fprintf(&b, "%c", s[0])
		if n := len(s) - len(rest); n > 1 {
			fmt.Fprintf(&b, "*%d ", n)
		}
		s = rest
	}
	return b.String()
}

func TestAgainstModel(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	for round := range 30 {
		rng := rand.New(rand.NewPCG(seed, uint64(round)))
		runModel(t, rng)
		if t.Failed() {
			t.Fatalf("round %d", round)
		}
	}
}

func runModel(t *testing.T, rng *rand.Rand) {
	fsys := New("/a", "/b")
	m := &model{}
	names := []string{"/a/1", "/a/2", "/a/3", "/b/1", "/b/2", "/b/3"}
	pick := func() string { return names[rng.IntN(len(names))] }
	live := map[string]int{} // the model's own idea of names
	open := map[int]blockio.File{}
	var n int64
	fsys.OnStep(func(s Step) error { n = s.N; return nil })
	record := func(e *event) { e.n = n; m.history = append(m.history, e) }

	for range 100 {
		name, other := pick(), pick()
		file := live[name]
		f := open[file]
		off, size := rng.Int64N(3*pageSize), rng.Int64N(2*pageSize)
		if rng.IntN(2) == 0 {
			off, size = off&^511, size&^511
		}
		switch op := rng.IntN(13); {
		case op == 0 || file == 0: // create
			if file != 0 {
				continue
			}
			g, err := fsys.Open(name, blockio.Create|blockio.Excl)
			ok(t, err)
			m.files++
			live[name], open[m.files] = m.files, g
			record(&event{entries: map[string]int{name: m.files}})
		case op <= 4:
			data := bytes.Repeat([]byte{byte('a' + rng.IntN(26))}, int(size))
			if len(data) == 0 {
				continue
			}
			_, err := f.WriteAt(data, off)
			ok(t, err)
			record(&event{file: file, content: func(old []byte) []byte {
				old = grow(old, off+size)
				copy(old[off:], data)
				return old
			}})
		case op == 5:
			ok(t, f.Truncate(off))
			record(&event{file: file, content: func(old []byte) []byte { return grow(old, off)[:off] }})
		case op == 6:
			off, size := off&^511, size&^511+512
			ok(t, f.Zero(off, size))
			record(&event{file: file, content: func(old []byte) []byte {
				old = grow(old, off+size)
				clear(old[off : off+size])
				return old
			}})
		case op == 7:
			ok(t, f.Allocate(off, size+1))
			record(&event{file: file, content: func(old []byte) []byte { return grow(old, off+size+1) }})
		case op == 8:
			x, v := []string{"user.x", "user.y"}[rng.IntN(2)], fmt.Sprint(rng.IntN(100))
			if rng.IntN(3) == 0 {
				ok(t, f.RemoveXattr(x))
				record(&event{file: file, xattr: func(m map[string]string) { delete(m, x) }})
			} else {
				ok(t, f.SetXattr(x, []byte(v)))
				record(&event{file: file, xattr: func(m map[string]string) { m[x] = v }})
			}
		case op == 9:
			ok(t, f.Flush())
			m.flush(file)
		case op == 10:
			if live[other] == file {
				continue
			}
			ok(t, fsys.Rename(name, other))
			delete(live, name)
			live[other] = file
			record(&event{entries: map[string]int{name: 0, other: file}})
		case op == 11 && rng.IntN(2) == 0:
			ok(t, fsys.Remove(name))
			delete(live, name)
			record(&event{entries: map[string]int{name: 0}})
		case op == 11:
			if live[other] != 0 {
				continue
			}
			ok(t, fsys.Link(name, other))
			live[other] = file
			record(&event{entries: map[string]int{other: file}})
		case op == 12:
			ok(t, fsys.SyncDir(path.Dir(name)))
			m.syncDir(path.Dir(name))
		}
		if rng.IntN(8) == 0 {
			compare(t, "live", observe(t, fsys), m.state(func(*event) bool { return true }))
			crashModel(t, rng, fsys, m)
		}
		if rng.IntN(20) == 0 { // go on after a kill, with new handles
			fsys = fsys.Kill()
			fsys.OnStep(func(s Step) error { n = s.N; return nil })
			for name, file := range live {
				g, err := fsys.Open(name, 0)
				ok(t, err)
				open[file] = g
			}
		}
	}
}

func grow(data []byte, size int64) []byte {
	if more := size - int64(len(data)); more > 0 {
		data = append(data, make([]byte, more)...)
	}
	return data
}

// crashModel compares one random crash.
func crashModel(t *testing.T, rng *rand.Rand, fsys *FS, m *model) {
	dropped := map[int64]bool{}
	for _, e := range m.history {
		dropped[e.n] = !e.durable && rng.IntN(3) == 0
	}
	counts := map[string]int{"/a": rng.IntN(6), "/b": rng.IntN(6)}
	img := fsys.Crash(Policy{
		Keep: func(s Step) bool { return !dropped[s.N] },
		Dir: func(dir string, changes []Step) int {
			return min(counts[dir], len(changes))
		},
	})
	// A change of names survives if it is among the first of all its directories;
	// one that dies ends the prefix of each.
	alive := map[*event]bool{}
	ended := map[string]bool{}
	for _, e := range m.history {
		if e.entries == nil || e.durable {
			continue
		}
		alive[e] = true
		for _, dir := range []string{"/a", "/b"} {
			if e.in(dir) && (ended[dir] || counts[dir] == 0) {
				alive[e] = false
			}
		}
		for _, dir := range []string{"/a", "/b"} {
			if e.in(dir) {
				counts[dir]--
				ended[dir] = ended[dir] || !alive[e]
			}
		}
	}
	want := m.state(func(e *event) bool {
		if e.entries != nil {
			return e.durable || alive[e]
		}
		return e.durable || !dropped[e.n]
	})
	compare(t, "crash", observe(t, img), want)
}
