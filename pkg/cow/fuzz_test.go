package cow_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"testing"

	"github.com/snapmerge/snapmerge/pkg/cow"
)

// Run these with -fuzzminimizetime 10x: inputs are kilobytes long, and to make
// each interesting one as short as can be would take all the time.

// holeAt is how much of a scratch a fuzzed file spells out, in bytes; the rest
// is left out and read as zeros, so that inputs stay small.
const holeAt = 512

// holed is a file with zeros put in at one place.
type holed struct {
	b         []byte
	at, zeros int64
}

func (h *holed) size() int64 { return int64(len(h.b)) + h.zeros }

func (h *holed) ReadAt(p []byte, off int64) (int, error) {
	for i := range p {
		switch o := off + int64(i); {
		case o >= h.size():
			return i, io.EOF
		case o < h.at:
			p[i] = h.b[o]
		case o < h.at+h.zeros:
			p[i] = 0
		default:
			n := copy(p[i:], h.b[o-h.zeros:])
			if i+n < len(p) {
				return i + n, io.EOF
			}
			return len(p), nil
		}
	}
	return len(p), nil
}

// fuzzFile is the file that an input stands for.
func fuzzFile(b []byte) *holed {
	h := &holed{b: b, at: int64(len(b))}
	if len(b) < 38 {
		return h
	}
	start := int64(binary.LittleEndian.Uint16(b[headerSizeAt:])) + holeAt
	scratch := int64(binary.LittleEndian.Uint32(b[bufferAt:]))
	if scratch >= 2<<20 && scratch < 4<<20 && start <= int64(len(b)) {
		h.at, h.zeros = start, scratch-holeAt
	}
	return h
}

// FuzzOpen checks that no input makes the reader panic, use much memory, or
// accept what it then cannot serve.
func FuzzOpen(f *testing.F) {
	seed := func(b []byte) { f.Add(b, uint64(7), false); f.Add(b, uint64(7), true) }
	for name, base := range bases {
		b := base(f)
		switch name {
		case "v2-scratch":
			seed(append(b.b[:38+holeAt:38+holeAt], b.b[38+cow.DefaultScratchSize:]...))
		case "v3-scratch":
			b.setScratch(0, 1, 2)
			seed(append(b.b[:78+holeAt:78+holeAt], b.b[78+cow.DefaultScratchSize:]...))
		default:
			seed(b.b)
		}
	}
	f.Fuzz(func(t *testing.T, b []byte, label uint64, useLabel bool) {
		file := fuzzFile(b)
		o := cow.OpenOptions{}
		if useLabel {
			o.Label = &label
		}
		before := heap()
		r, err := cow.Open(file, file.size(), o)
		if err != nil {
			wantFormatError(t, err)
			return
		}
		table, err := r.Load()
		if used := int64(heap() - before); used > 64<<20 {
			t.Errorf("%d bytes of heap for a file of %d", used, file.size())
		}
		for _, call := range []func() error{
			func() error { _, err := r.Scratch(); return err },
			func() error { _, err := r.Labels(); return err },
			func() error { _, err := r.Identity(); return err },
			func() error { return r.Walk(func(cow.RawOp) error { return nil }) },
		} {
			if other := call(); other != nil {
				wantFormatError(t, other)
				if err == nil {
					t.Errorf("the file loads, yet: %v", other)
				}
			}
		}
		if err != nil {
			wantFormatError(t, err)
			return
		}
		checkLoaded(t, file, table)
	})
}

// checkLoaded uses the first ops of a table.
func checkLoaded(t *testing.T, file *holed, table *cow.Table) {
	d := cow.NewDecoder(file)
	if table.Len() > uint64(len(file.b))/16 {
		t.Errorf("%d ops in %d bytes", table.Len(), len(file.b))
	}
	for pos := range min(table.Len(), 64) {
		op, err := table.At(pos)
		if err != nil {
			t.Fatal(err)
		}
		for i := range uint64(op.Blocks) {
			if found, at, ok, err := table.Find(op.NewBlock + i); err != nil || !ok || at != pos || found != op {
				t.Fatalf("Find(%d) = %+v at %d, %v, %v; want op %d, %+v", op.NewBlock+i, found, at, ok, err, pos, op)
			}
		}
		if op.Type == cow.Copy {
			continue
		}
		if err := d.Decode(op, make([]byte, op.Blocks*cow.BlockSize)); err != nil {
			wantFormatError(t, err)
		}
	}
}

// FuzzDecode checks that no data makes a decoder panic, use much memory, write
// where it must not, or depend on what it decoded before.
func FuzzDecode(f *testing.F) {
	r := rand.New(rand.NewPCG(11, 12))
	for _, c := range algorithms {
		for factor := range uint8(3) {
			f.Add(uint8(c), factor, pack(f, c, image(r, 1<<factor)))
		}
	}
	used := cow.NewDecoder(nil)
	f.Fuzz(func(t *testing.T, c, factor uint8, stored []byte) {
		op := cow.Op{
			Type: cow.Replace, Compression: cow.Compression(c % 5), Blocks: 1 << (factor % 7),
			DataLength: len(stored),
		}
		if op.Compression == cow.None {
			op.DataLength = op.Blocks * cow.BlockSize
			stored = append(stored, make([]byte, op.DataLength)...)[:op.DataLength]
		}
		size := op.Blocks * cow.BlockSize
		buf := bytes.Repeat([]byte{0xa5}, size+64)
		before := heap()
		err := cow.NewDecoder(nil).DecodeBytes(op, stored, buf[:size])
		if grown := int64(heap() - before); grown > 64<<20 {
			t.Errorf("%d bytes of heap for %d bytes of %s", grown, len(stored), op.Compression)
		}
		if !bytes.Equal(buf[size:], bytes.Repeat([]byte{0xa5}, 64)) {
			t.Error("written past the end of the buffer")
		}
		again := make([]byte, size)
		errAgain := used.DecodeBytes(op, stored, again)
		if (err == nil) != (errAgain == nil) {
			t.Fatalf("a fresh decoder says %v, a used one %v", err, errAgain)
		}
		if err != nil {
			var format *cow.FormatError
			if !errors.As(err, &format) {
				t.Errorf("error %v, want a format error", err)
			}
			return
		}
		if !bytes.Equal(buf[:size], again) {
			t.Error("a used decoder gives other data than a fresh one")
		}
	})
}
