package snapshot

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"testing"

	"github.com/snapmerge/snapmerge/pkg/blockio"
	"github.com/snapmerge/snapmerge/pkg/blockio/crashfs"
	"github.com/snapmerge/snapmerge/pkg/cow"
)

// summedCOW makes a COW of a little more than two chunks, and its sums.
func summedCOW(t testing.TB) *crashfs.FS {
	t.Helper()
	fsys := crashfs.New("d")
	rng := newRand(t, 1)
	f, err := fsys.Open("d/x.cow", blockio.Create)
	must(t, err)
	w, err := cow.NewWriter(f, cow.WriterOptions{Version: 3, OpCountMax: 600})
	must(t, err)
	data := make([]byte, 600*bs)
	noise(rng, data)
	must(t, w.Replace(0, data))
	must(t, w.Finalize())
	must(t, f.Close())
	must(t, WriteSums(ctx, fsys, "d/x.cow"))
	return fsys
}

func TestSums(t *testing.T) {
	fsys := summedCOW(t)
	size := int64(len(readFile(t, fsys, "d/x.cow")))
	var last int64
	must(t, VerifySums(ctx, fsys, "d/x.cow", func(done, total int64) {
		if done <= last || total != size {
			t.Errorf("progress %d of %d after %d", done, total, last)
		}
		last = done
	}))
	if last != size {
		t.Errorf("progress ends at %d of %d", last, size)
	}
	must(t, fsys.Put("d/y.cow", readFile(t, fsys, "d/x.cow")))
	must(t, WriteSums(ctx, fsys, "d/y.cow"))
	must(t, VerifySums(ctx, fsys.Crash(crashfs.Nothing), "d/y.cow", nil)) // durable
}

// TestSumsManyChunks needs a second page of sums: for a COW with a gigabyte of
// empty op slots, a hole, and some data behind it.
func TestSumsManyChunks(t *testing.T) {
	if testing.Short() {
		t.Skip("reads 3 GiB of zeros")
	}
	name := t.TempDir() + "/x.cow"
	f, err := blockio.OS().Open(name, blockio.Create)
	must(t, err)
	defer f.Close()
	w, err := cow.NewWriter(f, cow.WriterOptions{Version: 3, OpCountMax: numbersPage * chunkSize / 16})
	must(t, err)
	data := make([]byte, 2*chunkSize)
	noise(newRand(t, 5), data)
	must(t, w.Replace(0, data))
	must(t, w.Finalize())
	must(t, WriteSums(ctx, blockio.OS(), name))
	must(t, VerifySums(ctx, blockio.OS(), name, nil))
	_, err = f.WriteAt([]byte{1}, f.Size()-1)
	must(t, err)
	var format *FormatError
	if err := VerifySums(ctx, blockio.OS(), name, nil); !errors.As(err, &format) || format.Offset != f.Size()/chunkSize*chunkSize {
		t.Errorf("error %v", err)
	}
}

// TestSumsDamage flips single bits in the COW and its sums.
func TestSumsDamage(t *testing.T) {
	fsys := summedCOW(t)
	rng := newRand(t, 2)
	c, s := readFile(t, fsys, "d/x.cow"), readFile(t, fsys, "d/x.sum")
	flip := func(name string, good []byte, i int, kind error) {
		t.Helper()
		bad := append([]byte(nil), good...)
		bad[i] ^= 1 << rng.IntN(8)
		putAgain(t, fsys, name, bad)
		err := VerifySums(ctx, fsys, "d/x.cow", nil)
		var format *FormatError
		if !errors.Is(err, kind) || !errors.As(err, &format) || !strings.Contains(format.File, name) {
			t.Fatalf("byte %d of %s: error %v", i, name, err)
		}
		if kind == ErrMismatch && i >= bs && format.Offset != int64(i)/chunkSize*chunkSize {
			t.Fatalf("byte %d of %s: error about byte %d", i, name, format.Offset)
		}
		putAgain(t, fsys, name, good)
	}
	for range 20 {
		flip("d/x.cow", c, rng.IntN(len(c)), ErrMismatch)
	}
	for _, i := range []int{0, 10, 27, 77, chunkSize - 1, chunkSize, 2*chunkSize - 1, 2 * chunkSize, len(c) - 1} {
		flip("d/x.cow", c, i, ErrMismatch)
	}
	for i := 0; i < len(s); i += 1 + rng.IntN(10) {
		flip("d/x.sum", s, i, ErrSums)
	}
	must(t, VerifySums(ctx, fsys, "d/x.cow", nil))
}

func TestSumsRefused(t *testing.T) {
	reseal := func(b []byte, at int) []byte {
		b[at]++
		seal(b[:pageSize], 0)
		return b
	}
	tests := []struct {
		name   string
		file   string
		change func(b []byte) []byte
		kind   error
		want   string
	}{
		{"short COW", "d/x.cow", func(b []byte) []byte { return b[:len(b)-1] }, ErrMismatch, "were summed"},
		{"long COW", "d/x.cow", func(b []byte) []byte { return append(b, 0) }, ErrMismatch, "were summed"},
		{"empty COW", "d/x.cow", func(b []byte) []byte { return nil }, ErrMismatch, "were summed"},
		{"merged in place", "d/x.cow", func(b []byte) []byte { b[cow.NumMergeOpsOffset] = 9; return b }, ErrMismatch, "merged in place"},
		{"another op", "d/x.cow", func(b []byte) []byte { b[78+64+16*599+4]++; return b }, ErrMismatch, "another COW"},
		{"other data", "d/x.cow", func(b []byte) []byte { b[len(b)-1]++; return b }, ErrMismatch, fmt.Sprintf("byte %d:", 2<<20)},
		{"no magic", "d/x.cow", func(b []byte) []byte { b[0]++; return b }, ErrMismatch, "checksum"},
		{"empty sums", "d/x.sum", func(b []byte) []byte { return nil }, ErrSums, "bytes"},
		{"sums a page short", "d/x.sum", func(b []byte) []byte { return b[:pageSize] }, ErrSums, "bytes"},
		{"sums a page long", "d/x.sum", func(b []byte) []byte { return append(b, make([]byte, pageSize)...) }, ErrSums, "bytes"},
		{"no sums", "d/x.sum", func(b []byte) []byte { return reseal(b, 0) }, ErrSums, "magic"},
		{"newer version", "d/x.sum", func(b []byte) []byte { return reseal(b, 8) }, ErrSums, "version"},
		{"other chunks", "d/x.sum", func(b []byte) []byte { return reseal(b, 12) }, ErrSums, "chunks"},
		{"huge", "d/x.sum", func(b []byte) []byte { b[22] = 0xff; return reseal(b, 0x17) }, ErrSums, "bytes"},
		{"negative", "d/x.sum", func(b []byte) []byte { b[23] = 0xfe; return reseal(b, 0x17) }, ErrSums, "range"},
		{"sums of another COW", "d/x.sum", func(b []byte) []byte { return reseal(b, 16) }, ErrMismatch, "were summed"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			fsys := summedCOW(t)
			putAgain(t, fsys, test.file, test.change(readFile(t, fsys, test.file)))
			err := VerifySums(ctx, fsys, "d/x.cow", nil)
			t.Log(err)
			about := "d/x.cow"
			if test.kind == ErrSums {
				about = "d/x.sum"
			}
			if !errors.Is(err, test.kind) || !strings.Contains(err.Error(), test.want) || !strings.Contains(err.Error(), about) {
				t.Errorf("want an error about %s that wraps %v and says %q", about, test.kind, test.want)
			}
		})
	}
}

func TestSumsScratchHint(t *testing.T) {
	fsys := crashfs.New("d")
	writeCOW(t, fsys, "d/x.cow", newRand(t, 3), cowSpec{version: 2, ops: 5, scratch: true})
	must(t, WriteSums(ctx, fsys, "d/x.cow"))
	b := readFile(t, fsys, "d/x.cow")
	b[38] = 1 // state of the scratch
	putAgain(t, fsys, "d/x.cow", b)
	err := VerifySums(ctx, fsys, "d/x.cow", nil)
	if !errors.Is(err, ErrMismatch) || !strings.Contains(err.Error(), "merge in place") {
		t.Errorf("error %v", err)
	}
}

func TestSumsAbsent(t *testing.T) {
	fsys := summedCOW(t)
	must(t, fsys.Remove("d/x.sum"))
	if err := VerifySums(ctx, fsys, "d/x.cow", nil); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("error %v", err)
	}
}

func TestSumsCancelled(t *testing.T) {
	fsys := summedCOW(t)
	cancelled, cancel := context.WithCancel(ctx)
	err := VerifySums(cancelled, fsys, "d/x.cow", func(int64, int64) { cancel() })
	if !errors.Is(err, context.Canceled) {
		t.Errorf("verify: error %v", err)
	}
	must(t, fsys.Remove("d/x.sum"))
	if err := WriteSums(cancelled, fsys, "d/x.cow"); !errors.Is(err, context.Canceled) {
		t.Errorf("write: error %v", err)
	}
	if names, _ := fsys.ReadDir("d"); fmt.Sprint(names) != "[x.cow]" {
		t.Errorf("files left: %v", names)
	}
}

// TestSumsWriterPieces gives the same bytes in pieces of all sizes.
func TestSumsWriterPieces(t *testing.T) {
	fsys := summedCOW(t)
	c, want := readFile(t, fsys, "d/x.cow"), readFile(t, fsys, "d/x.sum")
	rng := newRand(t, 4)
	f, err := fsys.Open("d/pieces", blockio.Create)
	must(t, err)
	w := newSumsWriter(f)
	for rest := c; len(rest) > 0; {
		n := min(len(rest), rng.IntN(3*chunkSize/2))
		must(t, w.add(rest[:n]))
		rest = rest[n:]
	}
	identity := cow.Identity{Length: int64(le.Uint64(want[16:])), CRC: le.Uint32(want[24:])}
	must(t, w.finish(identity, 0))
	if string(readFile(t, fsys, "d/pieces")) != string(want) {
		t.Error("the sums differ")
	}
}
