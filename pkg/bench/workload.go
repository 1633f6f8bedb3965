package bench

import (
	"errors"
	"fmt"
	"math/bits"
	"slices"
	"strings"

	"github.com/snapmerge/snapmerge/pkg/cow"
)

// Workload names a kind of COW.
type Workload string

const (
	// CopyShift moves blocks up by Distance blocks, from the highest on, so that
	// with distance 1 each op overwrites the source of the one before it.
	CopyShift Workload = "copyshift"
	// CopyShiftDown is its mirror image: down, from the lowest on.
	CopyShiftDown Workload = "copyshift-down"
	// Incremental changes extents of up to 64 blocks all over the image: of the
	// blocks 60 % copied, 15 % xor, 20 % replaced, 5 % zeroed.
	Incremental Workload = "incremental"
	// Full replaces the whole image.
	Full Workload = "full"
	// RandCopy copies blocks from random places to random other places, in random
	// order; no source is ever written.
	RandCopy Workload = "randcopy"
)

// Workloads lists them all.
var Workloads = []Workload{CopyShift, CopyShiftDown, Incremental, Full, RandCopy}

// Spec says which three files to make. Complete fills in what is zero.
type Spec struct {
	Workload Workload `json:"workload"`
	// Size is that of the image in bytes.
	Size int64 `json:"size"`
	// Ops counts what the COW does: blocks, but with Full ops of MaxBlock.
	Ops int64 `json:"ops_asked"`
	// Distance is how far the shifts move, in blocks.
	Distance int64  `json:"distance,omitempty"`
	Seed     uint64 `json:"seed"`
	// Format is the version of the COW format, 2 or 3.
	Format int `json:"format"`
	// Compression is as cow.ParseCompression takes it.
	Compression string `json:"compression"`
	// MaxBlock is the size of the largest replace op in bytes.
	MaxBlock int64 `json:"max_block"`
}

// Defaults of a Spec.
const (
	DefaultShiftOps    = 235000
	DefaultSize        = 1 << 30 // but
	DefaultIncremental = 2 << 30
	DefaultCompression = "lz4"
	DefaultFormat      = 3
)

const (
	mib = 1 << 20
	// incrementalShare is the part of an image that Incremental changes: 300 MiB
	// of 2 GiB.
	incrementalOf, incrementalShare = 2048, 300
	maxSize                         = 1 << 40
)

// Complete fills in the defaults and checks the whole. An error says which value
// is wrong with which rule.
func (s *Spec) Complete() error {
	if !slices.Contains(Workloads, s.Workload) {
		return fmt.Errorf("workload %q is not %s", s.Workload, join(Workloads))
	}
	if s.Format == 0 {
		s.Format = DefaultFormat
	}
	if s.Compression == "" {
		s.Compression = DefaultCompression
	}
	if s.MaxBlock == 0 {
		s.MaxBlock = bs
	}
	c, _, err := cow.ParseCompression(s.Compression)
	switch {
	case err != nil:
		return err
	case c == cow.Brotli:
		return errors.New("brotli can be read but not written")
	case s.Format != 2 && s.Format != 3:
		return fmt.Errorf("format %d is not 2 or 3", s.Format)
	case s.MaxBlock < bs || s.MaxBlock > 64*bs || bits.OnesCount64(uint64(s.MaxBlock)) != 1:
		return fmt.Errorf("largest op of %d bytes is not 4096 to 262144 and a power of two", s.MaxBlock)
	case s.Format == 2 && s.MaxBlock != bs:
		return fmt.Errorf("largest op of %d bytes: format 2 has ops of 4096 bytes only", s.MaxBlock)
	case s.Size < 0 || s.Size%bs != 0 || s.Size > maxSize:
		return fmt.Errorf("size of %d bytes is not a multiple of %d up to 1 TiB", s.Size, bs)
	case s.Ops < 0 || s.Ops > maxSize/bs:
		return fmt.Errorf("%d ops are not 1 to %d", s.Ops, int64(maxSize/bs))
	case s.Distance < 0 || s.Distance > maxSize/bs:
		return fmt.Errorf("distance of %d blocks is not 1 to %d", s.Distance, int64(maxSize/bs))
	case s.Distance > 0 && !s.shifts():
		return fmt.Errorf("%s has no distance", s.Workload)
	}
	s.addSizes()
	return s.checkSizes()
}

func (s *Spec) shifts() bool { return s.Workload == CopyShift || s.Workload == CopyShiftDown }

func (s *Spec) addSizes() {
	switch s.Workload {
	case CopyShift, CopyShiftDown:
		s.Distance = max(s.Distance, 1)
		if s.Ops == 0 && s.Size > 0 {
			s.Ops = s.Size/bs - s.Distance
		} else if s.Ops == 0 {
			s.Ops = DefaultShiftOps
		}
		if s.Size == 0 {
			s.Size = ((s.Ops+s.Distance)*bs + mib - 1) / mib * mib
		}
	case Incremental:
		if s.Size == 0 {
			s.Size = DefaultIncremental
		}
		if s.Ops == 0 {
			s.Ops = max(s.Size/bs*incrementalShare/incrementalOf, 1)
		}
	case Full:
		if s.Size == 0 {
			s.Size = DefaultSize
			if s.Ops > 0 {
				s.Size = s.Ops * s.MaxBlock
			}
		}
		if s.Ops == 0 {
			s.Ops = s.Size / s.MaxBlock
		}
	case RandCopy:
		if s.Size == 0 {
			s.Size = DefaultSize
		}
		if s.Ops == 0 {
			s.Ops = max(s.Size/bs/4, 1)
		}
	}
}

// checkSizes checks that the ops fit into the image.
func (s *Spec) checkSizes() error {
	blocks := s.Size / bs
	var fit int64
	switch s.Workload {
	case CopyShift, CopyShiftDown:
		fit = blocks - s.Distance
	case Incremental:
		fit = blocks / 2
	case Full:
		fit = s.Size / s.MaxBlock
		if s.Ops < fit || s.Size%s.MaxBlock != 0 {
			return fmt.Errorf("%d ops of %d bytes do not fill the %d bytes of the image, as %s does", s.Ops, s.MaxBlock, s.Size, s.Workload)
		}
	case RandCopy:
		fit = blocks / 2
	}
	if s.Ops < 1 || s.Ops > fit {
		return fmt.Errorf("%d ops: %s of an image of %d bytes has room for 1 to %d", s.Ops, s.Workload, s.Size, max(fit, 0))
	}
	return nil
}

func join(list []Workload) string {
	var names []string
	for _, w := range list {
		names = append(names, string(w))
	}
	return strings.Join(names, ", ")
}
