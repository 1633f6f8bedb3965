package bench

import (
	"context"
	"errors"
	"runtime"

	"github.com/snapmerge/snapmerge/pkg/blockio"
	"github.com/snapmerge/snapmerge/pkg/cow"
	"github.com/snapmerge/snapmerge/pkg/snapshot"
)

// chunkBytes is how much of an image is made, written or compared at a time.
const chunkBytes = 1 << 20

// images makes the files of a Spec.
type images struct {
	spec    Spec
	plan    *plan
	content *content
	fs      blockio.FS
}

func newImages(s Spec) *images {
	return &images{spec: s, plan: newPlan(s), content: newContent(s.Seed), fs: blockio.OS()}
}

// writeBase makes the base anew, so that the file is laid out alike for every
// run.
func (g *images) writeBase(ctx context.Context, path string) error {
	return g.writeImage(ctx, path, func(dst []byte, block uint64) { g.content.base(dst, block) })
}

// writeExpected makes the image that the merge must produce.
func (g *images) writeExpected(ctx context.Context, path string) error {
	const none = ^uint32(0)
	by := make([]uint32, g.spec.Size/bs) // op of a block; ordered ones first
	for i := range by {
		by[i] = none
	}
	for i, o := range g.plan.ordered {
		by[o.block] = uint32(i)
	}
	for i, o := range g.plan.independent {
		by[o.block] = uint32(len(g.plan.ordered) + i)
	}
	return g.writeImage(ctx, path, func(dst []byte, block uint64) {
		switch i := int(by[block]); {
		case by[block] == none:
			g.content.base(dst, block)
		case i < len(g.plan.ordered):
			g.content.target(dst, g.plan.ordered[i])
		default:
			g.content.target(dst, g.plan.independent[i-len(g.plan.ordered)])
		}
	})
}

// writeImage makes a file block by block and makes it durable.
func (g *images) writeImage(ctx context.Context, path string, block func(dst []byte, block uint64)) (err error) {
	if err := g.fs.RemoveAll(path); err != nil {
		return err
	}
	f, err := g.fs.Open(path, blockio.Create|blockio.Excl|blockio.Direct)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if err := f.Allocate(0, g.spec.Size); err != nil {
		return err
	}
	arena, err := blockio.NewArena(chunkBytes)
	if err != nil {
		return err
	}
	defer arena.Close()
	for off := int64(0); off < g.spec.Size; off += chunkBytes {
		if err := ctx.Err(); err != nil {
			return err
		}
		p := arena.Bytes()[:min(chunkBytes, g.spec.Size-off)]
		for i := 0; i < len(p); i += bs {
			block(p[i:], uint64(off)/bs+uint64(i)/bs)
		}
		if _, err := f.WriteAt(p, off); err != nil {
			return err
		}
	}
	return f.Flush()
}

// writeCOW makes the COW.
func (g *images) writeCOW(ctx context.Context, path string) (err error) {
	if err := g.fs.RemoveAll(path); err != nil {
		return err
	}
	f, err := g.fs.Open(path, blockio.Create|blockio.Excl)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	compression, level, err := cow.ParseCompression(g.spec.Compression)
	if err != nil {
		return err
	}
	o := cow.WriterOptions{
		Version: g.spec.Format, Compression: compression, Level: level, ScratchSize: cow.DefaultScratchSize,
		MaxBlock: int(g.spec.MaxBlock), Jobs: runtime.GOMAXPROCS(0),
	}
	if g.spec.Format == 2 {
		o.ClusterOps = 1024
	} else {
		o.OpCountMax = g.countOps()
	}
	w, err := cow.NewWriter(f, o)
	if err != nil {
		return err
	}
	if err := g.writeOrdered(ctx, w); err != nil {
		return err
	}
	if err := g.writeIndependent(ctx, w); err != nil {
		return err
	}
	return w.Finalize()
}

func (g *images) writeOrdered(ctx context.Context, w *cow.Writer) error {
	d := make([]byte, bs)
	for _, o := range g.plan.ordered {
		err := ctx.Err()
		switch {
		case err != nil:
		case o.typ == cow.Copy:
			err = w.Copy(uint64(o.block), o.source/bs, 1)
		default:
			g.content.xor(d, uint64(o.block))
			err = w.Xor(uint64(o.block), o.source, d)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (g *images) writeIndependent(ctx context.Context, w *cow.Writer) error {
	data := make([]byte, g.spec.MaxBlock)
	for run := range runs(g.plan.independent, int(g.spec.MaxBlock/bs)) {
		if err := ctx.Err(); err != nil {
			return err
		}
		first := uint64(run[0].block)
		if run[0].typ == cow.Zero {
			if err := w.Zero(first, len(run)); err != nil {
				return err
			}
			continue
		}
		p := data[:len(run)*bs]
		for i, o := range run {
			g.content.fresh(p[i*bs:], uint64(o.block))
		}
		if err := w.Replace(first, p); err != nil {
			return err
		}
	}
	return nil
}

// runs cuts a list of ops where blocks do not follow each other, the type
// changes, or a run has limit ops.
func runs(ops []op, limit int) func(yield func([]op) bool) {
	return func(yield func([]op) bool) {
		for len(ops) > 0 {
			n := 1
			for n < len(ops) && n < limit && ops[n].typ == ops[0].typ && ops[n].block == ops[n-1].block+1 {
				n++
			}
			if !yield(ops[:n]) {
				return
			}
			ops = ops[n:]
		}
	}
}

// countOps is at least the number of ops that the Writer makes of the plan: it
// cuts a run of replaced blocks into powers of two.
func (g *images) countOps() uint64 {
	n := uint64(len(g.plan.ordered))
	for run := range runs(g.plan.independent, int(g.spec.MaxBlock/bs)) {
		if run[0].typ == cow.Zero {
			n += uint64(len(run))
			continue
		}
		for k := len(run); k > 0; k &= k - 1 {
			n++
		}
	}
	return n
}

// WriteCOW makes the COW of a complete Spec and its index.
func WriteCOW(ctx context.Context, s Spec, path string) error {
	g := newImages(s)
	if err := g.writeCOW(ctx, path); err != nil {
		return err
	}
	return snapshot.BuildIndex(ctx, g.fs, path)
}
