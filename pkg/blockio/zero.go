package blockio

import (
	"golang.org/x/sys/unix"
)

// Zero uses, in this order: punching a hole, which gives the space back (on a
// block device the kernel turns it into write-zeroes that may unmap, or refuses
// where the device would not promise zeros); zeroing the range in place (on a
// block device BLKZEROOUT's way, the kernel writing the zeros if it must);
// writing zeros. A regular file that ends before the range does grows, as if
// zeros had been written.
func (f *osFile) Zero(off, n int64) error {
	if off < 0 || n < 0 || (off|n)%SectorSize != 0 {
		return f.failAt("zero", off, unix.EINVAL)
	}
	if n == 0 {
		return nil
	}
	fd, err := f.hold()
	if err != nil {
		return err
	}
	defer f.release()
	if f.block {
		if err := f.within(off, n); err != nil {
			return f.failAt("zero", off, err)
		}
	} else if err := f.grow(off + n); err != nil {
		return f.failAt("zero", off, err)
	}
	for _, mode := range []uint32{
		unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE,
		unix.FALLOC_FL_ZERO_RANGE | unix.FALLOC_FL_KEEP_SIZE,
	} {
		err = f.fallocate(fd, mode, off, n)
		if err == nil {
			f.meta.Add(1)
			return nil
		}
		// EINVAL: finer than the device's logical block.
		if !unsupported(err) && err != unix.EINVAL {
			return f.failAt("zero", off, err)
		}
	}
	return f.writeZeros(fd, off, n)
}

// zeros is never written to.
var zeros = func() []byte {
	mem := make([]byte, bounceSize+BlockSize)
	skip := -address(mem) & (BlockSize - 1)
	return mem[skip : skip+bounceSize : skip+bounceSize]
}()

func (f *osFile) writeZeros(fd int, off, n int64) error {
	for n > 0 {
		step := min(n, bounceSize)
		if _, err := f.write(fd, zeros[:step], off); err != nil {
			return err
		}
		off += step
		n -= step
	}
	return nil
}
