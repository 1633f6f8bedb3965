package merge

import (
	"context"

	"github.com/snapmerge/snapmerge/pkg/blockio"
)

const (
	// paceBytes is how much is written to the base between two calls of Pace.
	paceBytes = 1 << 20
	// aheadBytes is how much is moved between two calls of PaceAhead. It is more, so
	// that the disk has several transfers to choose from.
	aheadBytes = 4 << 20
)

// pieces calls do for parts of the batch of up to limit bytes, but at least one
// request each.
func pieces(batch []blockio.Request, limit int, do func(part []blockio.Request, bytes int) error) error {
	for len(batch) > 0 {
		n, bytes := 0, 0
		for n < len(batch) && (n == 0 || bytes+len(batch[n].Buf) <= limit) {
			bytes += len(batch[n].Buf)
			n++
		}
		if err := do(batch[:n], bytes); err != nil {
			return err
		}
		batch = batch[n:]
	}
	return nil
}

// pacedQueue is a queue for what is read and logged ahead of the merge.
type pacedQueue struct {
	blockio.Queue
	ctx  context.Context // of the run
	pace func(ctx context.Context, n int) error
}

func (q pacedQueue) Read(d blockio.Device, batch []blockio.Request) error {
	return q.move(d, batch, q.Queue.Read)
}

func (q pacedQueue) Write(d blockio.Device, batch []blockio.Request) error {
	return q.move(d, batch, q.Queue.Write)
}

func (q pacedQueue) move(d blockio.Device, batch []blockio.Request, do func(blockio.Device, []blockio.Request) error) error {
	return pieces(batch, aheadBytes, func(part []blockio.Request, bytes int) error {
		if err := q.pace(q.ctx, bytes); err != nil {
			return err
		}
		return do(d, part)
	})
}
