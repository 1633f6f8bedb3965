package offline

import (
	"context"
	"errors"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/snapmerge/snapmerge/pkg/blockio"
	"github.com/snapmerge/snapmerge/pkg/merge"
	"github.com/snapmerge/snapmerge/pkg/snapshot"
	"github.com/snapmerge/snapmerge/test/cowgen"
)

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// image writes base and COW of an image into a new directory.
func image(t *testing.T, spec cowgen.Spec) (im cowgen.Image, dir string) {
	t.Helper()
	im, err := cowgen.Make(rand.New(rand.NewPCG(7, 8)), spec)
	check(t, err)
	dir = t.TempDir()
	check(t, os.WriteFile(filepath.Join(dir, "base"), im.Base, 0o600))
	check(t, os.WriteFile(filepath.Join(dir, "cow"), im.COW, 0o600))
	return im, dir
}

// TestExtractSparse: blocks of zeros are holes, wherever they lie.
func TestExtractSparse(t *testing.T) {
	im, dir := image(t, cowgen.Spec{Blocks: 1024, Zeros: 900})
	out := filepath.Join(dir, "out")
	done, total := int64(0), int64(0)
	check(t, Extract(t.Context(), ExtractOptions{COW: filepath.Join(dir, "cow"), Base: filepath.Join(dir, "base"), Out: out,
		Progress: func(d, of int64) { done, total = d, of }}))
	got, err := os.ReadFile(out)
	check(t, err)
	check(t, cowgen.Check(got, im.Want))
	if done != total || total != int64(len(im.Want)) {
		t.Errorf("progress %d of %d", done, total)
	}
	st, err := os.Stat(out)
	check(t, err)
	if used := st.Sys().(*syscall.Stat_t).Blocks * 512; used > 300*bs {
		t.Errorf("%d bytes of disk for 124 blocks that are not zero", used)
	}
}

func TestExtractInterrupted(t *testing.T) {
	_, dir := image(t, cowgen.Spec{Blocks: 1024, Copies: 100})
	ctx, cancel := context.WithCancel(t.Context())
	err := Extract(ctx, ExtractOptions{COW: filepath.Join(dir, "cow"), Base: filepath.Join(dir, "base"), Out: filepath.Join(dir, "out"),
		Progress: func(int64, int64) { cancel() }})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
	wantNames(t, dir, "base", "cow")
}

func wantNames(t testing.TB, dir string, want ...string) {
	t.Helper()
	names, err := blockio.OS().ReadDir(dir)
	check(t, err)
	if !slices.Equal(names, want) {
		t.Errorf("the directory has %q, want %q", names, want)
	}
}

// noLinks is a file system without hard links.
type noLinks struct{ blockio.FS }

func (noLinks) Link(string, string) error { return syscall.EPERM }

// TestExtractAgain: a run that is killed leaves nothing under the name asked for and
// does not hinder the next, nor do two runs at a time spoil each other's file.
func TestExtractAgain(t *testing.T) {
	for name, fsys := range map[string]blockio.FS{"with links": blockio.OS(), "without": noLinks{blockio.OS()}} {
		t.Run(name, func(t *testing.T) {
			im, dir := image(t, cowgen.Spec{Blocks: 512, Copies: 100, Zeros: 20})
			o := ExtractOptions{COW: filepath.Join(dir, "cow"), Base: filepath.Join(dir, "base"), Out: filepath.Join(dir, "out"), FS: fsys}
			second := o
			o.Progress = func(int64, int64) { // what a kill would leave now
				wantNames(t, dir, "base", "cow", "out"+partSuffix)
				if err := Extract(t.Context(), second); !errors.Is(err, blockio.ErrLocked) {
					t.Errorf("two at a time: %v", err)
				}
			}
			check(t, os.WriteFile(o.Out+partSuffix, make([]byte, 5000*bs), 0o600))
			check(t, Extract(t.Context(), o))
			wantNames(t, dir, "base", "cow", "out")
			got, err := os.ReadFile(o.Out)
			check(t, err)
			check(t, cowgen.Check(got, im.Want))
			if err := Extract(t.Context(), second); !errors.Is(err, fs.ErrExist) {
				t.Errorf("over another file: %v", err)
			}
			check(t, os.Remove(o.Out))
			second.Progress = func(int64, int64) { check(t, os.WriteFile(o.Out, []byte("precious"), 0o600)) }
			if err := Extract(t.Context(), second); !errors.Is(err, fs.ErrExist) {
				t.Errorf("over a file that came meanwhile: %v", err)
			}
			wantNames(t, dir, "base", "cow", "out")
			if got, err := os.ReadFile(o.Out); err != nil || string(got) != "precious" {
				t.Errorf("%.20q %v", got, err)
			}
		})
	}
}

// TestStaleIndex: an index beside a COW that was replaced by another of the same
// length, with as many ops, leads neither a view nor a merge astray.
func TestStaleIndex(t *testing.T) {
	spec := cowgen.Spec{Blocks: 256, Copies: 60, Zeros: 10}
	_, dir := image(t, spec)
	base, cowName, out := filepath.Join(dir, "base"), filepath.Join(dir, "cow"), filepath.Join(dir, "out")
	check(t, snapshot.BuildIndex(t.Context(), blockio.OS(), cowName))
	im, err := cowgen.Make(rand.New(rand.NewPCG(9, 9)), spec)
	check(t, err)
	check(t, os.WriteFile(cowName, im.COW, 0o600))
	check(t, os.WriteFile(base, im.Base, 0o600))
	check(t, Extract(t.Context(), ExtractOptions{COW: cowName, Base: base, Out: out}))
	_, err = Merge(t.Context(), MergeOptions{Base: base, COW: cowName, Journal: filepath.Join(dir, "journal"), IO: blockio.Sync, Verify: true})
	check(t, err)
	for _, name := range []string{out, base} {
		got, err := os.ReadFile(name)
		check(t, err)
		if err := cowgen.Check(got, im.Want); err != nil {
			t.Errorf("%s: %v", filepath.Base(name), err)
		}
	}
}

// TestMergeVerify: what the merge did not write and the view did not show is
// found.
func TestMergeVerify(t *testing.T) {
	_, dir := image(t, cowgen.Spec{Blocks: 1024, Replaces: 400})
	base := filepath.Join(dir, "base")
	o := MergeOptions{Base: base, COW: filepath.Join(dir, "cow"), Journal: filepath.Join(dir, "journal"), IO: blockio.Sync, Verify: true}
	spoilt := false
	o.Progress = func(merge.Stats) {
		if spoilt {
			return
		}
		spoilt = true
		f, err := os.OpenFile(base, os.O_WRONLY|os.O_SYNC, 0)
		check(t, err)
		for off := int64(0); off < 1024*bs; off += 16 * bs { // some block that no op writes
			_, err := f.WriteAt([]byte("somebody else's"), off)
			check(t, err)
		}
		check(t, f.Close())
	}
	var differ *DifferenceError
	if _, err := Merge(t.Context(), o); !errors.As(err, &differ) {
		t.Errorf("%v", err)
	}
}

// TestMergeTwice: the second merge counts nothing.
func TestMergeTwice(t *testing.T) {
	im, dir := image(t, cowgen.Spec{Blocks: 256, Copies: 50, Xors: 20, Replaces: 50, Zeros: 10})
	o := MergeOptions{Base: filepath.Join(dir, "base"), COW: filepath.Join(dir, "cow"), Journal: filepath.Join(dir, "journal"), IO: blockio.Sync, Verify: true}
	for i := range 2 {
		r, err := Merge(t.Context(), o)
		check(t, err)
		if !r.Done || (r.Blocks > 0) != (i == 0) || r.Resumes != 0 || r.Ops != 130 {
			t.Errorf("merge %d: %+v", i+1, r)
		}
	}
	got, err := os.ReadFile(o.Base)
	check(t, err)
	check(t, cowgen.Check(got, im.Want))
}

// TestMergeOtherBase: a journal whose merge is complete says nothing of another
// base, though that has the right size.
func TestMergeOtherBase(t *testing.T) {
	_, dir := image(t, cowgen.Spec{Blocks: 64, Copies: 5, Replaces: 5})
	o := MergeOptions{Base: filepath.Join(dir, "base"), COW: filepath.Join(dir, "cow"), Journal: filepath.Join(dir, "journal"), IO: blockio.Sync}
	before, err := os.ReadFile(o.Base)
	check(t, err)
	_, err = Merge(t.Context(), o)
	check(t, err)
	o.Base = filepath.Join(dir, "other")
	check(t, os.WriteFile(o.Base, before, 0o600))
	if _, err := Merge(t.Context(), o); !errors.Is(err, merge.ErrMismatch) || !strings.Contains(err.Error(), "other") {
		t.Errorf("the same journal with another base: %v", err)
	}
	got, err := os.ReadFile(o.Base)
	check(t, err)
	check(t, cowgen.Check(got, before))
}

func TestWhileLocked(t *testing.T) {
	tries := 0
	check(t, WhileLocked(t.Context(), func() error {
		if tries++; tries < 3 {
			return blockio.ErrLocked
		}
		return nil
	}))
	if tries != 3 {
		t.Errorf("%d tries", tries)
	}
	if err := WhileLocked(t.Context(), func() error { return syscall.EIO }); err != syscall.EIO {
		t.Errorf("another error: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	err := WhileLocked(ctx, func() error {
		cancel()
		return blockio.ErrLocked
	})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("interrupted: %v", err)
	}
}
