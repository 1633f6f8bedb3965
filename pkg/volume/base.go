package volume

import (
	"fmt"
	"sync/atomic"

	"github.com/snapmerge/snapmerge/pkg/blockio"
)

// baseDevice is the base, whose failed flush ends all writing: after it the
// kernel may hold pages as clean that never reached the disk.
type baseDevice struct {
	blockio.File
	v *Volume
}

// Unwrap lets queues do I/O on the file itself.
func (b *baseDevice) Unwrap() blockio.Device { return b.File }

func (b *baseDevice) Flush() error {
	if err := b.File.Flush(); err != nil {
		b.v.fail(fmt.Errorf("flush of the base failed: %w", err))
		return err
	}
	return nil
}

// baseView is the base.
type baseView struct {
	base   blockio.Device
	queues *blockio.ReadQueues
	read   *atomic.Uint64 // bytes
}

func (v *baseView) ReadAt(p []byte, off int64) (int, error) {
	n, err := v.base.ReadAt(p, off)
	v.read.Add(uint64(n))
	return n, err
}

// ReadBatch reads from several places at the same time.
func (v *baseView) ReadBatch(batch []blockio.Request) error {
	err := v.queues.ReadBatch(v.base, batch)
	if err == nil {
		v.read.Add(uint64(bytesOf(batch)))
	}
	return err
}

func bytesOf(batch []blockio.Request) (n int) {
	for _, r := range batch {
		n += len(r.Buf)
	}
	return n
}
