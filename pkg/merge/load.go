package merge

import (
	"cmp"
	"fmt"
	"io"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"

	"golang.org/x/sync/errgroup"

	"github.com/snapmerge/snapmerge/pkg/blockio"
	"github.com/snapmerge/snapmerge/pkg/cow"
)

const (
	// storedBytes bounds what is read from the COW at a time, in bytes.
	storedBytes = 8 << 20
	// maxGap is the most that is read for nothing to join two reads, in bytes.
	maxGap = 16 << 10
)

// payload is an op with the place its decoded data goes to.
type payload struct {
	op     cow.Op
	stored []byte // set by load
	dst    []byte
	xor    bool // xor the data into dst, a block, instead of replacing what is there
}

// room is what the op may need of storedBytes.
func (p *payload) room() int { return p.op.DataLength + maxGap }

// loader reads and decodes the payloads of ops. read and decode may run at the
// same time for different ops; for the rest one goroutine uses it at a time.
type loader struct {
	cow    io.ReaderAt
	stored []byte         // memory for load
	runs   []extent       // memory for read
	decs   []*cow.Decoder // a worker each
	count  *atomic.Uint64 // of bytes read
}

func newLoader(file io.ReaderAt, count *atomic.Uint64) *loader {
	l := &loader{cow: file, count: count}
	for range min(runtime.GOMAXPROCS(0), runtime.NumCPU()) {
		l.decs = append(l.decs, cow.NewDecoder(file))
	}
	return l
}

// load reads the stored bytes of all ops and decodes them.
func (l *loader) load(ops []payload) error {
	if err := l.read(ops, &l.stored); err != nil {
		return err
	}
	return l.decode(ops)
}

// read reads the stored bytes of all ops, neighbours together, into *mem, which
// it makes longer if need be. It sorts ops, whose rooms must fit in storedBytes.
func (l *loader) read(ops []payload, mem *[]byte) error {
	slices.SortFunc(ops, func(x, y payload) int { return cmp.Compare(x.op.DataOffset, y.op.DataOffset) })
	runs := l.runs[:0]
	need := int64(0)
	for _, p := range ops {
		end := p.op.DataOffset + int64(p.op.DataLength)
		if k := len(runs) - 1; k >= 0 && p.op.DataOffset-(runs[k].off+runs[k].n) <= maxGap {
			grow := max(end-(runs[k].off+runs[k].n), 0)
			runs[k].n, need = runs[k].n+grow, need+grow
			continue
		}
		runs = append(runs, extent{p.op.DataOffset, int64(p.op.DataLength)})
		need += int64(p.op.DataLength)
	}
	l.runs = runs
	if int64(cap(*mem)) < need {
		*mem = make([]byte, need)
	}
	room := (*mem)[:need]
	i := 0
	for _, r := range runs {
		data := room[:r.n]
		room = room[r.n:]
		if err := blockio.ReadFull(l.cow, data, r.off); err != nil {
			return fmt.Errorf("COW: %w", err)
		}
		l.count.Add(uint64(r.n))
		for ; i < len(ops) && ops[i].op.DataOffset < r.off+r.n; i++ {
			o := ops[i].op.DataOffset - r.off
			ops[i].stored = data[o : o+int64(ops[i].op.DataLength)]
		}
	}
	return nil
}

// share is how many bytes of blocks a worker takes at a time, so that all end
// together whatever else the processors do.
const share = 128 << 10

// decode decodes what read has read, on all processors.
func (l *loader) decode(ops []payload) error {
	var (
		mu sync.Mutex
		g  errgroup.Group
	)
	next := func() (part []payload) {
		mu.Lock()
		defer mu.Unlock()
		n := 0
		for bytes := 0; n < len(ops) && bytes < share; n++ {
			bytes += len(ops[n].dst)
		}
		part, ops = ops[:n], ops[n:]
		return part
	}
	for _, dec := range l.decs {
		g.Go(func() error {
			for part := next(); len(part) > 0; part = next() {
				if err := decode(dec, part); err != nil {
					return err
				}
			}
			return nil
		})
	}
	return g.Wait()
}

func decode(dec *cow.Decoder, ops []payload) error {
	var block [bs]byte
	for _, p := range ops {
		dst := p.dst
		if p.xor {
			dst = block[:]
		}
		if err := dec.DecodeBytes(p.op, p.stored, dst); err != nil {
			return err
		}
		if p.xor {
			xorBytes(p.dst, dst)
		}
	}
	return nil
}
