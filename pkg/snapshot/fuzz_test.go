package snapshot

import (
	"errors"
	"testing"

	"github.com/snapmerge/snapmerge/pkg/blockio"
	"github.com/snapmerge/snapmerge/pkg/blockio/crashfs"
	"github.com/snapmerge/snapmerge/pkg/cow"
)

// patched cuts a file to a size, or lengthens it, and changes bytes of it: four
// bytes of patches are an offset and what to xor there. So the fuzzer's inputs are
// small and what comes of them is still much like an index or sums. sealed gives
// all pages right checksums and numbers afterwards.
func patched(file []byte, size uint16, patches []byte, sealed bool) []byte {
	b := make([]byte, size)
	copy(b, file)
	for ; len(patches) >= 4 && size > 0; patches = patches[4:] {
		at := int(patches[0]) | int(patches[1])<<8 | int(patches[2])<<16
		b[at%len(b)] ^= patches[3]
	}
	for n := 0; sealed && (n+1)*pageSize <= len(b); n++ {
		seal(b[n*pageSize:][:pageSize], int64(n))
	}
	return b
}

// FuzzIndex damages an index. Nothing but errors that wrap ErrIndex may come of
// it.
func FuzzIndex(f *testing.F) {
	fsys := crashfs.New("d")
	writeCOW(f, fsys, "d/x.cow", newRand(f, 1), cowSpec{version: 3, ops: 100})
	must(f, BuildIndex(ctx, fsys, "d/x.cow"))
	cowSize := int64(len(readFile(f, fsys, "d/x.cow")))
	index := readFile(f, fsys, "d/x.idx")
	size := uint16(len(index))
	if int(size) != len(index) {
		f.Fatalf("an index of %d bytes is too long", len(index))
	}
	f.Add(size, []byte(nil), false)
	f.Add(size, []byte(nil), true)
	f.Add(size-pageSize, []byte{12, 0, 0, 1}, true) // order left out
	file, err := fsys.Open("d/x.cow", blockio.ReadOnly)
	must(f, err)
	c, err := cow.Open(file, file.Size(), cow.OpenOptions{})
	must(f, err)
	header, err := storedHeader(file, c.Header())
	must(f, err)
	f.Fuzz(func(t *testing.T, size uint16, patches []byte, sealed bool) {
		fsys := crashfs.New("d")
		must(t, fsys.Put("d/x.idx", patched(index, size, patches, sealed)))
		file, err := fsys.Open("d/x.idx", blockio.ReadOnly)
		must(t, err)
		check := func(err error) bool {
			var format *FormatError
			if err != nil && (!errors.Is(err, ErrIndex) || !errors.As(err, &format)) {
				t.Fatal(err)
			}
			return err == nil
		}
		x, err := OpenIndex(file, cowSize, header, NewCache(1<<20))
		if !check(err) {
			return
		}
		end, _ := x.Bounds()
		for pos := uint64(0); pos < x.Len(); pos += 1 + x.Len()/50 {
			op, err := x.At(pos)
			if check(err) && op.DataOffset+int64(op.DataLength) > cowSize {
				t.Fatalf("op %+v", op)
			}
		}
		for i := range uint64(50) {
			block := i * (end/50 + 1)
			_, _, _, err := x.Find(block)
			check(err)
			op, pos, ok, err := x.Next(block)
			if check(err) && ok && (pos >= x.Len() || op.NewBlock+uint64(op.Blocks) <= block) {
				t.Fatalf("Next(%d) = %+v, position %d of %d", block, op, pos, x.Len())
			}
		}
	})
}

// FuzzSums damages sums and the COW. Nothing but errors that wrap ErrSums or
// ErrMismatch may come of it.
func FuzzSums(f *testing.F) {
	fsys := crashfs.New("d")
	writeZeros(f, fsys, "d/x.cow", 10, false)
	must(f, WriteSums(ctx, fsys, "d/x.cow"))
	stored, sums := readFile(f, fsys, "d/x.cow"), readFile(f, fsys, "d/x.sum")
	cowSize, size := uint16(len(stored)), uint16(len(sums))
	f.Add(cowSize, []byte(nil), size, []byte(nil), false)
	f.Add(cowSize, []byte{26, 0, 0, 1}, size, []byte(nil), true)
	f.Fuzz(func(t *testing.T, cowSize uint16, cowPatches []byte, size uint16, patches []byte, sealed bool) {
		fsys := crashfs.New("d")
		must(t, fsys.Put("d/x.cow", patched(stored, cowSize, cowPatches, false)))
		must(t, fsys.Put("d/x.sum", patched(sums, size, patches, sealed)))
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
