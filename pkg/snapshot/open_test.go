package snapshot

import (
	"errors"
	"testing"

	"github.com/snapmerge/snapmerge/pkg/blockio"
	"github.com/snapmerge/snapmerge/pkg/blockio/crashfs"
	"github.com/snapmerge/snapmerge/pkg/cow"
)

// TestIndexOfOtherOps: a COW of the same length and header as the one that was
// indexed. CheckIndex tells them apart, and loads the ops instead.
func TestIndexOfOtherOps(t *testing.T) {
	fsys := crashfs.New("d")
	writeZeros(t, fsys, "d/x.cow", 20, true)
	must(t, BuildIndex(ctx, fsys, "d/x.cow"))
	if c := openCOW(t, fsys, "d/x.cow", OpenCOWOptions{CheckIndex: true}); !c.Indexed() || c.IndexError != nil {
		t.Errorf("its own index: used %v, error %v", c.Indexed(), c.IndexError)
	}
	writeZeros(t, fsys, "d/y.cow", 20, false)
	putAgain(t, fsys, "d/x.cow", readFile(t, fsys, "d/y.cow"))
	c := openCOW(t, fsys, "d/x.cow", OpenCOWOptions{CheckIndex: true})
	var format *FormatError
	if c.Indexed() || !errors.Is(c.IndexError, ErrIndex) || !errors.As(c.IndexError, &format) {
		t.Fatalf("index used %v, error %v", c.Indexed(), c.IndexError)
	}
	want := openCOW(t, fsys, "d/y.cow", OpenCOWOptions{})
	if c.Identity != want.Identity {
		t.Errorf("identity %+v, want %+v", c.Identity, want.Identity)
	}
	compareOps(t, c, want.Ops, 1)
}

// TestIndexOfMergedCOW: progress in the header of a COW does not part it from its
// index, but progress past its end does.
func TestIndexOfMergedCOW(t *testing.T) {
	for _, test := range []struct {
		merged  byte
		indexed bool
	}{{7, true}, {20, true}, {21, false}} {
		fsys := crashfs.New("d")
		writeZeros(t, fsys, "d/x.cow", 20, true)
		must(t, BuildIndex(ctx, fsys, "d/x.cow"))
		b := readFile(t, fsys, "d/x.cow")
		b[cow.NumMergeOpsOffset] = test.merged
		putAgain(t, fsys, "d/x.cow", b)
		c, err := OpenCOW(fsys, "d/x.cow", OpenCOWOptions{})
		if !test.indexed {
			var format *cow.FormatError
			if !errors.As(err, &format) {
				t.Errorf("%d of 20 ops merged: error %v", test.merged, err)
			}
			continue
		}
		must(t, err)
		if c.Indexed() != test.indexed || c.Header.NumMergeOps != uint64(test.merged) {
			t.Errorf("%d of 20 ops merged: index used %v, header says %d", test.merged, c.Indexed(), c.Header.NumMergeOps)
		}
		must(t, c.Close())
	}
}

// TestOpenCOWAtLabel: an index is of the whole file, a label asks for a part.
func TestOpenCOWAtLabel(t *testing.T) {
	fsys := crashfs.New("d")
	f, err := fsys.Open("d/x.cow", blockio.Create)
	must(t, err)
	w, err := cow.NewWriter(f, cow.WriterOptions{Version: 3, OpCountMax: 20})
	must(t, err)
	must(t, w.Zero(0, 5))
	must(t, w.Label(1))
	must(t, w.Zero(5, 5))
	must(t, w.Finalize())
	must(t, f.Close())
	must(t, BuildIndex(ctx, fsys, "d/x.cow"))
	label := uint64(1)
	if c := openCOW(t, fsys, "d/x.cow", OpenCOWOptions{Label: &label}); c.Indexed() || c.Ops.Len() != 5 {
		t.Errorf("at the label: index used %v, %d ops", c.Indexed(), c.Ops.Len())
	}
	if c := openCOW(t, fsys, "d/x.cow", OpenCOWOptions{}); !c.Indexed() || c.Ops.Len() != 10 {
		t.Errorf("whole: index used %v, %d ops", c.Indexed(), c.Ops.Len())
	}
}

// TestOpenCOWReads: with an index nothing is read but the header and the root.
func TestOpenCOWReads(t *testing.T) {
	fsys := crashfs.New("d")
	writeZeros(t, fsys, "d/x.cow", 1000, false)
	must(t, BuildIndex(ctx, fsys, "d/x.cow"))
	// Wreck all the rest.
	for name, keep := range map[string]int{"d/x.cow": 78, "d/x.idx": pageSize} {
		b := readFile(t, fsys, name)
		for i := keep; i < len(b); i++ {
			b[i] = 0xff
		}
		putAgain(t, fsys, name, b)
	}
	c := openCOW(t, fsys, "d/x.cow", OpenCOWOptions{})
	if !c.Indexed() || c.Ops.Len() != 1000 {
		t.Fatalf("index used %v: %v", c.Indexed(), c.IndexError)
	}
	if _, _, _, err := c.Ops.Find(3); !errors.Is(err, ErrIndex) {
		t.Errorf("Find: error %v", err)
	}
}

// TestIndexedPayload: data that does not have its checksum is not decoded.
func TestIndexedPayload(t *testing.T) {
	fsys := crashfs.New("d")
	writeCOW(t, fsys, "d/x.cow", newRand(t, 5), cowSpec{version: 3, ops: 20, maxBlock: 4096, sorted: true})
	must(t, BuildIndex(ctx, fsys, "d/x.cow"))
	b := readFile(t, fsys, "d/x.cow")
	b[len(b)-1] ^= 1
	putAgain(t, fsys, "d/x.cow", b)
	c := openCOW(t, fsys, "d/x.cow", OpenCOWOptions{})
	var format *cow.FormatError
	if _, err := decode(c, 4<<20); !errors.As(err, &format) {
		t.Errorf("error %v", err)
	}
}
