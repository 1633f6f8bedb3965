package bench

import (
	"context"
	"fmt"
	"runtime"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/snapmerge/snapmerge/pkg/blockio"
	"github.com/snapmerge/snapmerge/pkg/cow"
)

// scaling is how much faster all processors are than one, measured in turn for
// the merge and for a loop that does nothing but unpack the same data. Each is a
// list with an entry a run, in seconds.
type scaling struct {
	one          []float64 // the merge, on one processor
	bareOne, all []float64 // the loop
}

// run measures one round.
func (s *scaling) run(ctx context.Context, b *bench, kind blockio.Kind) error {
	old := runtime.GOMAXPROCS(1)
	r, err := b.ours(ctx, kind)
	runtime.GOMAXPROCS(old)
	if err != nil {
		return err
	}
	s.one = append(s.one, r.Seconds)
	for _, p := range []struct {
		workers int
		to      *[]float64
	}{{1, &s.bareOne}, {runtime.GOMAXPROCS(0), &s.all}} {
		d, err := b.unpack(ctx, p.workers)
		if err != nil {
			return err
		}
		*p.to = append(*p.to, d.Seconds())
	}
	b.o.Note("one processor: %.3f s; bare unpacking: %.3f s with one, %.3f s with all", r.Seconds, s.bareOne[len(s.bareOne)-1], s.all[len(s.all)-1])
	return nil
}

// bareBytes is how much stored data the bare loop is given at a time.
const bareBytes = 64 << 20

// unpack decodes all data of the COW with so many goroutines, all of it read
// beforehand and none of it kept. Only the decoding counts.
func (b *bench) unpack(ctx context.Context, workers int) (sum time.Duration, err error) {
	f, err := b.images.fs.Open(b.COW, blockio.ReadOnly)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	file, err := cow.Open(f, f.Size(), cow.OpenOptions{})
	if err != nil {
		return 0, err
	}
	ops, err := file.Load()
	if err != nil {
		return 0, err
	}
	type packed struct {
		op     cow.Op
		stored []byte
	}
	mem, dst := make([]byte, bareBytes), make([][]byte, workers)
	decs := make([]*cow.Decoder, workers)
	for i := range workers {
		decs[i], dst[i] = cow.NewDecoder(f), make([]byte, b.o.MaxBlock)
	}
	for pos := uint64(0); pos < ops.Len(); {
		if err := ctx.Err(); err != nil {
			return 0, err
		}
		var list []packed
		for room := mem; pos < ops.Len(); pos++ {
			op, err := ops.At(pos)
			if err != nil {
				return 0, err
			}
			if op.DataLength > len(room) {
				break
			}
			if _, err := f.ReadAt(room[:op.DataLength], op.DataOffset); err != nil {
				return 0, fmt.Errorf("%s: %w", b.COW, err)
			}
			list = append(list, packed{op, room[:op.DataLength]})
			room = room[op.DataLength:]
		}
		begin := time.Now()
		var g errgroup.Group
		var next atomic.Int64
		for i := range workers {
			g.Go(func() error {
				for k := next.Add(1) - 1; k < int64(len(list)); k = next.Add(1) - 1 {
					p := list[k]
					if err := decs[i].DecodeBytes(p.op, p.stored, dst[i][:p.op.Blocks*bs]); err != nil {
						return err
					}
				}
				return nil
			})
		}
		if err := g.Wait(); err != nil {
			return 0, err
		}
		sum += time.Since(begin)
	}
	return sum, nil
}

// addTo sums up for a merge whose median is seconds.
func (s *scaling) addTo(r *Result) {
	if len(s.one) == 0 {
		return
	}
	one, _ := median(s.one)
	bareOne, _ := median(s.bareOne)
	all, _ := median(s.all)
	r.OneProcessorSeconds, r.Scaling = one.mid, one.mid/r.Seconds
	r.BareScaling = bareOne.mid / all.mid
	r.ScalingRatio = r.Scaling / r.BareScaling
}
