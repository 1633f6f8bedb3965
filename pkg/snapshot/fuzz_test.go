package snapshot

import (
	"errors"
	"testing"

	"github.com/snapmerge/snapmerge/pkg/blockio"
	"github.com/snapmerge/snapmerge/pkg/blockio/crashfs"
	"github.com/snapmerge/snapmerge/pkg/cow"
)

// sealAll gives every whole page a right checksum and number, so that the fuzzer
// gets behind them.
func sealAll(b []byte) []byte {
	b = append([]byte(nil), b...)
	for n := 0; (n+1)*pageSize <= len(b); n++ {
		seal(b[n*pageSize:][:pageSize], int64(n))
	}
	return b
}

// FuzzIndex opens anything as an index, with and without right checksums. Nothing
// but errors that wrap ErrIndex may come of it.
func FuzzIndex(f *testing.F) {
	fsys := crashfs.New("d")
	writeCOW(f, fsys, "d/x.cow", newRand(f, 1), cowSpec{version: 3, ops: 60, maxBlock: 16 << 10})
	must(f, BuildIndex(ctx, fsys, "d/x.cow"))
	stored := readFile(f, fsys, "d/x.cow")
	index := readFile(f, fsys, "d/x.idx")
	f.Add(index, false)
	f.Add(index, true)
	f.Add(index[:pageSize], true)
	file, err := fsys.Open("d/x.cow", blockio.ReadOnly)
	must(f, err)
	c, err := cow.Open(file, file.Size(), cow.OpenOptions{})
	must(f, err)
	header, err := storedHeader(file, c.Header())
	must(f, err)
	f.Fuzz(func(t *testing.T, b []byte, sealed bool) {
		if sealed {
			b = sealAll(b)
		}
		fsys := crashfs.New("d")
		must(t, fsys.Put("d/x.idx", b))
		file, err := fsys.Open("d/x.idx", blockio.ReadOnly)
		must(t, err)
		check := func(err error) bool {
			var format *FormatError
			if err != nil && (!errors.Is(err, ErrIndex) || !errors.As(err, &format)) {
				t.Fatal(err)
			}
			return err == nil
		}
		x, err := OpenIndex(file, int64(len(stored)), header, NewCache(1<<20))
		if !check(err) {
			return
		}
		end, _ := x.Bounds()
		for pos := uint64(0); pos < x.Len(); pos += 1 + x.Len()/50 {
			op, err := x.At(pos)
			if check(err) && op.DataOffset+int64(op.DataLength) > int64(len(stored)) {
				t.Fatalf("op %+v", op)
			}
		}
		for i := range uint64(50) {
			block := i * (end/50 + 1)
			_, _, _, err := x.Find(block)
			check(err)
			_, pos, ok, err := x.Next(block)
			if check(err) && ok && pos >= x.Len() {
				t.Fatalf("position %d of %d", pos, x.Len())
			}
		}
	})
}

// FuzzSums takes anything for sums. Nothing but errors that wrap ErrSums or
// ErrMismatch may come of it.
func FuzzSums(f *testing.F) {
	fsys := crashfs.New("d")
	writeCOW(f, fsys, "d/x.cow", newRand(f, 1), cowSpec{version: 3, ops: 5})
	must(f, WriteSums(ctx, fsys, "d/x.cow"))
	stored := readFile(f, fsys, "d/x.cow")
	sums := readFile(f, fsys, "d/x.sum")
	f.Add(sums, stored, false)
	f.Add(sums, stored, true)
	f.Add(sums[:pageSize], stored, true)
	f.Fuzz(func(t *testing.T, b, stored []byte, sealed bool) {
		if sealed {
			b = sealAll(b)
		}
		fsys := crashfs.New("d")
		must(t, fsys.Put("d/x.cow", stored))
		must(t, fsys.Put("d/x.sum", b))
		err := VerifySums(ctx, fsys, "d/x.cow", nil)
		var format *FormatError
		if err != nil && (!errors.As(err, &format) || !errors.Is(err, ErrSums) && !errors.Is(err, ErrMismatch)) {
			t.Fatal(err)
		}
	})
}

// FuzzRecord reads anything as a record.
func FuzzRecord(f *testing.F) {
	r := someRecord
	r.FormatVersion, r.State, r.COW = recordVersion, Ready, &Info{Length: 1}
	b, err := r.encode()
	must(f, err)
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := decodeRecord(someRecord.ID, b)
		if err != nil {
			if !errors.Is(err, ErrDamaged) && !errors.Is(err, ErrNewer) {
				t.Fatal(err)
			}
			return
		}
		if r.ID != someRecord.ID || r.FormatVersion != recordVersion {
			t.Fatalf("%+v", r)
		}
	})
}
