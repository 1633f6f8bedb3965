package driver

import (
	"fmt"
	"math"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/snapmerge/snapmerge/pkg/volume"
)

const (
	// defaultSize is that of a volume for which no size is asked, in bytes.
	defaultSize = 1 << 30
	// maxSize is the largest volume, in bytes: what fits into a file offset in
	// whole mebibytes.
	maxSize = math.MaxInt64 &^ (1<<20 - 1)
)

// capacity is a capacity range in bytes.
type capacity struct{ required, limit int64 } // 0: none

func parseCapacity(r *csi.CapacityRange) (capacity, error) {
	c := capacity{r.GetRequiredBytes(), r.GetLimitBytes()}
	switch {
	case c.required < 0 || c.limit < 0:
		return c, invalid("negative size in the capacity range")
	case c.required > maxSize:
		return c, fmt.Errorf("%w: %d bytes, at most %d", errRange, c.required, int64(maxSize))
	case c.limit > 0 && c.required > c.limit:
		return c, invalid("capacity range from %d to %d bytes", c.required, c.limit)
	}
	return c, nil
}

// choose is the size of a new volume that must have at least smallest bytes.
func (c capacity) choose(smallest int64) (int64, error) {
	size := c.required
	if size == 0 {
		size = defaultSize
		if c.limit > 0 {
			size = min(size, c.limit/bs*bs)
		}
	}
	size = volume.RoundUp(max(size, smallest))
	if c.limit > 0 && size > c.limit {
		return 0, fmt.Errorf("%w: the volume would have %d bytes, the limit is %d", errRange, size, c.limit)
	}
	return size, nil
}

// allows tells whether a volume of that size is one that was asked for.
func (c capacity) allows(size int64) bool {
	return size >= c.required && (c.limit == 0 || size <= c.limit)
}

// bs is the block size of volumes in bytes.
const bs = 4096
