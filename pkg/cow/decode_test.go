package cow_test

import (
	"bytes"
	"errors"
	"fmt"
	"hash/crc32"
	"math/rand/v2"
	"testing"

	"github.com/andybalholm/brotli"
	"github.com/klauspost/compress/zlib"
	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"

	"github.com/snapmerge/snapmerge/pkg/cow"
)

// pack packs data by the means of the libraries alone.
func pack(t testing.TB, c cow.Compression, data []byte) []byte {
	t.Helper()
	var out bytes.Buffer
	switch c {
	case cow.None:
		out.Write(data)
	case cow.Gz:
		z := zlib.NewWriter(&out)
		_, _ = z.Write(data)
		_ = z.Close()
	case cow.Brotli:
		z := brotli.NewWriterLevel(&out, 5)
		_, _ = z.Write(data)
		_ = z.Close()
	case cow.LZ4:
		b := make([]byte, lz4.CompressBlockBound(len(data)))
		n, err := lz4.CompressBlock(data, b, nil)
		if err != nil || n == 0 {
			t.Fatalf("lz4: %d, %v", n, err)
		}
		out.Write(b[:n])
	case cow.Zstd:
		z, err := zstd.NewWriter(nil)
		if err != nil {
			t.Fatal(err)
		}
		out.Write(z.EncodeAll(data, nil))
	}
	return out.Bytes()
}

var algorithms = []cow.Compression{cow.None, cow.Gz, cow.Brotli, cow.LZ4, cow.Zstd}

func TestDecode(t *testing.T) {
	r := rand.New(rand.NewPCG(5, 6))
	for _, c := range algorithms {
		for blocks := 1; blocks <= 64; blocks *= 2 {
			t.Run(fmt.Sprintf("%s-%d", c, blocks), func(t *testing.T) {
				data := image(r, blocks)
				stored := pack(t, c, data)
				// A decoder that just failed has to work again.
				d := cow.NewDecoder(bytes.NewReader(append(make([]byte, 100), stored...)))
				op := cow.Op{Type: cow.Replace, Compression: c, Blocks: blocks, DataOffset: 100, DataLength: len(stored)}
				check := func() {
					t.Helper()
					got := bytes.Repeat([]byte{0xee}, len(data))
					if err := d.Decode(op, got); err != nil || !bytes.Equal(got, data) {
						t.Fatalf("decode: %v", err)
					}
				}
				check()
				for name, bad := range badData(c, stored) {
					if c == cow.None {
						continue
					}
					b := op
					b.DataLength = len(bad)
					wantDataError(t, name, d.DecodeBytes(b, bad, make([]byte, len(data))))
					check()
				}
				if c == cow.None {
					return
				}
				// Not the length that the op says.
				long := pack(t, c, append(bytes.Clone(data), 1))
				short := pack(t, c, data[1:])
				for name, bad := range map[string][]byte{"long": long, "short": short} {
					b := op
					b.DataLength = len(bad)
					wantDataError(t, name, d.DecodeBytes(b, bad, make([]byte, len(data))))
					check()
				}
			})
		}
	}
}

// badData returns spoiled forms of what is stored. Only such as the algorithm
// can notice: lz4 and brotli have no checksum.
func badData(c cow.Compression, stored []byte) map[string][]byte {
	bad := map[string][]byte{
		"cut":   stored[:len(stored)-1],
		"half":  stored[:len(stored)/2],
		"empty": {},
	}
	if c != cow.LZ4 {
		bad["trailing"] = append(bytes.Clone(stored), 0, 0, 0)
	}
	if c == cow.Gz || c == cow.Zstd {
		flipped := bytes.Clone(stored)
		flipped[len(flipped)/2] ^= 0x10
		bad["flipped"] = flipped
	}
	return bad
}

func wantDataError(t *testing.T, name string, err error) {
	t.Helper()
	var format *cow.FormatError
	if !errors.As(err, &format) || format.Offset != 100 {
		t.Errorf("%s: error %v, want a format error at byte 100", name, err)
	}
}

// TestDecodeArguments checks what is not the file's fault.
func TestDecodeArguments(t *testing.T) {
	d := cow.NewDecoder(bytes.NewReader(block))
	replace := cow.Op{Type: cow.Replace, Blocks: 1, DataLength: cow.BlockSize}
	for name, err := range map[string]error{
		"copy":          d.Decode(cow.Op{Type: cow.Copy, Blocks: 1}, make([]byte, cow.BlockSize)),
		"short buffer":  d.Decode(replace, make([]byte, 10)),
		"large buffer":  d.Decode(replace, make([]byte, 2*cow.BlockSize)),
		"other length":  d.DecodeBytes(replace, block[1:], make([]byte, cow.BlockSize)),
		"past the file": d.Decode(cow.Op{Type: cow.Xor, Blocks: 1, DataOffset: 1, DataLength: cow.BlockSize}, make([]byte, cow.BlockSize)),
	} {
		var format *cow.FormatError
		if err == nil || errors.As(err, &format) {
			t.Errorf("%s: error %v", name, err)
		}
	}
	zeros := bytes.Clone(block)
	if err := d.Decode(cow.Op{Type: cow.Zero, Blocks: 1}, zeros); err != nil || !bytes.Equal(zeros, make([]byte, cow.BlockSize)) {
		t.Errorf("zero op: %v", err)
	}
}

func TestChecksum(t *testing.T) {
	for _, c := range algorithms {
		stored := pack(t, c, block)
		op := cow.Op{
			Type: cow.Xor, Compression: c, Blocks: 1, DataOffset: 0, DataLength: len(stored),
			Checksum: crc32.Checksum(stored, crc32.MakeTable(crc32.Castagnoli)), HasChecksum: true,
		}
		d := cow.NewDecoder(bytes.NewReader(stored))
		dst := make([]byte, cow.BlockSize)
		if err := d.Decode(op, dst); err != nil || !bytes.Equal(dst, block) {
			t.Errorf("%s: %v", c, err)
		}
		op.Checksum++
		wantFormatError(t, d.Decode(op, dst))
	}
}

// TestGzOfOneBlock reads a gz op of version 2 that is as long as a block, yet
// packed.
func TestGzOfOneBlock(t *testing.T) {
	r := rand.New(rand.NewPCG(7, 8))
	random := make([]byte, cow.BlockSize)
	for i := range random {
		random[i] = byte(r.Uint32())
	}
	for n := cow.BlockSize; n > 3800; n-- {
		data := append(bytes.Clone(random[:n]), make([]byte, cow.BlockSize-n)...)
		file := write(t, cow.WriterOptions{Version: 2, Compression: cow.Gz}, func(w *cow.Writer) error { return w.Replace(0, data) })
		_, table := open(t, file, nil)
		op, _ := table.At(0)
		got := make([]byte, cow.BlockSize)
		if err := cow.NewDecoder(bytes.NewReader(file)).Decode(op, got); err != nil || !bytes.Equal(got, data) {
			t.Fatalf("%d random bytes, stored in %d: %v", n, op.DataLength, err)
		}
		if op.DataLength == cow.BlockSize {
			return
		}
	}
	t.Error("no data that packs to just 4096 bytes found")
}

// TestDecodeAllocations checks that a decoder in use allocates nothing, as far
// as that is in our hands.
func TestDecodeAllocations(t *testing.T) {
	data := image(rand.New(rand.NewPCG(9, 10)), 16)
	for _, c := range algorithms {
		stored := pack(t, c, data)
		d := cow.NewDecoder(bytes.NewReader(stored))
		op := cow.Op{Type: cow.Replace, Compression: c, Blocks: 16, DataLength: len(stored)}
		dst := make([]byte, len(data))
		n := testing.AllocsPerRun(100, func() {
			if err := d.Decode(op, dst); err != nil {
				t.Fatal(err)
			}
		})
		// The brotli library makes a few small tables, some dozen bytes, each time.
		if n > 0 && (c != cow.Brotli || n > 4) {
			t.Errorf("%s: %v allocations a call", c, n)
		}
	}
}

func BenchmarkDecode(b *testing.B) {
	for _, c := range algorithms {
		for _, blocks := range []int{1, 16} {
			b.Run(fmt.Sprintf("%s-%d", c, blocks), func(b *testing.B) {
				data := image(rand.New(rand.NewPCG(9, 10)), blocks)
				stored := pack(b, c, data)
				d := cow.NewDecoder(bytes.NewReader(stored))
				op := cow.Op{Type: cow.Replace, Compression: c, Blocks: blocks, DataLength: len(stored)}
				b.SetBytes(int64(len(data)))
				b.ReportAllocs()
				for b.Loop() {
					if err := d.Decode(op, data); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	}
}
