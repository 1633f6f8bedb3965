package cow_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"
	"testing"

	"github.com/snapmerge/snapmerge/pkg/cow"
)

// TestOddInput loads files that look odd but are sound.
func TestOddInput(t *testing.T) {
	for _, tt := range []struct {
		name, base string
		change     func(f *file)
		check      func(t *testing.T, f *cow.File, table *cow.Table)
	}{
		{"version 1 with the header of version 2", "v2", func(f *file) {
			f.u16(8, 1)
			f.u32(bufferAt, 12345) // means nothing there
		}, func(t *testing.T, f *cow.File, table *cow.Table) {
			if s, err := f.Scratch(); s != nil || err != nil {
				t.Errorf("scratch %v, %v", s, err)
			}
		}},
		{"version 1", "v2", func(f *file) {
			f.u16(8, 1)
			f.u16(headerSizeAt, 34)
			f.u64(f.op(2)+source2, f.get64(f.op(2)+source2)-4)
			f.b = slices.Delete(f.b, bufferAt, bufferAt+4)
		}, nil},
		{"bytes behind the footer", "v2", func(f *file) { f.b = append(f.b, block...) }, nil},
		{"zero op with a source", "v2", func(f *file) { f.u64(f.op(3)+source2, 1<<60) }, nil},
		{"raw op in a packed file", "v2-gz", func(f *file) {
			// Make room for the data: op 2 is the last with data in its table.
			length := int(binary.LittleEndian.Uint16(f.b[f.op(2)+length2:]))
			f.u8(f.op(2)+compression2, 0)
			f.u16(f.op(2)+length2, cow.BlockSize)
			f.u64(f.op(4)+source2, f.get64(f.op(4)+source2)+uint64(cow.BlockSize-length))
			at := int(f.ops[2].DataOffset)
			f.b = slices.Replace(f.b, at, at+length, block...)
		}, func(t *testing.T, f *cow.File, table *cow.Table) {
			if op, _, ok, _ := table.Find(2); !ok || op.Compression != cow.None || op.DataLength != cow.BlockSize {
				t.Errorf("op %+v", op)
			}
			if op, _, ok, _ := table.Find(1); !ok || op.Compression != cow.Gz {
				t.Errorf("op %+v", op)
			}
		}},
		{"more resume points than slots", "v3", func(f *file) { f.u32(resumeCountAt, 1000) }, func(t *testing.T, f *cow.File, table *cow.Table) {
			labels, err := f.Labels()
			if want := []cow.ResumePoint{{Label: 7, Ops: 6}}; err != nil || !slices.Equal(labels, want) {
				t.Errorf("labels %v, %v, want %v", labels, err, want)
			}
		}},
		{"resume point of more ops than there are", "v3", func(f *file) { f.u64(78+8, 7) }, func(t *testing.T, f *cow.File, table *cow.Table) {
			if labels, err := f.Labels(); err != nil || len(labels) != 0 {
				t.Errorf("labels %v, %v", labels, err)
			}
		}},
		{"op slots past the end of the file", "v3-scratch", func(f *file) { f.u64(opCountMaxAt, 1<<32-1) }, nil},
		{"all merged", "v3", func(f *file) { f.u64(mergedAt, 6) }, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f := bases[tt.base](t)
			tt.change(f)
			r, table := open(t, f.b, nil)
			checkTable(t, r, table)
			if tt.check != nil {
				tt.check(t, r, table)
			}
		})
	}
}

// TestMergeOrder pins the order of the merge list.
func TestMergeOrder(t *testing.T) {
	script := func(w *cow.Writer) error {
		return steps(w.Copy(30, 31, 1), w.Xor(4, 90000, block), w.Zero(20, 1), w.Replace(3, block), w.Zero(10, 1))
	}
	for _, tt := range []struct {
		o    cow.WriterOptions
		want []uint64
	}{
		{cow.WriterOptions{Version: 2, ClusterOps: 4}, []uint64{30, 4, 3, 10, 20}},
		{cow.WriterOptions{Version: 3, OpCountMax: 5}, []uint64{30, 4, 20, 3, 10}},
		{cow.WriterOptions{Version: 2, ClusterOps: 4, Sequence: []uint32{4, 30, 20}}, []uint64{4, 30, 20, 3, 10}},
		{cow.WriterOptions{Version: 3, OpCountMax: 5, Sequence: []uint32{4, 30, 20}}, []uint64{4, 30, 20, 3, 10}},
		{cow.WriterOptions{Version: 3, OpCountMax: 5, Sequence: []uint32{30, 4, 10, 3}}, []uint64{30, 4, 10, 3, 20}},
	} {
		_, table := open(t, write(t, tt.o, script), nil)
		var got []uint64
		for pos := range table.Len() {
			op, _ := table.At(pos)
			got = append(got, op.NewBlock)
		}
		if !slices.Equal(got, tt.want) {
			t.Errorf("version %d, sequence %v: order %v, want %v", tt.o.Version, tt.o.Sequence, got, tt.want)
		}
		if table.Ordered() != 2 {
			t.Errorf("%d ordered ops, want 2", table.Ordered())
		}
	}
}

// TestPartialSequence leaves an ordered op to the second part of the list.
func TestPartialSequence(t *testing.T) {
	_, table := open(t, write(t, cow.WriterOptions{Version: 3, OpCountMax: 3, Sequence: []uint32{30}}, func(w *cow.Writer) error {
		return steps(w.Zero(40, 1), w.Copy(30, 31, 1), w.Copy(1, 2, 1))
	}), nil)
	if table.Len() != 3 || table.Ordered() != 2 {
		t.Errorf("%d ops, %d ordered; want 3, 2", table.Len(), table.Ordered())
	}
}

// TestLongSequence has more numbers than one sequence op holds.
func TestLongSequence(t *testing.T) {
	const n = 50000
	sequence := make([]uint32, n)
	for i := range sequence {
		sequence[i] = uint32(i * 7 % n) // 7 does not divide n: each once
	}
	for _, o := range []cow.WriterOptions{
		{Version: 2, ClusterOps: 1024, Sequence: sequence}, {Version: 3, OpCountMax: n, Sequence: sequence},
	} {
		_, table := open(t, write(t, o, func(w *cow.Writer) error { return w.Copy(0, n, n) }), nil)
		for pos := range table.Len() {
			if op, _ := table.At(pos); op.NewBlock != uint64(sequence[pos]) || op.Source != op.NewBlock+n {
				t.Fatalf("version %d: op %d is %+v, want block %d", o.Version, pos, op, sequence[pos])
			}
		}
		if table.Ordered() != n {
			t.Errorf("%d ordered ops, want %d", table.Ordered(), n)
		}
	}
}

// TestSequenceTooLong has more numbers than ops. Nothing may be allocated for
// them; the first that cannot be right is named.
func TestSequenceTooLong(t *testing.T) {
	for _, o := range []cow.WriterOptions{
		{Version: 2, ClusterOps: 10, Sequence: []uint32{0, 1, 2, 3}}, {Version: 3, OpCountMax: 3, Sequence: []uint32{0, 1, 2, 3}},
	} {
		at := int64(78 + 3*4)
		if o.Version == 2 {
			at = 38 + 10*20 + 3*4
		}
		_, err := load(write(t, o, func(w *cow.Writer) error { return w.Zero(0, 3) }), nil)
		var format *cow.FormatError
		if !errors.As(err, &format) || format.Offset != at {
			t.Errorf("version %d: error %v, want a format error at byte %d", o.Version, err, at)
		}
	}
	f, err := cow.Open(bytes.NewReader(nil), 1<<48+1, cow.OpenOptions{})
	if wantFormatError(t, err); f != nil {
		t.Error("a file of more than 48 bits of bytes opens")
	}
}

func TestSourceBlocks(t *testing.T) {
	for _, tt := range []struct {
		op    cow.Op
		first uint64
		n     int
	}{
		{cow.Op{Type: cow.Copy, Source: 7}, 7, 1},
		{cow.Op{Type: cow.Xor, Source: 7 * cow.BlockSize}, 7, 1},
		{cow.Op{Type: cow.Xor, Source: 7*cow.BlockSize + 1}, 7, 2},
		{cow.Op{Type: cow.Xor, Source: 8*cow.BlockSize - 1}, 7, 2},
		{cow.Op{Type: cow.Replace, Source: 7}, 0, 0},
		{cow.Op{Type: cow.Zero}, 0, 0},
	} {
		if first, n := tt.op.SourceBlocks(); first != tt.first || n != tt.n {
			t.Errorf("%+v: %d, %d; want %d, %d", tt.op, first, n, tt.first, tt.n)
		}
	}
}

// TestIdentity checks what enters into the identity.
func TestIdentity(t *testing.T) {
	for _, base := range []string{"v2", "v2-sequence", "v3", "v3-sequence", "v3-scratch", "v2-scratch"} {
		f := bases[base](t)
		id := identity(t, f.b)
		if _, table := open(t, f.b, nil); table.Identity() != id {
			t.Errorf("%s: the table has %v, the file %v", base, table.Identity(), id)
		}
		if id.Length != int64(len(f.b)) {
			t.Errorf("%s: length %d, want %d", base, id.Length, len(f.b))
		}
		f.u64(mergedAt, 2)
		if base == "v3-scratch" {
			f.setScratch(2, 3)
		}
		if base[:2] == "v3" {
			f.u64(f.op(0)-16, 99) // last resume point slot
		}
		if got := identity(t, f.b); got != id {
			t.Errorf("%s: merging changed the identity from %v to %v", base, id, got)
		}
		f.u8(f.op(3)+8, f.b[f.op(3)+8]^1)
		if got, err := identityOf(f.b); err == nil && got == id {
			t.Errorf("%s: an op changed, but not the identity %v", base, id)
		}
	}
	a, b := bases["v3-sequence"](t), bases["v3-sequence"](t)
	b.u32(78, 0)
	b.u32(78+4, 1)
	if identity(t, a.b) == identity(t, b.b) {
		t.Error("the sequence changed, but not the identity")
	}
}

func identityOf(b []byte) (cow.Identity, error) {
	f, err := cow.Open(bytes.NewReader(b), int64(len(b)), cow.OpenOptions{})
	if err != nil {
		return cow.Identity{}, err
	}
	return f.Identity()
}

func identity(t *testing.T, b []byte) cow.Identity {
	t.Helper()
	id, err := identityOf(b)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

// TestScratchWindow checks which windows are taken from the scratch. The file
// has six copy ops that write blocks 0 to 5, and two others.
func TestScratchWindow(t *testing.T) {
	for _, tt := range []struct {
		name   string
		merged uint64
		blocks []uint64
		want   uint64
	}{
		{"first", 0, []uint64{0, 1, 2}, 3},
		{"backwards", 0, []uint64{2, 1, 0}, 3},
		{"later", 2, []uint64{2, 3, 4, 5}, 4},
		{"spent", 3, []uint64{0, 1, 2}, 0},
		{"spent, all ordered ops done", 6, []uint64{4, 5}, 0},
		{"none", 2, nil, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f := bases["v3-scratch"](t)
			f.u64(mergedAt, tt.merged)
			f.setScratch(tt.blocks...)
			r, table := open(t, f.b, nil)
			s, err := r.Scratch()
			if err != nil {
				t.Fatal(err)
			}
			if n, err := s.Window(table, tt.merged); n != tt.want || err != nil {
				t.Errorf("window of %d, %v, want %d", n, err, tt.want)
			}
			if s.StateOffset() != 78 || s.MetadataOffset() != 79 || s.DataOffset() != 8270 || s.Capacity() != 510 || len(s.Entries) != len(tt.blocks) {
				t.Errorf("scratch %+v", s)
			}
		})
	}
}

// TestWalk checks what a walk passes, and that it stops when told so.
func TestWalk(t *testing.T) {
	f := bases["v2"](t)
	want := []cow.OpType{cow.Copy, cow.Xor, cow.Replace, cow.Zero, cow.Cluster, cow.Zero, cow.Label, cow.Footer}
	var got []cow.OpType
	for _, op := range f.ops {
		got = append(got, op.Type)
	}
	if !slices.Equal(got, want) {
		t.Errorf("ops %v, want %v", got, want)
	}
	r, _ := open(t, f.b, nil)
	stop := errors.New("stop")
	n := 0
	if err := r.Walk(func(cow.RawOp) error {
		n++
		if n == 3 {
			return stop
		}
		return nil
	}); err != stop || n != 3 {
		t.Errorf("walk ended with %v after %d ops", err, n)
	}
}

// failing reads from a file until a number of reads have been made.
type failing struct {
	r       io.ReaderAt
	reads   int
	err     error // nil: the file ends
	tripped bool
}

func (f *failing) ReadAt(p []byte, off int64) (int, error) {
	if f.reads--; f.reads < 0 {
		f.tripped = true
		if f.err == nil {
			return 0, io.EOF
		}
		return 0, f.err
	}
	return f.r.ReadAt(p, off)
}

// TestReadErrors fails each read in turn.
func TestReadErrors(t *testing.T) {
	for base := range bases {
		for _, injected := range []error{errInjected, nil} {
			b := bases[base](t).b
			if base == "v3-scratch" {
				b[78] = cow.ScratchDone
			}
			for n := 0; ; n++ {
				r := &failing{r: bytes.NewReader(b), reads: n, err: injected}
				f, err := cow.Open(r, int64(len(b)), cow.OpenOptions{})
				if err == nil {
					_, err = f.Load()
				}
				if !r.tripped {
					if err != nil {
						t.Errorf("%s: no read failed, yet: %v", base, err)
					}
					break
				}
				want := injected
				if want == nil {
					want = io.ErrUnexpectedEOF
				}
				var format *cow.FormatError
				if !errors.Is(err, want) || errors.As(err, &format) {
					t.Errorf("%s: read %d failed with %v, error %v", base, n, injected, err)
				}
			}
		}
	}
}

// changing gives other content after a number of reads.
type changing struct {
	before, after []byte
	reads         int
}

func (c *changing) ReadAt(p []byte, off int64) (int, error) {
	if c.reads--; c.reads < 0 {
		return bytes.NewReader(c.after).ReadAt(p, off)
	}
	return bytes.NewReader(c.before).ReadAt(p, off)
}

// TestChangingFile changes the file, from one sound one to another, between any
// two reads. Whatever comes of it, it is either of the two or an error.
func TestChangingFile(t *testing.T) {
	script := func(copies, zeros int, from uint64) func(w *cow.Writer) error {
		return func(w *cow.Writer) error { return steps(w.Copy(from, 500, copies), w.Zero(300, zeros)) }
	}
	for _, sequence := range [][]uint32{nil, {3, 2}} {
		for _, version := range []int{2, 3} {
			o := cow.WriterOptions{Version: version, Sequence: sequence}
			if version == 2 {
				o.ClusterOps = 1024
			} else {
				o.OpCountMax = 100
			}
			a := write(t, o, script(10, 20, 0))
			for name, b := range map[string][]byte{
				"more":   write(t, o, script(15, 40, 0)),
				"fewer":  write(t, o, script(5, 3, 0)),
				"others": write(t, o, script(10, 20, 1)),
				"types":  write(t, o, script(20, 10, 0)),
			} {
				for n := 1; n < 20; n++ {
					// Bytes behind the last op do not matter.
					size := max(len(a), len(b))
					pad := func(f []byte) []byte { return append(bytes.Clone(f), make([]byte, size-len(f))...) }
					f, err := cow.Open(&changing{pad(a), pad(b), n}, int64(size), cow.OpenOptions{})
					if err != nil {
						t.Fatal(err)
					}
					table, err := f.Load()
					if err == nil {
						checkSound(t, fmt.Sprintf("%s version %d read %d", name, version, n), table)
					}
				}
			}
		}
	}
}

func checkSound(t *testing.T, name string, table *cow.Table) {
	t.Helper()
	for pos := range table.Len() {
		if op, err := table.At(pos); err != nil || op.Type == 0 {
			t.Errorf("%s: op %d is %+v, %v", name, pos, op, err)
		}
	}
}
