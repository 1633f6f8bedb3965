package cow_test

import (
	"bytes"
	"errors"
	"testing"

	"github.com/snapmerge/snapmerge/pkg/cow"
	"github.com/snapmerge/snapmerge/test/fixtures"
)

// open opens and loads a file that lies in memory.
func open(t *testing.T, file []byte, label *uint64) (*cow.File, *cow.Table) {
	t.Helper()
	f, err := cow.Open(bytes.NewReader(file), int64(len(file)), cow.OpenOptions{Label: label})
	if err != nil {
		t.Fatalf("open: %v", err)
	}
	table, err := f.Load()
	if err != nil {
		t.Fatalf("load: %v", err)
	}
	return f, table
}

// merge does to image what a merge of the file does: the ops in the scratch
// first, if it holds a window, then all that are left, in merge order.
func merge(t *testing.T, file []byte, f *cow.File, table *cow.Table, image []byte) {
	t.Helper()
	merged := f.Header().NumMergeOps
	s, err := f.Scratch()
	if err != nil {
		t.Fatalf("scratch: %v", err)
	}
	if s != nil {
		n, err := s.Window(table, merged)
		if err != nil {
			t.Fatalf("scratch: %v", err)
		}
		if n > 0 {
			for _, e := range s.Entries {
				copy(image[e.NewBlock*cow.BlockSize:][:cow.BlockSize], file[e.Offset:])
			}
			merged += n
		}
	}
	d := cow.NewDecoder(bytes.NewReader(file))
	for ; merged < table.Len(); merged++ {
		op, err := table.At(merged)
		if err != nil {
			t.Fatal(err)
		}
		apply(t, d, op, image)
	}
}

func apply(t *testing.T, d *cow.Decoder, op cow.Op, image []byte) {
	t.Helper()
	dst := image[op.NewBlock*cow.BlockSize:][:op.Blocks*cow.BlockSize]
	if op.Type == cow.Copy {
		copy(dst, image[op.Source*cow.BlockSize:][:cow.BlockSize])
		return
	}
	data := make([]byte, len(dst))
	if err := d.Decode(op, data); err != nil {
		t.Fatalf("decode: %v", err)
	}
	if op.Type == cow.Xor {
		for i, b := range image[op.Source:][:cow.BlockSize] {
			data[i] ^= b
		}
	}
	copy(dst, data)
}

func TestFixtures(t *testing.T) {
	fixtures.Each(t, func(t *testing.T, c fixtures.Case) {
		f, table := open(t, c.COW, nil)
		h := f.Header()
		if int(h.Major) != c.Info.Version || h.NumMergeOps != c.Info.Header.NumMergeOps || h.BufferSize != c.Info.Header.BufferSize {
			t.Errorf("header %+v does not fit %+v", h, c.Info.Header)
		}
		s, err := f.Scratch()
		if err != nil {
			t.Fatal(err)
		}
		switch want := c.Info.Header.RAState; {
		case (s == nil) != (want == nil):
			t.Errorf("scratch %v, want state %v", s, want)
		case s != nil && s.State != *want:
			t.Errorf("scratch state %d, want %d", s.State, *want)
		}
		if want := c.Info.MergeOps; want != 0 && table.Len() != uint64(want) {
			t.Errorf("%d ops, want %d", table.Len(), want)
		}
		if want := c.Info.OpsAtLabel; want != 0 && table.Len() != uint64(want) {
			t.Errorf("%d ops, want %d", table.Len(), want)
		}
		checkTable(t, f, table)

		image := bytes.Clone(c.Base)
		merge(t, c.COW, f, table, image)
		if !bytes.Equal(image, c.Expected) {
			t.Error("the merged image is not the expected one")
		}
		if c.Unfinished != nil {
			checkUnfinished(t, c)
		}
	})
}

// checkUnfinished checks that a file whose writing was cut off can be used at
// its label, and that one of version 2 cannot be used otherwise.
func checkUnfinished(t *testing.T, c fixtures.Case) {
	f, table := open(t, c.Unfinished, c.Label)
	image := bytes.Clone(c.Base)
	merge(t, c.Unfinished, f, table, image)
	if !bytes.Equal(image, c.Expected) {
		t.Errorf("the image merged at label %d is not the expected one", *c.Label)
	}
	if table.Len() != uint64(c.Info.OpsAtLabel) {
		t.Errorf("%d ops at label %d, want %d", table.Len(), *c.Label, c.Info.OpsAtLabel)
	}
	without, err := cow.Open(bytes.NewReader(c.Unfinished), int64(len(c.Unfinished)), cow.OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if c.Info.Version == 2 {
		_, err := without.Load()
		wantFormatError(t, err)
	}
	labels, _ := without.Labels()
	found := false
	for _, l := range labels {
		found = found || l.Label == *c.Label
	}
	if !found {
		t.Errorf("label %d is not among %v", *c.Label, labels)
	}
}

// checkTable checks that the ways to look at a table agree, and that the file
// walked op by op has the same ops.
func checkTable(t *testing.T, f *cow.File, table *cow.Table) {
	t.Helper()
	byBlock := map[uint64]uint64{} // block → position
	var blocks, targetEnd, sourceEnd uint64
	for pos := range table.Len() {
		op, err := table.At(pos)
		if err != nil {
			t.Fatal(err)
		}
		if op.Type.Ordered() != (pos < table.Ordered()) {
			t.Errorf("op %d is a %s, %d are ordered", pos, op.Type, table.Ordered())
		}
		for i := range uint64(op.Blocks) {
			byBlock[op.NewBlock+i] = pos
		}
		blocks += uint64(op.Blocks)
		targetEnd = max(targetEnd, op.NewBlock+uint64(op.Blocks))
		switch op.Type {
		case cow.Copy:
			sourceEnd = max(sourceEnd, (op.Source+1)*cow.BlockSize)
		case cow.Xor:
			sourceEnd = max(sourceEnd, op.Source+cow.BlockSize)
		}
	}
	if _, err := table.At(table.Len()); err == nil {
		t.Error("there is an op past the last one")
	}
	if table.TargetBlocks() != blocks {
		t.Errorf("TargetBlocks %d, want %d", table.TargetBlocks(), blocks)
	}
	if target, source := table.Bounds(); target != targetEnd || source != sourceEnd {
		t.Errorf("Bounds %d, %d, want %d, %d", target, source, targetEnd, sourceEnd)
	}

	next, hasNext := uint64(0), false // position of the nearest op at or above block
	for block := targetEnd + 2; block > 0; {
		block--
		pos, covered := byBlock[block]
		if covered {
			next, hasNext = pos, true
		}
		op, got, ok, err := table.Find(block)
		if err != nil || ok != covered || ok && (got != pos || op.NewBlock > block) {
			t.Fatalf("Find(%d) = %v at %d, %v, %v; want %d, %v", block, op, got, ok, err, pos, covered)
		}
		op, got, ok, err = table.Next(block)
		if err != nil || ok != hasNext || ok && (got != next || !covered && op.NewBlock <= block) {
			t.Fatalf("Next(%d) = %v at %d, %v, %v; want %d, %v", block, op, got, ok, err, next, hasNext)
		}
	}

	walked := uint64(0)
	err := f.Walk(func(r cow.RawOp) error {
		if r.Blocks == 0 {
			return nil
		}
		walked++
		op, _, ok, _ := table.Find(r.NewBlock)
		if !ok || op.Type != r.Type || op.Blocks != r.Blocks || op.DataOffset != r.DataOffset || op.DataLength != r.DataLength {
			t.Fatalf("walk: %+v, table: %+v", r, op)
		}
		return nil
	})
	if err != nil || walked != table.Len() {
		t.Errorf("walked %d ops of %d, error %v", walked, table.Len(), err)
	}
	if id, err := f.Identity(); err != nil || id != table.Identity() {
		t.Errorf("identity %v, %v; the table has %v", id, err, table.Identity())
	}
}

func TestFixtureRejects(t *testing.T) {
	fixtures.Rejects(t, func(t *testing.T, r fixtures.Reject) {
		f, err := cow.Open(bytes.NewReader(r.COW), int64(len(r.COW)), cow.OpenOptions{})
		if err == nil {
			_, err = f.Load()
		}
		wantFormatError(t, err)
		t.Log(err)
	})
}

func wantFormatError(t testing.TB, err error) {
	t.Helper()
	var format *cow.FormatError
	if !errors.As(err, &format) {
		t.Errorf("error %v, want a format error", err)
	}
}
