package main

import (
	"bytes"
	"fmt"
	"hash/fnv"
	"os"
	"path/filepath"
	"testing"

	"github.com/snapmerge/snapmerge/pkg/blockio"
	"github.com/snapmerge/snapmerge/test/fixtures"
)

// files are a case's files on disk.
type files struct {
	dir, base, target string
	cows              []cowFile
}

// cowFile is a COW and the flags that open it.
type cowFile struct {
	name string
	data []byte
	args []string
}

func cowsOf(c fixtures.Case) []cowFile {
	list := []cowFile{{"cow.img", c.COW, nil}}
	if c.Unfinished != nil {
		list = append(list, cowFile{"cow.unfinished.img", c.Unfinished, []string{"--label", fmt.Sprint(*c.Label)}})
	}
	return list
}

func write(t testing.TB, c fixtures.Case) files {
	t.Helper()
	f := files{dir: t.TempDir(), cows: cowsOf(c)}
	f.base = put(t, f.dir, "base.img", c.Base)
	f.target = put(t, f.dir, "expected.img", c.Expected)
	for _, w := range f.cows {
		put(t, f.dir, w.name, w.data)
	}
	return f
}

func (f files) path(name string) string { return filepath.Join(f.dir, name) }

// sample leaves out four cases of five in short runs, which are slowed down by
// the race detector.
func sample(t *testing.T) {
	t.Helper()
	h := fnv.New32a()
	h.Write([]byte(t.Name()))
	if testing.Short() && h.Sum32()%5 != 0 {
		t.Skip("short runs take a fifth of the cases")
	}
}

func TestVerifyFixtures(t *testing.T) {
	fixtures.Each(t, func(t *testing.T, c fixtures.Case) {
		sample(t)
		f := write(t, c)
		for _, w := range f.cows {
			args := append([]string{"cow", "verify", f.path(w.name), "--json", "--base", f.base, "--target", f.target}, w.args...)
			if o := sm(t, args...).want(t, 0).object(t); o["ok"] != true || o["view"] != true {
				t.Errorf("%s: %v", w.name, o)
			}
			out := f.path("extracted")
			args = append([]string{"cow", "extract", "--cow", f.path(w.name), "--base", f.base, "--out", out}, w.args...)
			sm(t, args...).want(t, 0)
			wantSame(t, "the extracted view of "+w.name, get(t, out), c.Expected)
			check(t, os.Remove(out))
		}
		wantSame(t, "the base", get(t, f.base), c.Base)
	})
}

func TestMergeFixtures(t *testing.T) {
	kinds := []string{"sync"}
	if err := blockio.ProbeURing(); err != nil {
		t.Logf("without io_uring: %v", err)
	} else {
		kinds = append(kinds, "uring")
	}
	fixtures.Each(t, func(t *testing.T, c fixtures.Case) {
		sample(t)
		f := write(t, c)
		for _, w := range f.cows {
			for _, kind := range kinds {
				for _, mode := range []string{"--in-place", "--journal=" + f.path("journal")} {
					put(t, f.dir, "base.img", c.Base)
					put(t, f.dir, w.name, w.data)
					args := append([]string{"merge", "--base", f.base, "--cow", f.path(w.name), "--io", kind, mode, "--json", "--quiet"}, w.args...)
					o := sm(t, args...).want(t, 0).object(t)
					if o["done"] != true || o["io"] != kind {
						t.Errorf("%s %v: %v", w.name, args, o)
					}
					what := fmt.Sprintf("the base merged with %s, %s, %s", w.name, kind, mode)
					wantSame(t, what, get(t, f.base), c.Expected)
					// Once more: there is nothing to do, and nothing is done.
					o = sm(t, args...).want(t, 0).object(t)
					if o["done"] != true || o["blocks"] != 0.0 {
						t.Errorf("the second merge: %v", o)
					}
					wantSame(t, what+" twice", get(t, f.base), c.Expected)
					if mode == "--in-place" {
						continue
					}
					wantSame(t, "the COW", get(t, f.path(w.name)), w.data)
					check(t, os.Remove(f.path("journal")))
				}
			}
		}
	})
}

// TestRejects: what Android refuses is refused by every command, and nothing is
// touched.
func TestRejects(t *testing.T) {
	fixtures.Rejects(t, func(t *testing.T, r fixtures.Reject) {
		dir := t.TempDir()
		image := make([]byte, 4<<20)
		cow, base := put(t, dir, "cow.img", r.COW), put(t, dir, "base.img", image)
		for _, args := range [][]string{
			{"cow", "inspect", cow},
			{"cow", "inspect", "--json", "--ops", cow},
			{"cow", "verify", cow},
			{"cow", "verify", cow, "--base", base, "--target", base},
			{"cow", "extract", "--cow", cow, "--base", base, "--out", filepath.Join(dir, "out")},
			{"merge", "--base", base, "--cow", cow, "--in-place"},
			{"merge", "--base", base, "--cow", cow, "--journal", filepath.Join(dir, "journal"), "--json"},
		} {
			if got := sm(t, args...).want(t, 3, cow, "byte "); got.stdout != "" {
				t.Errorf("%v: stdout %q", args, got.stdout)
			}
		}
		wantSame(t, "the base", get(t, base), image)
		wantSame(t, "the COW", get(t, cow), r.COW)
		if entries, err := os.ReadDir(dir); err != nil || len(entries) != 2 {
			t.Errorf("left behind: %v, %v", entries, err)
		}
	})
}

// TestSpoiltScratch: entries of a valid scratch that are not those of the next
// ops mean that the base cannot be completed. Every command says so.
func TestSpoiltScratch(t *testing.T) {
	fixtures.Each(t, func(t *testing.T, c fixtures.Case) {
		h := c.Info.Header
		if h.RAState == nil || *h.RAState != 2 || c.Info.MergeOps == 0 {
			return
		}
		bad := bytes.Clone(c.COW)
		bad[h.HeaderSize+1+2] ^= 0x40 // block of the first entry
		dir := t.TempDir()
		cow, base := put(t, dir, "cow.img", bad), put(t, dir, "base.img", c.Base)
		for _, args := range [][]string{
			{"cow", "inspect", cow},
			{"cow", "verify", cow},
			{"merge", "--base", base, "--cow", cow, "--in-place"},
			{"merge", "--base", base, "--cow", cow, "--journal", filepath.Join(dir, "journal")},
		} {
			sm(t, args...).want(t, 3, cow, "byte ", "scratch")
		}
		wantSame(t, "the base", get(t, base), c.Base)
	})
}
