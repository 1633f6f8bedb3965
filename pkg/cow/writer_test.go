package cow_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/snapmerge/snapmerge/pkg/cow"
)

// TestSample writes the sample file of Android's tools, byte for byte.
func TestSample(t *testing.T) {
	data := make([]byte, cow.BlockSize)
	copy(data, "This is some data, believe it")
	file := write(t, cow.WriterOptions{Version: 2, ClusterOps: 5, ScratchSize: cow.DefaultScratchSize, NumMergeOps: 1}, func(w *cow.Writer) error {
		return steps(w.Copy(0, 5, 1), w.Replace(2, data), w.Label(1), w.Xor(50, 24*cow.BlockSize+10, data), w.Zero(5, 10), w.Label(2))
	})
	sum := sha256.Sum256(file)
	if got, want := hex.EncodeToString(sum[:]), "afd7288855d0d9afd55e87910cc1886d7e73b97876cc4d15b85303d8027c8e2f"; got != want || len(file) != 2105826 {
		t.Errorf("%d bytes, sha256 %s, want 2105826 bytes, %s", len(file), got, want)
	}
}

var text = bytes.Repeat([]byte("snapshot of a volume "), 200)

// random fills b, a multiple of 8 bytes.
func random(r *rand.Rand, b []byte) {
	for i := 0; i < len(b); i += 8 {
		binary.LittleEndian.PutUint64(b[i:], r.Uint64())
	}
}

// image returns n blocks that pack well, badly or not at all in turn.
func image(r *rand.Rand, n int) []byte {
	b := make([]byte, n*cow.BlockSize)
	for i := 0; i < n; i++ {
		block := b[i*cow.BlockSize:][:cow.BlockSize]
		switch r.IntN(4) {
		case 0: // random
			random(r, block)
		case 1: // words
			copy(block, text[i%21:])
		case 2: // half random
			random(r, block[:2000])
		}
	}
	return b
}

// edit is a random set of ops and the images that it leads from and to.
type edit struct {
	base, target []byte
	sequence     []uint32
	script       func(w *cow.Writer) error
}

// newEdit makes ops for an image of 600 blocks: the upper 100 move down by one
// block, which needs ascending order; xor reads them at odd offsets, as the last
// that do; the rest is replaced, zeroed or left.
func newEdit(r *rand.Rand, withSequence bool) edit {
	const blocks = 600
	e := edit{base: image(r, blocks), target: nil}
	e.target = bytes.Clone(e.base)
	block := func(img []byte, i int) []byte { return img[i*cow.BlockSize:][:cow.BlockSize] }

	var calls []func(w *cow.Writer) error
	copy(e.target[500*cow.BlockSize:599*cow.BlockSize], e.base[501*cow.BlockSize:])
	calls = append(calls, func(w *cow.Writer) error { return w.Copy(500, 501, 99) })
	for i := range 99 {
		e.sequence = append(e.sequence, uint32(500+i))
	}

	// Xor ops that read below all that is written before them.
	for i := 480; i < 490; i++ {
		source := (i-400)*cow.BlockSize + r.IntN(2)*r.IntN(cow.BlockSize)
		data := image(r, 1)
		for j := range data {
			block(e.target, i)[j] = data[j] ^ e.base[source+j]
		}
		calls = append(calls, func(w *cow.Writer) error { return w.Xor(uint64(i), uint64(source), data) })
		e.sequence = append(e.sequence, uint32(i))
	}

	for at := 0; at < 470; {
		n := min(1+r.IntN(100), 470-at)
		start := at
		what := r.IntN(3)
		if start == 0 {
			what, n = 0, 100 // large ops in any case
		}
		switch what {
		case 0:
			data := image(r, n)
			copy(e.target[start*cow.BlockSize:], data)
			calls = append(calls, func(w *cow.Writer) error { return w.Replace(uint64(start), data) })
		case 1:
			clear(e.target[start*cow.BlockSize:][:n*cow.BlockSize])
			calls = append(calls, func(w *cow.Writer) error { return w.Zero(uint64(start), n) })
		}
		at += n
	}
	if !withSequence {
		e.sequence = nil
	}
	e.script = func(w *cow.Writer) error {
		for i, call := range calls {
			if err := call(w); err != nil {
				return err
			}
			if i%5 == 4 {
				if err := w.Label(uint64(i)); err != nil {
					return err
				}
			}
		}
		return nil
	}
	return e
}

func TestRoundTrip(t *testing.T) {
	var all []cow.WriterOptions
	for _, c := range []cow.Compression{cow.None, cow.Gz, cow.LZ4, cow.Zstd} {
		for _, cluster := range []uint32{0, 2, 3, 5, 200, 1024} {
			all = append(all, cow.WriterOptions{Version: 2, Compression: c, ClusterOps: cluster, ScratchSize: cow.DefaultScratchSize})
		}
		for block := cow.BlockSize; block <= 256<<10; block *= 2 {
			all = append(all, cow.WriterOptions{Version: 3, Compression: c, MaxBlock: block, OpCountMax: 700, ScratchSize: 3 << 20})
		}
	}
	for i, o := range all {
		if testing.Short() && i%5 > 0 { // the 13 of a compression are no multiple of 5
			continue
		}
		for _, sequence := range []bool{false, true} {
			if sequence && o.Version == 2 && o.ClusterOps == 0 {
				continue
			}
			t.Run(fmt.Sprintf("v%d-%s-cluster%d-max%d-sequence=%v", o.Version, o.Compression, o.ClusterOps, o.MaxBlock, sequence), func(t *testing.T) {
				seed := rand.Uint64()
				t.Logf("seed %d", seed)
				e := newEdit(rand.New(rand.NewPCG(seed, 0)), sequence)
				o.Sequence = e.sequence
				file := write(t, o, e.script)
				f, table := open(t, file, nil)
				checkTable(t, f, table)
				img := bytes.Clone(e.base)
				merge(t, file, f, table, img)
				if !bytes.Equal(img, e.target) {
					t.Error("the merged image is not the target")
				}
				if o.Version == 3 {
					checkGroups(t, f, o.MaxBlock/cow.BlockSize)
				}
			})
		}
	}
}

// checkGroups checks that replace ops are no larger than allowed, and that some
// are as large as that.
func checkGroups(t *testing.T, f *cow.File, want int) {
	t.Helper()
	largest := 0
	_ = f.Walk(func(r cow.RawOp) error {
		largest = max(largest, r.Blocks)
		return nil
	})
	if largest > want || largest < want {
		t.Errorf("the largest op has %d blocks, want %d", largest, want)
	}
}

// TestRuns pins the sources of runs of ordered ops.
func TestRuns(t *testing.T) {
	const source = 100*cow.BlockSize + 7
	for _, o := range []cow.WriterOptions{{Version: 2}, {Version: 3, OpCountMax: 6, MaxBlock: 8192}} {
		_, table := open(t, write(t, o, func(w *cow.Writer) error {
			return steps(w.Copy(10, 50, 3), w.Xor(20, source, bytes.Repeat(block, 3)))
		}), nil)
		var got [][2]uint64
		for pos := range table.Len() {
			op, _ := table.At(pos)
			got = append(got, [2]uint64{op.NewBlock, op.Source})
		}
		want := [][2]uint64{{10, 50}, {11, 51}, {12, 52}, {20, source}, {21, source + cow.BlockSize}, {22, source + 2*cow.BlockSize}}
		if !slices.Equal(got, want) {
			t.Errorf("version %d: blocks and sources %v, want %v", o.Version, got, want)
		}
	}
}

// TestGrouping pins how data is cut into ops.
func TestGrouping(t *testing.T) {
	file := write(t, cow.WriterOptions{Version: 3, MaxBlock: 64 << 10, OpCountMax: 100}, func(w *cow.Writer) error {
		return w.Replace(3, make([]byte, 39*cow.BlockSize))
	})
	f, _ := open(t, file, nil)
	var got []int
	_ = f.Walk(func(r cow.RawOp) error {
		got = append(got, r.Blocks)
		return nil
	})
	if want := []int{16, 16, 4, 2, 1}; !slices.Equal(got, want) {
		t.Errorf("groups %v, want %v", got, want)
	}
}

// TestLabels opens a file, cut off after each flush, at each label that must be
// there.
func TestLabels(t *testing.T) {
	for _, o := range []cow.WriterOptions{
		{Version: 2, Compression: cow.LZ4},
		{Version: 2, Compression: cow.Gz, ClusterOps: 2},
		{Version: 2, ClusterOps: 7},
		{Version: 3, Compression: cow.Zstd, OpCountMax: 100},
	} {
		t.Run(fmt.Sprintf("v%d-cluster%d", o.Version, o.ClusterOps), func(t *testing.T) {
			m := newMemFile()
			w, err := cow.NewWriter(m, o)
			if err != nil {
				t.Fatal(err)
			}
			data := image(rand.New(rand.NewPCG(1, 2)), 3)
			for i := range uint64(9) {
				if err := steps(w.Zero(10*i, 2), w.Replace(10*i+2, data), w.Label(100+i)); err != nil {
					t.Fatal(err)
				}
				cut := m.flushed
				// In version 3, only the newest four labels survive.
				for j := uint64(0); j <= i; j++ {
					label := 100 + j
					table, err := load(cut, &label)
					if o.Version == 3 && j+4 <= i {
						wantFormatError(t, err)
						continue
					}
					if err != nil || table.Len() != 5*(j+1) {
						t.Fatalf("after label %d, label %d: %v, %v", 100+i, label, table, err)
					}
				}
				label := 101 + i
				_, err := load(cut, &label)
				wantFormatError(t, err)
			}
			if err := w.Finalize(); err != nil {
				t.Fatal(err)
			}
			f, table := open(t, m.b, nil)
			labels, err := f.Labels()
			want := 9
			if o.Version == 3 {
				want = 4
			}
			if err != nil || len(labels) != want || labels[want-1].Label != 108 || table.Len() != 45 {
				t.Errorf("labels %v, %v, %d ops", labels, err, table.Len())
			}
		})
	}
}

// TestResumePointsReplaced writes labels that take back others.
func TestResumePointsReplaced(t *testing.T) {
	file := write(t, cow.WriterOptions{Version: 3, OpCountMax: 10}, func(w *cow.Writer) error {
		return steps(w.Zero(0, 1), w.Label(1), w.Zero(1, 1), w.Label(5), w.Zero(2, 1), w.Label(7), w.Zero(3, 1), w.Label(4), w.Zero(4, 1), w.Label(4))
	})
	f, _ := open(t, file, nil)
	labels, err := f.Labels()
	if want := []cow.ResumePoint{{Label: 1, Ops: 1}, {Label: 4, Ops: 5}}; err != nil || !slices.Equal(labels, want) {
		t.Errorf("labels %v, %v, want %v", labels, err, want)
	}
	if f.Header().ResumePointCount != 2 {
		t.Errorf("the header counts %d resume points, want 2", f.Header().ResumePointCount)
	}
}

// TestJobs checks that the number of workers does not show in the file.
func TestJobs(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	data := image(rand.New(rand.NewPCG(seed, 0)), 1300) // three batches
	for _, o := range []cow.WriterOptions{
		{Version: 2, Compression: cow.Gz, ClusterOps: 1024},
		{Version: 2, Compression: cow.Zstd, ClusterOps: 1024},
		{Version: 3, Compression: cow.LZ4, MaxBlock: 64 << 10, OpCountMax: 10000},
		{Version: 3, Compression: cow.Zstd, MaxBlock: 256 << 10, OpCountMax: 10000},
		{Version: 3, Compression: cow.Zstd, Level: 9, MaxBlock: 4096, OpCountMax: 10000},
		{Version: 3, Compression: cow.Gz, MaxBlock: 16384, OpCountMax: 10000},
	} {
		var want []byte
		for _, jobs := range []int{1, 2, 7} {
			o.Jobs = jobs
			file := write(t, o, func(w *cow.Writer) error {
				return steps(w.Copy(5000, 6000, 10), w.Xor(4000, 17, data[:40*cow.BlockSize]), w.Replace(0, data), w.Zero(7000, 5000))
			})
			if want == nil {
				want = file
			}
			if !bytes.Equal(file, want) {
				t.Errorf("%+v: the file differs from that of one job", o)
			}
		}
	}
}

// TestSinkErrors fails each step of the sink in turn. The error must come out,
// and again from each call after it.
func TestSinkErrors(t *testing.T) {
	data := image(rand.New(rand.NewPCG(3, 4)), 600)
	for _, o := range []cow.WriterOptions{
		{Version: 2, Compression: cow.LZ4},
		{Version: 2, ClusterOps: 100, ScratchSize: cow.DefaultScratchSize, Sequence: []uint32{1, 0}},
		{Version: 3, Compression: cow.Zstd, MaxBlock: 8192, OpCountMax: 3000, Jobs: 2, Sequence: []uint32{1, 0}},
	} {
		script := func(w *cow.Writer) error {
			if err := steps(w.Xor(0, 40960, data[:cow.BlockSize]), w.Copy(1, 3, 1), w.Label(1)); err != nil {
				return err
			}
			return steps(w.Replace(2, data), w.Label(2), w.Zero(2000, 1000))
		}
		for n := 0; ; n++ {
			m := newMemFile()
			m.failAfter = n
			w, err := cow.NewWriter(m, o)
			if err == nil {
				err = script(w)
				if err == nil {
					err = w.Finalize()
				}
				if again := w.Zero(4000, 1); err != nil && !errors.Is(again, errInjected) {
					t.Errorf("step %d: a call after the error gives %v", n, again)
				}
			}
			if !m.failed {
				if err != nil {
					t.Errorf("no step failed, yet: %v", err)
				}
				break
			}
			if !errors.Is(err, errInjected) {
				t.Fatalf("step %d failed, error %v", n, err)
			}
			// Nothing unfinished passes for a file.
			if _, err := load(m.flushed, nil); o.Version == 2 && err == nil {
				t.Errorf("step %d failed, but what is durable passes for a finished file", n)
			}
		}
	}
}

// TestUnfinishedV3 checks that a version 3 file that was cut off before its
// first label is refused.
func TestUnfinishedV3(t *testing.T) {
	m := newMemFile()
	w, err := cow.NewWriter(m, cow.WriterOptions{Version: 3, OpCountMax: 5000})
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Replace(0, make([]byte, 4000*cow.BlockSize)); err != nil {
		t.Fatal(err)
	}
	if len(m.b) == 0 {
		t.Fatal("nothing written yet")
	}
	_, err = load(m.b, nil)
	wantFormatError(t, err)
}

func TestWriterArguments(t *testing.T) {
	block := make([]byte, cow.BlockSize)
	for _, tt := range []struct {
		name string
		o    cow.WriterOptions
		call func(w *cow.Writer) error // nil: NewWriter fails
	}{
		{"version", cow.WriterOptions{Version: 1}, nil},
		{"brotli", cow.WriterOptions{Version: 3, Compression: cow.Brotli}, nil},
		{"compression", cow.WriterOptions{Version: 3, Compression: 9}, nil},
		{"level", cow.WriterOptions{Version: 3, Compression: cow.Gz, Level: 99}, nil},
		{"scratch", cow.WriterOptions{Version: 3, ScratchSize: 1 << 20}, nil},
		{"cluster of one", cow.WriterOptions{Version: 2, ClusterOps: 1}, nil},
		{"cluster v3", cow.WriterOptions{Version: 3, ClusterOps: 5}, nil},
		{"sequence without clusters", cow.WriterOptions{Version: 2, Sequence: []uint32{1}}, nil},
		{"block v2", cow.WriterOptions{Version: 2, MaxBlock: 8192}, nil},
		{"block size", cow.WriterOptions{Version: 3, MaxBlock: 12288}, nil},
		{"block too large", cow.WriterOptions{Version: 3, MaxBlock: 512 << 10}, nil},
		{"too many slots", cow.WriterOptions{Version: 3, OpCountMax: 1<<32 + 1}, nil},
		{"part of a block", cow.WriterOptions{Version: 2}, func(w *cow.Writer) error { return w.Replace(0, block[1:]) }},
		{"part of a xor block", cow.WriterOptions{Version: 2}, func(w *cow.Writer) error { return w.Xor(0, 0, block[1:]) }},
		{"negative run", cow.WriterOptions{Version: 2}, func(w *cow.Writer) error { return w.Zero(0, -1) }},
		{"block number", cow.WriterOptions{Version: 2}, func(w *cow.Writer) error { return w.Zero(1<<32, 1) }},
		{"end of run", cow.WriterOptions{Version: 2}, func(w *cow.Writer) error { return w.Zero(1<<32-1, 2) }},
		{"huge block number", cow.WriterOptions{Version: 2}, func(w *cow.Writer) error { return w.Replace(1<<63, block) }},
		{"copy source", cow.WriterOptions{Version: 2}, func(w *cow.Writer) error { return w.Copy(0, 1<<48-1, 2) }},
		{"xor source", cow.WriterOptions{Version: 2}, func(w *cow.Writer) error { return w.Xor(0, 1<<48, block) }},
		{"wrapping source", cow.WriterOptions{Version: 2}, func(w *cow.Writer) error { return w.Copy(0, 1<<64-1, 2) }},
		{"order", cow.WriterOptions{Version: 3, OpCountMax: 10}, func(w *cow.Writer) error {
			if err := w.Zero(0, 1); err != nil {
				t.Fatal(err)
			}
			return w.Copy(1, 2, 1)
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m := newMemFile()
			w, err := cow.NewWriter(m, tt.o)
			if tt.call == nil {
				if err == nil {
					t.Error("no error")
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if err := tt.call(w); err == nil {
				t.Fatal("no error")
			}
			// The Writer is still good.
			if err := steps(w.Zero(77, 1), w.Finalize()); err != nil {
				t.Error(err)
			}
			if _, err := load(m.b, nil); err != nil {
				t.Error(err)
			}
			if err := w.Zero(78, 1); err == nil {
				t.Error("no error after Finalize")
			}
		})
	}
}

func TestOpTableFull(t *testing.T) {
	err := writeTo(newMemFile(), cow.WriterOptions{Version: 3, OpCountMax: 9}, func(w *cow.Writer) error { return w.Zero(0, 10) })
	if err == nil {
		t.Error("ten ops fit a table of nine")
	}
}

// TestEmpty writes files without ops.
func TestEmpty(t *testing.T) {
	for _, o := range []cow.WriterOptions{
		{Version: 2}, {Version: 2, ClusterOps: 4, ScratchSize: cow.DefaultScratchSize}, {Version: 3}, {Version: 3, OpCountMax: 100},
	} {
		file := write(t, o, func(w *cow.Writer) error { return steps(w.Zero(5, 0), w.Replace(5, nil), w.Copy(5, 5, 0)) })
		f, table := open(t, file, nil)
		checkTable(t, f, table)
		if table.Len() != 0 {
			t.Errorf("%d ops", table.Len())
		}
	}
}

func TestParseCompression(t *testing.T) {
	for _, tt := range []struct {
		in    string
		c     cow.Compression
		level int
		bad   bool
	}{
		{"none", cow.None, 0, false}, {"gz", cow.Gz, 9, false}, {"gz,1", cow.Gz, 1, false},
		{"brotli", cow.Brotli, 11, false}, {"lz4", cow.LZ4, 0, false}, {"lz4,7", cow.LZ4, 7, false},
		{"zstd", cow.Zstd, 3, false}, {"zstd,-5", cow.Zstd, -5, false}, {"zstd,22", cow.Zstd, 22, false},
		{in: "", bad: true}, {in: "zip", bad: true}, {in: "zstd,", bad: true}, {in: "zstd,x", bad: true},
		{in: "zstd,23", bad: true}, {in: "gz,0", bad: true}, {in: "gz,10", bad: true}, {in: "none,1", bad: true},
	} {
		c, level, err := cow.ParseCompression(tt.in)
		if c != tt.c || level != tt.level || (err != nil) != tt.bad {
			t.Errorf("%q: %v, %d, %v", tt.in, c, level, err)
		}
	}
}
