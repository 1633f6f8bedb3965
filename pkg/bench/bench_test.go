package bench

import (
	"context"
	"errors"
	"math"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/klauspost/compress/flate"

	"github.com/snapmerge/snapmerge/pkg/blockio"
	"github.com/snapmerge/snapmerge/pkg/cow"
)

func TestMedian(t *testing.T) {
	for _, c := range []struct {
		list []float64
		want spread
		at   int
	}{
		{[]float64{3}, spread{3, 3, 3}, 0},
		{[]float64{3, 1, 2}, spread{2, 1, 3}, 2},
		{[]float64{4, 1, 2, 9}, spread{3, 1, 9}, 2},
	} {
		if got, at := median(c.list); got != c.want || at != c.at {
			t.Errorf("%v: %v at %d, want %v at %d", c.list, got, at, c.want, c.at)
		}
	}
}

// TestMix: an incremental COW has the mix that it is said to have, in extents
// all over the image, no block twice, and no op reads what an earlier one wrote.
func TestMix(t *testing.T) {
	for seed := range uint64(5) {
		s := Spec{Workload: Incremental, Size: 256 << 20, Seed: seed}
		check(t, s.Complete())
		p := newPlan(s)
		counts, seen := map[cow.OpType]int64{}, map[uint32]bool{}
		last := uint32(0)
		for _, o := range append(p.ordered, p.independent...) {
			counts[o.typ]++
			if seen[o.block] {
				t.Errorf("seed %d: block %d twice", seed, o.block)
			}
			first := o.source / bs
			if o.typ.Ordered() && (seen[uint32(first)] || o.source%bs != 0 && seen[uint32(first+1)]) {
				t.Errorf("seed %d: block %d from byte %d, overwritten by then", seed, o.block, o.source)
			}
			seen[o.block] = true
			last = max(last, o.block)
		}
		for typ, percent := range map[cow.OpType]int64{cow.Copy: 60, cow.Xor: 15, cow.Replace: 20, cow.Zero: 5} {
			if got := counts[typ] * 100; got < s.Ops*percent-400 || got > s.Ops*percent+400 {
				t.Errorf("seed %d: %d of %d blocks are %v, want %d %%", seed, counts[typ], s.Ops, typ, percent)
			}
		}
		if int64(last) < s.Size/bs*9/10 {
			t.Errorf("seed %d: the last change is in block %d of %d", seed, last, s.Size/bs)
		}
	}
}

// TestContent: no two blocks are alike, and blocks shrink by about half.
func TestContent(t *testing.T) {
	c := newContent(1)
	seen := map[string]bool{}
	packed := counter(0)
	w, err := flate.NewWriter(&packed, 6)
	check(t, err)
	const n = 3 * poolBlocks
	for b := range uint64(n) {
		for _, make := range []func([]byte, uint64){c.base, c.fresh, c.xor} {
			p := filled(make, b)
			if seen[string(p)] {
				t.Fatalf("block %d is there twice", b)
			}
			seen[string(p)] = true
		}
		w.Reset(&packed)
		_, err := w.Write(filled(c.fresh, b))
		check(t, errors.Join(err, w.Close()))
	}
	if share := float64(packed) / (n * bs); math.Abs(share-0.45) > 0.1 {
		t.Errorf("blocks packed one by one take %.2f of their length", share)
	}
}

func filled(make func([]byte, uint64), block uint64) []byte {
	p := [bs]byte{}
	make(p[:], block)
	return p[:]
}

type counter int

func (c *counter) Write(p []byte) (int, error) {
	*c += counter(len(p))
	return len(p), nil
}

// TestInterrupted: stopped anywhere, nothing stays behind.
func TestInterrupted(t *testing.T) {
	s := Spec{Workload: Incremental, Size: 16 << 20}
	check(t, s.Complete())
	for _, after := range []int{0, 1, 2, 3} {
		ctx, cancel := context.WithCancel(t.Context())
		dir := t.TempDir()
		notes := 0
		_, err := Merge(ctx, MergeOptions{Spec: s, Dir: dir, IO: []blockio.Kind{blockio.Sync}, Window: mib, Runs: 9, Floor: true, Note: func(string, ...any) {
			if notes++; notes > after {
				cancel()
			}
		}})
		if !errors.Is(err, context.Canceled) {
			t.Errorf("after %d notes: %v", after, err)
		}
		if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
			t.Errorf("after %d notes: left behind %v, %v", after, left, err)
		}
		cancel()
	}
}

// TestFlushDelay: every flush of every file is slower, and the queues still know
// the file behind.
func TestFlushDelay(t *testing.T) {
	const delay = 20 * time.Millisecond
	f, err := slowFlushFS{blockio.OS(), delay}.Open(filepath.Join(t.TempDir(), "x"), blockio.Create)
	check(t, err)
	defer f.Close()
	begin := time.Now()
	check(t, f.Flush())
	if d := time.Since(begin); d < delay {
		t.Errorf("a flush took %v", d)
	}
	if _, ok := f.(blockio.Wrapper); !ok {
		t.Error("not a blockio.Wrapper")
	}
	if _, err := (slowFlushFS{blockio.OS(), delay}).Open(filepath.Join(t.TempDir(), "absent"), 0); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("absent file: %v", err)
	}
}

func TestDropFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x")
	check(t, os.WriteFile(path, make([]byte, bs), 0o600))
	check(t, dropFile(path))
	if err := dropFile(path + ".absent"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("absent file: %v", err)
	}
}
