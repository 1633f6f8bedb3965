package writelog

import (
	"hash/crc32"
	"testing"

	"github.com/snapmerge/snapmerge/pkg/blockio"
	"github.com/snapmerge/snapmerge/pkg/blockio/crashfs"
)

func crc32Checksum(p []byte) uint32 { return crc32.Checksum(p, castagnoli) }

// FuzzOpen opens anything as a log: no panic, and what opens can be read,
// written, closed and opened again.
func FuzzOpen(f *testing.F) {
	fs, _, _ := build(f)
	b, err := fs.ReadFile("/l/log")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b, false, uint64(0), 0, 0, uint64(0), uint64(0))
	f.Add(b, true, uint64(6), 0, 0, uint64(0), uint64(0))
	f.Add(b[:5000], false, uint64(0), 1, 1, uint64(3), uint64(9))
	f.Fuzz(func(t *testing.T, b []byte, sealed bool, last uint64, seg, count int, first, next uint64) {
		fs := crashfs.New("/l")
		if len(b) > headerBytes+4*testSegment {
			return
		}
		if len(b) >= 64 {
			// Checksums are mended, so that what lies behind them is reached.
			le.PutUint32(b[60:], crc32Checksum(b[:60]))
			for o := headerBytes; o+recordHeader <= len(b); o += recordAlign {
				if le.Uint32(b[o:]) == recordMagic {
					if n := int(le.Uint32(b[o+12:])); n <= len(b)-o-recordHeader {
						le.PutUint32(b[o+36:], crc32Checksum(b[o+recordHeader:o+recordHeader+n]))
					}
					le.PutUint32(b[o+4:], crc32Checksum(b[o+8:o+recordHeader]))
				}
			}
		}
		file, err := fs.Open("/l/log", blockio.Create)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := file.WriteAt(b, 0); err != nil {
			t.Fatal(err)
		}
		file.Close()
		info := Info{Sealed: sealed, Last: last}
		if count != 0 {
			info.Freed = []Freed{{Segment: seg, Count: count, FirstSeq: first, NextSeq: next}}
		}
		l, err := open(fs, info)
		if err != nil {
			return
		}
		p := make([]byte, 64*sector)
		if err := l.ReadAt(memory(make([]byte, len(p))), p, 0); err != nil {
			t.Fatal(err)
		}
		if !sealed {
			if err := l.Write(p[:sector], 0); err != nil {
				t.Fatal(err)
			}
			if err := l.Flush(); err != nil {
				t.Fatal(err)
			}
		}
		l.Dead()
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		if _, err := open(fs, info); err != nil {
			t.Fatalf("opened once, then: %v", err)
		}
	})
}
