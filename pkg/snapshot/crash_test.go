package snapshot

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/snapmerge/snapmerge/pkg/blockio/crashfs"
)

const (
	absent State = "absent"
)

// crashRun does things to a store and crashes it before every step.
type crashRun struct {
	t     *testing.T
	fsys  *crashfs.FS
	store *Store
	rng   *rand.Rand
	// perStep limits the crash images of a step.
	perStep int

	views map[string]*memView
	// before and after are the states of snapshots before and after what is being
	// done; a crash leaves one or the other.
	before, after map[string]State
	images        int
}

// do does something that takes snapshots to other states.
func (r *crashRun) do(what string, changes map[string]State, f func() error) {
	r.t.Helper()
	maps.Copy(r.after, changes)
	r.fsys.OnStep(func(s crashfs.Step) error {
		r.crash(fmt.Sprintf("%s, before step %d (%s)", what, s.N, s))
		return nil
	})
	err := f()
	r.fsys.OnStep(nil)
	must(r.t, err)
	maps.Copy(r.before, changes)
	r.crash(what + ", done")
}

// crash checks all that a crash now may leave.
func (r *crashRun) crash(when string) {
	for class, image := range r.fsys.CrashImages(r.perStep, r.rng) {
		r.images++
		if err := r.check(image); err != nil {
			r.t.Fatalf("%s: %s: %v", when, class, err)
		}
	}
}

// check is what a new process does with what it finds.
func (r *crashRun) check(fsys *crashfs.FS) error {
	s, err := OpenStore(fsys, r.store.dir)
	if err != nil {
		return err
	}
	// What was found stays, whatever comes.
	if again, err := OpenStore(fsys.Crash(crashfs.Nothing), s.dir); err != nil {
		return err
	} else if was, is := listed(s), listed(again); was != is {
		return fmt.Errorf("found %s, and %s after a power cut", was, is)
	}
	names, err := fsys.ReadDir(s.dir)
	if err != nil {
		return err
	}
	for _, name := range names {
		if strings.HasPrefix(name, ".") {
			return fmt.Errorf("%s was not swept", name)
		}
	}
	records, unreadable, err := s.List()
	if err != nil || len(unreadable) > 0 {
		return fmt.Errorf("list: %v, unreadable %v", err, unreadable)
	}
	found := map[string]Record{}
	for _, rec := range records {
		found[rec.ID] = rec
	}
	for _, id := range slices.Sorted(maps.Keys(r.after)) {
		state := absent
		rec, ok := found[id]
		if ok {
			state = rec.State
		}
		if state != r.before[id] && state != r.after[id] {
			return fmt.Errorf("%s is %s, not %s or %s", id, state, r.before[id], r.after[id])
		}
		if err := r.checkSnapshot(fsys, s, rec, state); err != nil {
			return fmt.Errorf("%s, %s: %w", id, state, err)
		}
		delete(found, id)
	}
	if len(found) > 0 {
		return fmt.Errorf("unknown snapshots %v", found)
	}
	return nil
}

// listed is all that a store lists.
func listed(s *Store) string {
	records, unreadable, err := s.List()
	b, _ := json.Marshal(records)
	return fmt.Sprint(string(b), unreadable, err)
}

// checkSnapshot goes on with a snapshot where the crash left it.
func (r *crashRun) checkSnapshot(fsys *crashfs.FS, s *Store, rec Record, state State) error {
	id := rec.ID
	if state == Pending {
		v := r.views[id]
		// A COW with a name is complete even before the record says so.
		if exists, err := fsys.Exists(s.COWPath(id)); err != nil {
			return err
		} else if exists {
			if err := checkSnapshot(fsys, s.Path(id), v.data); err != nil {
				return err
			}
		}
		info, err := Encode(ctx, fsys, s.Path(id), v, EncodeOptions{Jobs: 1})
		if err != nil {
			return err
		}
		if rec, err = s.SetReady(id, info); err != nil {
			return err
		}
		state = Ready
	}
	if state == Ready {
		if err := checkSnapshot(fsys, s.Path(id), r.views[id].data); err != nil {
			return err
		}
		if rec.COW.Length != int64(len(mustRead(fsys, s.COWPath(id)))) {
			return fmt.Errorf("record %+v", rec.COW)
		}
	}
	return nil
}

func mustRead(fsys *crashfs.FS, name string) []byte {
	b, _ := fsys.ReadFile(name)
	return b
}

// TestCrash takes a store through its life and cuts the power before every step.
func TestCrash(t *testing.T) {
	perStep := 60
	if testing.Short() {
		perStep = 20
	}
	rng := newRand(t, 1)
	r := &crashRun{
		t: t, fsys: crashfs.New("state"), rng: rng, perStep: perStep,
		views: map[string]*memView{
			"a": newView(rng, 30*bs),
			"b": newView(rng, 40*bs),
		},
		before: map[string]State{"a": absent, "b": absent},
		after:  map[string]State{"a": absent, "b": absent},
	}
	var err error
	r.store = &Store{fsys: r.fsys, dir: "state/snapshots"}
	r.fsys.OnStep(func(crashfs.Step) error { r.crash("open"); return nil })
	r.store, err = OpenStore(r.fsys, "state/snapshots")
	must(t, err)
	create := func(id string) func() error {
		return func() error {
			_, err := r.store.Create(Record{ID: id, Size: r.views[id].Size()})
			return err
		}
	}
	var info Info
	encode := func(id, compression string) func() error {
		return func() (err error) {
			info, err = Encode(ctx, r.fsys, r.store.Path(id), r.views[id], EncodeOptions{Jobs: 1, Compression: compression})
			if err == nil {
				// Durable from here on, whatever comes next.
				err = checkSnapshot(r.fsys.Crash(crashfs.Nothing), r.store.Path(id), r.views[id].data)
			}
			return err
		}
	}
	ready := func(id string) func() error {
		return func() error { _, err := r.store.SetReady(id, info); return err }
	}
	r.do("create a", map[string]State{"a": Pending}, create("a"))
	r.do("encode a", nil, encode("a", "none"))
	r.do("encode a again", nil, encode("a", "none"))
	r.do("a is ready", map[string]State{"a": Ready}, ready("a"))
	r.do("create b", map[string]State{"b": Pending}, create("b"))
	r.do("b fails", map[string]State{"b": Failed}, func() error { _, err := r.store.SetFailed("b", "no space"); return err })
	r.do("delete b", map[string]State{"b": absent}, func() error { return r.store.Delete("b") })
	r.do("create b", map[string]State{"b": Pending}, create("b"))
	r.do("encode b", nil, encode("b", "lz4"))
	r.do("b is ready", map[string]State{"b": Ready}, ready("b"))
	r.do("delete a", map[string]State{"a": absent}, func() error { return r.store.Delete("a") })
	r.do("open again", nil, func() error { _, err := OpenStore(r.fsys, "state/snapshots"); return err })
	r.do("delete b", map[string]State{"b": absent}, func() error { return r.store.Delete("b") })
	t.Logf("%d crash images, %d steps", r.images, r.fsys.Steps())
}

// TestCrashEncodeOverOther encodes over a complete snapshot of another image that
// has the same ops, so that COW, index and sums of the two could be taken for each
// other's. A COW is there with all that belongs to it, or is not there.
func TestCrashEncodeOverOther(t *testing.T) {
	rng := newRand(t, 3)
	v := newView(rng, 40*bs)
	old := slices.Clone(v.data)
	fsys := crashfs.New("d")
	_, err := Encode(ctx, fsys, "d", v, EncodeOptions{Compression: "none"})
	must(t, err)
	for off := 0; off < len(v.data); off += bs {
		if v.data[off] != 0 {
			v.data[off] ^= 0x55
		}
	}
	images := 0
	fsys.OnStep(func(s crashfs.Step) error {
		for class, image := range fsys.CrashImages(60, rng) {
			images++
			if exists, _ := image.Exists("d/data.cow"); !exists {
				continue
			}
			if checkSnapshot(image, "d", old) == nil {
				continue
			}
			if err := checkSnapshot(image, "d", v.data); err != nil {
				t.Fatalf("before %s: %s: %v", s, class, err)
			}
		}
		return nil
	})
	_, err = Encode(ctx, fsys, "d", v, EncodeOptions{Compression: "none"})
	must(t, err)
	t.Logf("%d crash images", images)
}

// TestCrashTwice crashes a second time while the store is opened after a crash
// in the middle of a removal or a creation.
func TestCrashTwice(t *testing.T) {
	rng := newRand(t, 2)
	images := 0
	states := func(fsys *crashfs.FS) (string, error) {
		s, err := OpenStore(fsys, "state/snapshots")
		if err != nil {
			return "", err
		}
		rec, err := s.Get("a")
		if errors.Is(err, ErrNotFound) {
			return "absent", nil
		}
		return string(rec.State), err
	}
	for _, what := range []string{"create", "delete"} {
		fsys, s := newStore(t)
		run := func() error { _, err := s.Create(Record{ID: "a"}); return err }
		if what == "delete" {
			must(t, run())
			must(t, fsys.Put("state/snapshots/a/data.cow", []byte("x")))
			run = func() error { return s.Delete("a") }
		}
		fsys.OnStep(func(first crashfs.Step) error {
			for class, image := range fsys.CrashImages(20, rng) {
				image.OnStep(func(second crashfs.Step) error {
					for class2, image := range image.CrashImages(20, rng) {
						images++
						if state, err := states(image); err != nil || state != "absent" && state != "pending" {
							t.Fatalf("%s: %s %s, %s %s: %s, %v", what, first, class, second, class2, state, err)
						}
					}
					return nil
				})
				_, err := OpenStore(image, "state/snapshots")
				must(t, err)
			}
			return nil
		})
		must(t, run())
		fsys.OnStep(nil)
	}
	t.Logf("%d crash images", images)
}
