package snapshot

import (
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"sync"
	"testing"

	"github.com/snapmerge/snapmerge/pkg/blockio"
	"github.com/snapmerge/snapmerge/pkg/blockio/crashfs"
	"github.com/snapmerge/snapmerge/pkg/cow"
)

var ctx = context.Background()

var indexSpecs = []cowSpec{
	{version: 2, ops: 0},
	{version: 2, ops: 1},
	{version: 2, ops: 60},
	{version: 2, clusters: 5, ops: 200, sequence: true, compression: cow.Gz},
	{version: 2, clusters: 200, ops: 200, compression: cow.LZ4, scratch: true},
	{version: 3, ops: 0},
	{version: 3, ops: 300, compression: cow.Zstd, maxBlock: 64 << 10},
	{version: 3, ops: 300, compression: cow.LZ4, maxBlock: 256 << 10, sequence: true, scratch: true},
	{version: 3, ops: 300, maxBlock: 4096, sorted: true},
	{version: 3, ops: 300, maxBlock: 64 << 10, sorted: true, compression: cow.Gz},
}

// TestIndexAgainstTable compares every answer of an index with that of the loaded
// COW.
func TestIndexAgainstTable(t *testing.T) {
	for i, spec := range indexSpecs {
		t.Run(spec.String(), func(t *testing.T) {
			fsys := crashfs.New("d")
			writeCOW(t, fsys, "d/x.cow", newRand(t, uint64(i)), spec)
			must(t, fsys.SyncDir("d"))
			must(t, BuildIndex(ctx, fsys, "d/x.cow"))
			fsys = fsys.Crash(crashfs.Nothing) // it is durable
			table := openCOW(t, fsys, "d/x.cow", OpenCOWOptions{NoIndex: true})
			index := openCOW(t, fsys, "d/x.cow", OpenCOWOptions{})
			if !index.Indexed() || index.IndexError != nil {
				t.Fatalf("index not used: %v", index.IndexError)
			}
			if index.Identity != table.Identity || index.Header != table.Header {
				t.Errorf("identity %+v, want %+v", index.Identity, table.Identity)
			}
			if got := index.Ops.(*Index).root.blockOrder; got != (spec.sorted || spec.ops < 2) {
				t.Errorf("order pages left out: %v", got)
			}
			compareOps(t, index, table.Ops, 1)
		})
	}
}

// compareOps compares c.Ops with want, which has no checksums, at every stride-th
// position and block.
func compareOps(t *testing.T, c *COW, want cow.Ops, stride uint64) {
	t.Helper()
	got := c.Ops
	if got.Len() != want.Len() || got.Ordered() != want.Ordered() || got.TargetBlocks() != want.TargetBlocks() {
		t.Fatalf("counts %d %d %d, want %d %d %d", got.Len(), got.Ordered(), got.TargetBlocks(), want.Len(), want.Ordered(), want.TargetBlocks())
	}
	gotTarget, gotSource := got.Bounds()
	target, source := want.Bounds()
	if gotTarget != target || gotSource != source {
		t.Fatalf("bounds %d %d, want %d %d", gotTarget, gotSource, target, source)
	}
	same := func(what string, n uint64, a, b cow.Op) {
		t.Helper()
		if a.Type == cow.Replace || a.Type == cow.Xor {
			data := make([]byte, a.DataLength)
			must(t, readFull(c.File, data, a.DataOffset))
			if !a.HasChecksum || a.Checksum != crc32.Checksum(data, castagnoli) {
				t.Fatalf("%s(%d): checksum of %+v is wrong", what, n, a)
			}
		}
		a.Checksum, a.HasChecksum = 0, false
		if a != b {
			t.Fatalf("%s(%d) = %+v, want %+v", what, n, a, b)
		}
	}
	for pos := uint64(0); pos < want.Len(); pos += stride {
		a, err := got.At(pos)
		must(t, err)
		b, err := want.At(pos)
		must(t, err)
		same("At", pos, a, b)
	}
	if _, err := got.At(want.Len()); err == nil {
		t.Errorf("At(%d) of %d ops succeeds", want.Len(), want.Len())
	}
	for block := uint64(0); block < target+3; block += stride {
		for _, c := range []struct {
			name string
			a, b func(uint64) (cow.Op, uint64, bool, error)
		}{{"Find", got.Find, want.Find}, {"Next", got.Next, want.Next}} {
			op, pos, ok, err := c.a(block)
			must(t, err)
			wantOp, wantPos, wantOK, _ := c.b(block)
			if ok != wantOK || pos != wantPos {
				t.Fatalf("%s(%d) = position %d %v, want %d %v", c.name, block, pos, ok, wantPos, wantOK)
			}
			if ok {
				same(c.name, block, op, wantOp)
			}
		}
	}
	for _, block := range []uint64{1 << 32, 1<<64 - 1} {
		if _, _, ok, err := got.Find(block); ok || err != nil {
			t.Errorf("Find(%d) = %v %v", block, ok, err)
		}
		if _, _, ok, err := got.Next(block); ok || err != nil {
			t.Errorf("Next(%d) = %v %v", block, ok, err)
		}
	}
}

// TestIndexTree is about the tree: numbers of ops around the capacity of its
// pages, and blocks that leave gaps.
func TestIndexTree(t *testing.T) {
	const full = entriesPage * numbersPage
	for _, n := range []int{1, entriesPage - 1, entriesPage, entriesPage + 1, 3 * entriesPage, full, full + 1} {
		for _, reverse := range []bool{false, true} {
			if n == full && reverse {
				continue // large enough to be slow, and nothing new
			}
			t.Run(fmt.Sprint(n, reverse), func(t *testing.T) {
				fsys := crashfs.New("d")
				writeZeros(t, fsys, "d/x.cow", n, reverse)
				must(t, BuildIndex(ctx, fsys, "d/x.cow"))
				table := openCOW(t, fsys, "d/x.cow", OpenCOWOptions{NoIndex: true})
				index := openCOW(t, fsys, "d/x.cow", OpenCOWOptions{})
				if want := 1 + min(n/(entriesPage+1), 1) + n/(full+1); len(index.Ops.(*Index).layout.levels) != want {
					t.Errorf("%d levels, want %d", len(index.Ops.(*Index).layout.levels), want)
				}
				compareOps(t, index, table.Ops, uint64(1+n/2000))
			})
		}
	}
}

// writeZeros writes a COW of n zero ops for every third block, from the third on.
func writeZeros(t testing.TB, fsys blockio.FS, name string, n int, reverse bool) {
	f, err := fsys.Open(name, blockio.Create)
	must(t, err)
	defer f.Close()
	w, err := cow.NewWriter(f, cow.WriterOptions{Version: 3, OpCountMax: uint64(n)})
	must(t, err)
	for i := range n {
		if reverse {
			i = n - 1 - i
		}
		must(t, w.Zero(uint64(3*i+3), 1))
	}
	must(t, w.Finalize())
}

// TestIndexDamage flips single bits in all parts of an index. Each time all
// answers are right or errors, and there is an error.
func TestIndexDamage(t *testing.T) {
	fsys := crashfs.New("d")
	rng := newRand(t, 4)
	writeCOW(t, fsys, "d/x.cow", rng, cowSpec{version: 3, ops: 100, maxBlock: 16 << 10})
	must(t, BuildIndex(ctx, fsys, "d/x.cow"))
	want := openCOW(t, fsys, "d/x.cow", OpenCOWOptions{}).Ops
	good := readFile(t, fsys, "d/x.idx")
	pages := len(good) / pageSize
	if layout := want.(*Index).layout; len(layout.levels) != 2 || layout.order.n == 0 {
		t.Fatalf("layout %+v does not have all parts", layout)
	}
	for i := 0; i < len(good); i++ {
		if used := i % pageSize; i > pageSize && used < pageContent {
			i += rng.IntN(20)
		}
		bad := append([]byte(nil), good...)
		bad[i] ^= 1 << rng.IntN(8)
		putAgain(t, fsys, "d/x.idx", bad)
		c, err := OpenCOW(fsys, "d/x.cow", OpenCOWOptions{Cache: NewCache(int64(pages * cachedPage))})
		must(t, err)
		if i < pageSize {
			// The root: the COW is loaded instead.
			if c.Indexed() || !errors.Is(c.IndexError, ErrIndex) {
				t.Fatalf("byte %d: index used, or error %v", i, c.IndexError)
			}
			must(t, c.Close())
			continue
		}
		if !c.Indexed() {
			t.Fatalf("byte %d: index not used: %v", i, c.IndexError)
		}
		if n := damaged(t, c.Ops, want, 5); n == 0 {
			t.Fatalf("byte %d: not noticed", i)
		}
		must(t, c.Close())
	}
	t.Logf("%d bytes in %d pages", len(good), pages)
}

// damaged counts the errors of questions to ops, about every stride-th position
// and block. Answers must be those of want, errors wrap ErrIndex.
func damaged(t *testing.T, ops, want cow.Ops, stride uint64) (errs int) {
	t.Helper()
	check := func(err error, same bool) {
		t.Helper()
		var format *FormatError
		switch {
		case err == nil && !same:
			t.Fatal("a wrong answer")
		case err == nil:
		case !errors.Is(err, ErrIndex) || !errors.As(err, &format) || format.File == "":
			t.Fatalf("error %v", err)
		default:
			errs++
		}
	}
	for pos := uint64(0); pos < want.Len(); pos += stride {
		a, err := ops.At(pos)
		b, _ := want.At(pos)
		check(err, a == b)
	}
	end, _ := want.Bounds()
	for block := uint64(0); block < end; block += 3 * stride {
		a, aPos, aOK, err := ops.Find(block)
		b, bPos, bOK, _ := want.Find(block)
		check(err, a == b && aPos == bPos && aOK == bOK)
		a, aPos, aOK, err = ops.Next(block)
		b, bPos, bOK, _ = want.Next(block)
		check(err, a == b && aPos == bPos && aOK == bOK)
	}
	return errs
}

// TestIndexInconsistent: pages that are good by themselves and say what cannot
// be. Nobody writes such an index; it must not lead a reader astray all the same.
func TestIndexInconsistent(t *testing.T) {
	// 300 zero ops in reverse order: pages 1–3 of entries, 4 the tree, 5 order.
	tests := []struct {
		name   string
		page   int
		change func(page []byte)
	}{
		{"tree names a lower block", 4, func(p []byte) { le.PutUint32(p[4:], le.Uint32(p[4:])-3) }},
		{"order names another entry", 5, func(p []byte) { le.PutUint32(p[40:], le.Uint32(p[44:])) }},
		{"order names no entry", 5, func(p []byte) { le.PutUint32(p[40:], 300) }},
		{"position past the end", 2, func(p []byte) { le.PutUint32(p[28:], 300) }},
		{"type", 2, func(p []byte) { p[15] = byte(cow.Label) }},
		{"unused high bits", 2, func(p []byte) { p[15] |= 0x10 }},
		{"unused low bits", 2, func(p []byte) { p[14] |= 0x40 }},
		{"zero op of two blocks", 2, func(p []byte) { p[14] |= 1 << 3 }},
		{"compression", 2, func(p []byte) { p[14] |= 7 }},
		{"data past the end", 2, func(p []byte) { le.PutUint64(p[16:], 1<<40) }},
		{"negative data offset", 2, func(p []byte) { le.PutUint64(p[16:], 1<<63) }},
		{"source past the end", 2, func(p []byte) {
			p[15] = byte(cow.Copy)
			le.PutUint32(p[8:], 300)
		}},
		{"long data", 2, func(p []byte) { le.PutUint32(p[4:], 1<<31) }},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			fsys := crashfs.New("d")
			writeZeros(t, fsys, "d/x.cow", 300, true)
			must(t, BuildIndex(ctx, fsys, "d/x.cow"))
			want := openCOW(t, fsys, "d/x.cow", OpenCOWOptions{NoIndex: true}).Ops
			b := readFile(t, fsys, "d/x.idx")
			p := b[test.page*pageSize:][:pageSize]
			test.change(p)
			seal(p, int64(test.page))
			putAgain(t, fsys, "d/x.idx", b)
			if damaged(t, openCOW(t, fsys, "d/x.cow", OpenCOWOptions{}).Ops, want, 1) == 0 {
				t.Error("not noticed")
			}
		})
	}
}

// TestIndexPageBegins: a page of entries that begins at another block than the
// tree says leads nobody back, neither who comes by the tree nor who comes from
// the page before.
func TestIndexPageBegins(t *testing.T) {
	fsys := crashfs.New("d")
	writeZeros(t, fsys, "d/x.cow", 300, false)
	must(t, BuildIndex(ctx, fsys, "d/x.cow"))
	b := readFile(t, fsys, "d/x.idx")
	const n = entryPagesFrom + 1
	p := b[n*pageSize:][:pageSize]
	first := uint64(le.Uint32(p))
	le.PutUint32(p, 0)
	seal(p, n)
	putAgain(t, fsys, "d/x.idx", b)
	ops := openCOW(t, fsys, "d/x.cow", OpenCOWOptions{}).Ops
	if op, _, _, err := ops.Next(first - 1); !errors.Is(err, ErrIndex) {
		t.Errorf("Next(%d) = %+v, %v", first-1, op, err)
	}
	if _, _, ok, err := ops.Find(first); !errors.Is(err, ErrIndex) {
		t.Errorf("Find(%d) = %v, %v", first, ok, err)
	}
}

// TestEntryBounds: an entry says nothing of what lies outside the image.
func TestEntryBounds(t *testing.T) {
	r := indexRoot{targetEnd: 100, sourceEnd: 50 * cow.BlockSize, ops: 1}
	r.identity.Length = 1 << 20
	for _, c := range []struct {
		op cow.Op
		ok bool
	}{
		{cow.Op{Type: cow.Zero, NewBlock: 99, Blocks: 1}, true},
		{cow.Op{Type: cow.Zero, NewBlock: 100, Blocks: 1}, false},
		{cow.Op{Type: cow.Replace, NewBlock: 98, Blocks: 2, DataLength: 1}, true},
		{cow.Op{Type: cow.Replace, NewBlock: 98, Blocks: 4, DataLength: 1}, false},
		{cow.Op{Type: cow.Replace, NewBlock: 98, Blocks: 2}, false}, // no data
		{cow.Op{Type: cow.Copy, Blocks: 1, Source: 49}, true},
		{cow.Op{Type: cow.Copy, Blocks: 1, Source: 50}, false},
		{cow.Op{Type: cow.Copy, Blocks: 1, Source: 1<<48 - 1}, false},
		{cow.Op{Type: cow.Xor, Blocks: 1, Source: 49 * cow.BlockSize, DataLength: 1}, true},
		{cow.Op{Type: cow.Xor, Blocks: 1, Source: 49*cow.BlockSize + 1, DataLength: 1}, false},
		{cow.Op{Type: cow.Xor, Blocks: 1, Source: 49 * cow.BlockSize}, false},
	} {
		var b [entrySize]byte
		e := entry{op: c.op}
		e.encode(&b)
		if _, rule := r.decodeEntry(b[:]); (rule == "") != c.ok {
			t.Errorf("%+v: %q", c.op, rule)
		}
	}
}

// TestIndexMisplacedPage swaps pages that are good by themselves.
func TestIndexMisplacedPage(t *testing.T) {
	fsys := crashfs.New("d")
	writeZeros(t, fsys, "d/x.cow", 300, true)
	must(t, BuildIndex(ctx, fsys, "d/x.cow"))
	want := openCOW(t, fsys, "d/x.cow", OpenCOWOptions{NoIndex: true}).Ops
	b := readFile(t, fsys, "d/x.idx")
	swap := append([]byte(nil), b[pageSize:2*pageSize]...)
	copy(b[pageSize:], b[2*pageSize:3*pageSize])
	copy(b[2*pageSize:], swap)
	putAgain(t, fsys, "d/x.idx", b)
	if damaged(t, openCOW(t, fsys, "d/x.cow", OpenCOWOptions{}).Ops, want, 1) == 0 {
		t.Error("not noticed")
	}
}

// TestIndexRefused: files that are not the index of the COW. The COW is loaded
// instead.
func TestIndexRefused(t *testing.T) {
	reseal := func(b []byte, change func(root []byte)) []byte {
		change(b)
		seal(b[:pageSize], 0)
		return b
	}
	tests := []struct {
		name   string
		change func(t *testing.T, fsys *crashfs.FS, index []byte) []byte
		offset int64
	}{
		{"empty", func(_ *testing.T, _ *crashfs.FS, b []byte) []byte { return nil }, 0},
		{"a page short", func(_ *testing.T, _ *crashfs.FS, b []byte) []byte { return b[:len(b)-pageSize] }, 2 * pageSize},
		{"a byte short", func(_ *testing.T, _ *crashfs.FS, b []byte) []byte { return b[:len(b)-1] }, 0},
		{"a page long", func(_ *testing.T, _ *crashfs.FS, b []byte) []byte { return append(b, make([]byte, pageSize)...) }, 4 * pageSize},
		{"magic", func(_ *testing.T, _ *crashfs.FS, b []byte) []byte {
			return reseal(b, func(r []byte) { r[0]++ })
		}, 0},
		{"newer version", func(_ *testing.T, _ *crashfs.FS, b []byte) []byte {
			return reseal(b, func(r []byte) { r[8]++ })
		}, 8},
		{"unknown flag", func(_ *testing.T, _ *crashfs.FS, b []byte) []byte {
			return reseal(b, func(r []byte) { r[12] |= 2 })
		}, 12},
		{"more ordered ops than ops", func(_ *testing.T, _ *crashfs.FS, b []byte) []byte {
			return reseal(b, func(r []byte) { r[47] = 1 })
		}, 40},
		{"too many ops", func(_ *testing.T, _ *crashfs.FS, b []byte) []byte {
			return reseal(b, func(r []byte) { r[39] = 1 })
		}, 32},
		{"writes past all blocks", func(_ *testing.T, _ *crashfs.FS, b []byte) []byte {
			return reseal(b, func(r []byte) { le.PutUint64(r[56:], 1<<52) })
		}, 56},
		{"reads past all sources", func(_ *testing.T, _ *crashfs.FS, b []byte) []byte {
			return reseal(b, func(r []byte) { le.PutUint64(r[64:], 1<<63) })
		}, 64},
		{"COW with another header", func(t *testing.T, fsys *crashfs.FS, b []byte) []byte {
			c := readFile(t, fsys, "d/x.cow")
			c[62]++ // slots of the op table
			putAgain(t, fsys, "d/x.cow", c)
			return b
		}, 28},
		{"longer COW", func(t *testing.T, fsys *crashfs.FS, b []byte) []byte {
			c := readFile(t, fsys, "d/x.cow")
			putAgain(t, fsys, "d/x.cow", append(c, 0))
			return b
		}, 16},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			fsys := crashfs.New("d")
			writeZeros(t, fsys, "d/x.cow", 20, true)
			must(t, BuildIndex(ctx, fsys, "d/x.cow"))
			putAgain(t, fsys, "d/x.idx", test.change(t, fsys, readFile(t, fsys, "d/x.idx")))
			c := openCOW(t, fsys, "d/x.cow", OpenCOWOptions{})
			var format *FormatError
			if c.Indexed() || !errors.Is(c.IndexError, ErrIndex) || !errors.As(c.IndexError, &format) {
				t.Fatalf("index used, or error %v", c.IndexError)
			}
			t.Log(c.IndexError)
			if format.File != "/d/x.idx" || format.Offset != test.offset {
				t.Errorf("error about byte %d of %s, want %d of x.idx", format.Offset, format.File, test.offset)
			}
			if c.Ops.Len() != 20 {
				t.Errorf("%d ops loaded instead", c.Ops.Len())
			}
		})
	}
}

// TestBuildIndexFails: whatever step fails, an old index stays or the new one is
// there, and no other file.
func TestBuildIndexFails(t *testing.T) {
	injected := errors.New("injected")
	for step := int64(1); ; step++ {
		fsys := crashfs.New("d")
		writeCOW(t, fsys, "d/x.cow", newRand(t, 6), cowSpec{version: 3, ops: 50})
		must(t, fsys.Put("d/x.idx", []byte("old")))
		from, failed := fsys.Steps(), false
		fsys.OnStep(func(s crashfs.Step) error {
			if s.N == from+step {
				failed = true
				return injected
			}
			return nil
		})
		err := BuildIndex(ctx, fsys, "d/x.cow")
		fsys.OnStep(nil)
		if !failed {
			must(t, err)
			t.Logf("%d steps", step-1)
			return
		}
		if !errors.Is(err, injected) {
			t.Fatalf("step %d: error %v", step, err)
		}
		names, err := fsys.ReadDir("d")
		must(t, err)
		if fmt.Sprint(names) != "[x.cow x.idx]" {
			t.Errorf("step %d leaves %v", step, names)
		}
		c := openCOW(t, fsys, "d/x.cow", OpenCOWOptions{})
		if old := string(readFile(t, fsys, "d/x.idx")) == "old"; old == c.Indexed() {
			t.Errorf("step %d: old index %v, used %v", step, old, c.Indexed())
		}
	}
}

func TestBuildIndexCancelled(t *testing.T) {
	cancelled, cancel := context.WithCancel(ctx)
	cancel()
	for _, reverse := range []bool{false, true} {
		fsys := crashfs.New("d")
		writeZeros(t, fsys, "d/x.cow", 20, reverse)
		if err := BuildIndex(cancelled, fsys, "d/x.cow"); !errors.Is(err, context.Canceled) {
			t.Errorf("error %v", err)
		}
		if names, _ := fsys.ReadDir("d"); fmt.Sprint(names) != "[x.cow]" {
			t.Errorf("files left: %v", names)
		}
	}
}

// TestCacheConcurrency has many goroutines ask two indexes through a cache of a
// few pages.
func TestCacheConcurrency(t *testing.T) {
	fsys := crashfs.New("d")
	cache := NewCache(3 * cachedPage)
	var indexed, tables []cow.Ops
	for i, name := range []string{"d/a.cow", "d/b.cow"} {
		writeCOW(t, fsys, name, newRand(t, uint64(i)), cowSpec{version: 3, ops: 500})
		must(t, BuildIndex(ctx, fsys, name))
		indexed = append(indexed, openCOW(t, fsys, name, OpenCOWOptions{Cache: cache}).Ops)
		tables = append(tables, openCOW(t, fsys, name, OpenCOWOptions{NoIndex: true}).Ops)
	}
	var workers sync.WaitGroup
	for g := range 8 {
		rng := newRand(t, uint64(g))
		workers.Go(func() {
			for range 2000 {
				i := rng.IntN(2)
				end, _ := tables[i].Bounds()
				block := rng.Uint64N(end + 2)
				op, pos, ok, err := indexed[i].Next(block)
				want, wantPos, wantOK, _ := tables[i].Next(block)
				op.Checksum, op.HasChecksum = 0, false
				if err != nil || op != want || pos != wantPos || ok != wantOK {
					t.Errorf("Next(%d) = %+v %d %v %v", block, op, pos, ok, err)
					return
				}
			}
		})
	}
	workers.Wait()
	if n := cache.pages.Len(); n > 3 {
		t.Errorf("%d pages in a cache for 3", n)
	}
}

// TestIndexPaths pins the names.
func TestIndexPaths(t *testing.T) {
	for _, test := range [][3]string{
		{"a/data.cow", "a/data.idx", "a/data.sum"},
		{"a/data", "a/data.idx", "a/data.sum"},
		{"a/layer-001.cow", "a/layer-001.idx", "a/layer-001.sum"},
		{"a/x.cow.1", "a/x.cow.1.idx", "a/x.cow.1.sum"},
	} {
		if a, b := IndexPath(test[0]), SumsPath(test[0]); a != test[1] || b != test[2] {
			t.Errorf("%s: %s %s", test[0], a, b)
		}
	}
}
