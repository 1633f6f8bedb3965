package merge

import (
	"cmp"
	"fmt"
	"io"
	"runtime"
	"slices"
	"sync/atomic"

	"golang.org/x/sync/errgroup"

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

// loader reads and decodes the payloads of ops. One goroutine uses it at a time.
type loader struct {
	cow    io.ReaderAt
	stored []byte
	decs   []*cow.Decoder // a worker each
	read   *atomic.Uint64 // counts bytes
}

func newLoader(file io.ReaderAt, read *atomic.Uint64) *loader {
	l := &loader{cow: file, read: read}
	for range min(runtime.GOMAXPROCS(0), runtime.NumCPU()) {
		l.decs = append(l.decs, cow.NewDecoder(file))
	}
	return l
}

// load reads the stored bytes of all ops, neighbours together, and decodes them
// on all processors. It sorts ops, whose rooms must fit in storedBytes.
func (l *loader) load(ops []payload) error {
	slices.SortFunc(ops, func(x, y payload) int { return cmp.Compare(x.op.DataOffset, y.op.DataOffset) })
	var runs []extent
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
	if int64(cap(l.stored)) < need {
		l.stored = make([]byte, need)
	}
	room := l.stored[:need]
	i := 0
	for _, r := range runs {
		data := room[:r.n]
		room = room[r.n:]
		if err := readFull(l.cow, data, r.off); err != nil {
			return fmt.Errorf("COW: %w", err)
		}
		l.read.Add(uint64(r.n))
		for ; i < len(ops) && ops[i].op.DataOffset < r.off+r.n; i++ {
			o := ops[i].op.DataOffset - r.off
			ops[i].stored = data[o : o+int64(ops[i].op.DataLength)]
		}
	}
	var g errgroup.Group
	share := (len(ops) + len(l.decs) - 1) / len(l.decs)
	for i, dec := range l.decs {
		part := ops[min(i*share, len(ops)):min((i+1)*share, len(ops))]
		g.Go(func() error { return decode(dec, part) })
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
