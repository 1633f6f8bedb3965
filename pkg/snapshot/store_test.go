package snapshot

import (
	"errors"
	"fmt"
	"path"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/snapmerge/snapmerge/pkg/blockio"
	"github.com/snapmerge/snapmerge/pkg/blockio/crashfs"
)

var someRecord = Record{
	ID: "snap-1", Name: "a snapshot", SourceVolumeID: "vol-1", Size: 1 << 30,
	CreatedAt: time.Date(2026, 7, 1, 12, 30, 15, 123456789, time.UTC), FSType: "ext4",
}

func newStore(t testing.TB) (*crashfs.FS, *Store) {
	t.Helper()
	fsys := crashfs.New("state")
	s, err := OpenStore(fsys, "state/snapshots")
	must(t, err)
	return fsys, s
}

func TestStore(t *testing.T) {
	for _, onDisk := range []bool{false, true} {
		t.Run(fmt.Sprint("on disk ", onDisk), func(t *testing.T) {
			var fsys blockio.FS = crashfs.New("state")
			dir := "state/snapshots"
			if onDisk {
				fsys, dir = blockio.OS(), path.Join(t.TempDir(), "snapshots")
			}
			s, err := OpenStore(fsys, dir)
			must(t, err)
			want := someRecord
			want.FormatVersion, want.State = 1, Pending
			created, err := s.Create(someRecord)
			must(t, err)
			got, err := s.Get("snap-1")
			must(t, err)
			if !reflect.DeepEqual(created, want) || !reflect.DeepEqual(got, want) {
				t.Fatalf("created %+v, got %+v, want %+v", created, got, want)
			}
			if _, err := s.Create(someRecord); !errors.Is(err, ErrExists) {
				t.Errorf("created twice: error %v", err)
			}
			info := Info{Length: 5, CRC: 1 << 31, Ops: 7, Blocks: 9, Compression: "lz4"}
			want.State, want.COW = Ready, &info
			got, err = s.SetReady("snap-1", info)
			must(t, err)
			if !reflect.DeepEqual(got, want) {
				t.Errorf("ready: %+v, want %+v", got, want)
			}
			other := someRecord
			other.ID = "a.b_c-0"
			_, err = s.Create(other)
			must(t, err)
			failed, err := s.SetFailed("a.b_c-0", "no space")
			must(t, err)
			if failed.State != Failed || failed.Message != "no space" {
				t.Errorf("failed: %+v", failed)
			}

			s, err = OpenStore(fsys, dir)
			must(t, err)
			records, unreadable, err := s.List()
			must(t, err)
			if !reflect.DeepEqual(records, []Record{failed, want}) || len(unreadable) > 0 {
				t.Errorf("list %+v, unreadable %v", records, unreadable)
			}
			must(t, s.Delete("snap-1"))
			must(t, s.Delete("snap-1"))
			if _, err := s.Get("snap-1"); !errors.Is(err, ErrNotFound) {
				t.Errorf("deleted: error %v", err)
			}
			if _, err := s.SetReady("snap-1", info); !errors.Is(err, ErrNotFound) {
				t.Errorf("update of a deleted one: error %v", err)
			}
			names, err := fsys.ReadDir(dir)
			must(t, err)
			if fmt.Sprint(names) != "[a.b_c-0]" {
				t.Errorf("files %v", names)
			}
		})
	}
}

func TestIDs(t *testing.T) {
	fsys, s := newStore(t)
	for _, test := range []struct {
		id    string
		valid bool
	}{
		{"a", true}, {"0", true}, {"snap-8c3f_A.b", true}, {strings.Repeat("x", 128), true},
		{"", false}, {".", false}, {"..", false}, {".new-a", false}, {"-a", false}, {"a/b", false}, {"../a", false},
		{"a/../../b", false}, {"/a", false}, {"a\x00", false}, {"a\n", false}, {"ä", false}, {"a b", false},
		{strings.Repeat("x", 129), false}, {"lost+found", false},
	} {
		before := fsys.Steps()
		if err := CheckID(test.id); (err == nil) != test.valid || err != nil && !errors.Is(err, ErrInvalidID) {
			t.Errorf("CheckID(%q) = %v", test.id, err)
		}
		if test.valid {
			continue
		}
		if _, err := s.Create(Record{ID: test.id}); !errors.Is(err, ErrInvalidID) {
			t.Errorf("Create(%q) = %v", test.id, err)
		}
		if _, err := s.Get(test.id); !errors.Is(err, ErrNotFound) {
			t.Errorf("Get(%q) = %v", test.id, err)
		}
		if err := s.Delete(test.id); err != nil {
			t.Errorf("Delete(%q) = %v", test.id, err)
		}
		if fsys.Steps() != before {
			t.Errorf("%q: something was written", test.id)
		}
	}
}

// TestUnreadableRecords: records that cannot be used are told of and kept.
func TestUnreadableRecords(t *testing.T) {
	good := `{"formatVersion":1,"id":"x","name":"n","sourceVolumeID":"v","sizeBytes":4096,"createdAt":"2026-07-01T12:30:15.123456789Z","state":"pending"}`
	tests := []struct {
		name, content string
		want          error
	}{
		{"good", good, nil},
		{"empty", "", ErrDamaged},
		{"zeros", strings.Repeat("\x00", 200), ErrDamaged},
		{"cut off", good[:50], ErrDamaged},
		{"more behind it", good + "{}", ErrDamaged},
		{"version 0", strings.Replace(good, `Version":1`, `Version":0`, 1), ErrDamaged},
		{"newer", `{"formatVersion":2,"id":[],"anything":"else"}`, ErrNewer},
		{"unknown field", strings.Replace(good, `"name"`, `"nime"`, 1), ErrDamaged},
		{"other id", strings.Replace(good, `"x"`, `"y"`, 1), ErrDamaged},
		{"unknown state", strings.Replace(good, "pending", "pendinf", 1), ErrDamaged},
		{"ready without COW", strings.Replace(good, "pending", "ready", 1), ErrDamaged},
		{"negative size", strings.Replace(good, "4096", "-4096", 1), ErrDamaged},
		{"wrong type", strings.Replace(good, "4096", `"4096"`, 1), ErrDamaged},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			fsys, s := newStore(t)
			_, err := s.Create(someRecord)
			must(t, err)
			must(t, fsys.Mkdir("state/snapshots/x"))
			must(t, fsys.Put("state/snapshots/x/snapshot.json", []byte(test.content)))

			s, err = OpenStore(fsys, "state/snapshots")
			must(t, err)
			_, err = s.Get("x")
			t.Log(err)
			if !errors.Is(err, test.want) || (err == nil) != (test.want == nil) {
				t.Errorf("Get: error %v, want %v", err, test.want)
			}
			records, unreadable, err := s.List()
			must(t, err)
			if test.want == nil {
				if len(records) != 2 {
					t.Errorf("%d records", len(records))
				}
				return
			}
			if len(records) != 1 || len(unreadable) != 1 || !errors.Is(unreadable["x"], test.want) {
				t.Errorf("list %v, unreadable %v", records, unreadable)
			}
			if _, err := s.Update("x", func(*Record) error { return nil }); !errors.Is(err, test.want) {
				t.Errorf("Update: error %v", err)
			}
			if _, err := s.Create(Record{ID: "x"}); !errors.Is(err, ErrExists) {
				t.Errorf("Create: error %v", err)
			}
			if string(readFile(t, fsys, "state/snapshots/x/snapshot.json")) != test.content {
				t.Error("the record was changed")
			}
			err = s.Delete("x")
			exists, _ := fsys.Exists("state/snapshots/x/snapshot.json")
			if newer := test.want == ErrNewer; newer != errors.Is(err, ErrNewer) || newer != exists {
				t.Errorf("Delete: error %v, there %v", err, exists)
			}
		})
	}
}

// TestSnapshotWithoutRecord: a directory that lost its record is kept.
func TestSnapshotWithoutRecord(t *testing.T) {
	fsys, s := newStore(t)
	must(t, fsys.Mkdir("state/snapshots/x"))
	must(t, fsys.Put("state/snapshots/x/data.cow", []byte("precious")))
	must(t, fsys.Put("state/snapshots/stray", nil))
	must(t, fsys.Mkdir("state/snapshots/lost+found"))
	_, unreadable, err := s.List()
	must(t, err)
	if len(unreadable) != 2 || !errors.Is(unreadable["x"], ErrDamaged) || unreadable["stray"] == nil {
		t.Errorf("unreadable %v", unreadable)
	}
	_, err = OpenStore(fsys, "state/snapshots")
	must(t, err)
	if string(readFile(t, fsys, "state/snapshots/x/data.cow")) != "precious" {
		t.Error("not kept")
	}
}

func TestUpdateRefused(t *testing.T) {
	_, s := newStore(t)
	_, err := s.Create(someRecord)
	must(t, err)
	injected := errors.New("injected")
	for name, change := range map[string]func(*Record) error{
		"error":             func(*Record) error { return injected },
		"other id":          func(r *Record) error { r.ID = "other"; return nil },
		"ready without COW": func(r *Record) error { r.State = Ready; return nil },
	} {
		if _, err := s.Update("snap-1", change); err == nil || name == "error" && !errors.Is(err, injected) {
			t.Errorf("%s: error %v", name, err)
		}
	}
	if r, err := s.Get("snap-1"); err != nil || r.State != Pending {
		t.Errorf("record %+v, error %v", r, err)
	}
}

// TestStoreSweep: leftovers go when the store is opened.
func TestStoreSweep(t *testing.T) {
	fsys, _ := newStore(t)
	for _, name := range []string{".new-a", ".deleted-b"} {
		must(t, fsys.Mkdir("state/snapshots/"+name))
		must(t, fsys.Put("state/snapshots/"+name+"/data.cow", []byte("x")))
	}
	_, err := OpenStore(fsys, "state/snapshots")
	must(t, err)
	if names, _ := fsys.ReadDir("state/snapshots"); len(names) > 0 {
		t.Errorf("left: %v", names)
	}
}

// TestStoreErrors: each step of each change fails once; the store can go on, and
// the change can be tried again.
func TestStoreErrors(t *testing.T) {
	injected := errors.New("injected")
	changes := []struct {
		name   string
		change func(s *Store) error
		before func(s *Store) error
	}{
		{"create", func(s *Store) error {
			_, err := s.Create(someRecord)
			if errors.Is(err, ErrExists) {
				return nil // by the try that failed
			}
			return err
		}, func(*Store) error { return nil }},
		{"ready", func(s *Store) error { _, err := s.SetReady("snap-1", Info{}); return err },
			func(s *Store) error { _, err := s.Create(someRecord); return err }},
		{"delete", func(s *Store) error { return s.Delete("snap-1") },
			func(s *Store) error { _, err := s.Create(someRecord); return err }},
	}
	for _, c := range changes {
		for step := int64(1); ; step++ {
			fsys, s := newStore(t)
			must(t, c.before(s))
			from, failed := fsys.Steps(), false
			fsys.OnStep(func(st crashfs.Step) error {
				if st.N == from+step {
					failed = true
					return injected
				}
				return nil
			})
			err := c.change(s)
			if !failed {
				must(t, err)
				t.Logf("%s: %d steps", c.name, step-1)
				break
			}
			if !errors.Is(err, injected) {
				t.Fatalf("%s: step %d: error %v", c.name, step, err)
			}
			if _, unreadable, err := s.List(); err != nil || len(unreadable) > 0 {
				t.Errorf("%s: step %d: list: %v %v", c.name, step, err, unreadable)
			}
			if err := c.change(s); err != nil {
				t.Errorf("%s: step %d: tried again: %v", c.name, step, err)
			}
			// It is durable now.
			s, err = OpenStore(fsys.Crash(crashfs.Nothing), "state/snapshots")
			must(t, err)
			_, err = s.Get("snap-1")
			if c.name == "delete" && !errors.Is(err, ErrNotFound) || c.name != "delete" && err != nil {
				t.Errorf("%s: step %d: afterwards: %v", c.name, step, err)
			}
		}
	}
}
