package cow

import (
	"fmt"
	"strconv"
	"strings"
)

// Compression is the algorithm that packs the data of an op, each op on its own.
type Compression uint8

// The values are those of the format.
const (
	None   Compression = 0
	Gz     Compression = 1 // a zlib stream (RFC 1950), in spite of its name
	Brotli Compression = 2 // a brotli stream (RFC 7932)
	LZ4    Compression = 3 // one lz4 block without a frame
	Zstd   Compression = 4 // zstd frames (RFC 8878)
)

var compressions = [...]struct {
	name            string
	min, max, level int // level is the default one
}{
	None:   {"none", 0, 0, 0},
	Gz:     {"gz", 1, 9, 9},
	Brotli: {"brotli", 0, 11, 11},
	LZ4:    {"lz4", -1 << 17, 1 << 17, 0}, // any level is taken and ignored
	Zstd:   {"zstd", -1 << 17, 22, 3},
}

// String is the name in options and reports.
func (c Compression) String() string {
	if c.known() {
		return compressions[c].name
	}
	return fmt.Sprintf("compression %d", uint8(c))
}

func (c Compression) known() bool { return int(c) < len(compressions) }

// alwaysPacked tells whether version 1 and 2 files pack every op with c, even
// where the result is as long as a block or longer.
func (c Compression) alwaysPacked() bool { return c == Gz || c == Brotli }

// ParseCompression reads "name" or "name,level". Without a level, level is the
// algorithm's default.
func ParseCompression(s string) (c Compression, level int, err error) {
	name, levelText, hasLevel := strings.Cut(s, ",")
	for i, a := range compressions {
		if a.name != name {
			continue
		}
		if !hasLevel {
			return Compression(i), a.level, nil
		}
		level, err = strconv.Atoi(levelText)
		if err != nil || Compression(i) == None {
			return None, 0, fmt.Errorf("compression %q: %q is not a level of %s", s, levelText, name)
		}
		if level < a.min || level > a.max {
			return None, 0, fmt.Errorf("compression %q: the levels of %s are %d to %d", s, name, a.min, a.max)
		}
		return Compression(i), level, nil
	}
	return None, 0, fmt.Errorf("compression %q: want none, gz, brotli, lz4 or zstd, with \",LEVEL\" if not the default", s)
}
