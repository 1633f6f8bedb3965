package offline

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"

	"github.com/snapmerge/snapmerge/pkg/blockio"
	"github.com/snapmerge/snapmerge/pkg/cow"
	"github.com/snapmerge/snapmerge/pkg/merge"
	"github.com/snapmerge/snapmerge/pkg/snapshot"
)

// chunk is how much of an image is looked at at a time, in bytes.
const chunk = 1 << 20

// layerReader reads the view of a layer over what is below it.
type layerReader struct {
	layer *merge.Layer
	below io.ReaderAt
	epoch *merge.Epoch
}

func (r layerReader) ReadAt(p []byte, off int64) (int, error) {
	defer r.epoch.Enter().Leave()
	if err := r.layer.ReadAt(r.below, p, off); err != nil {
		return 0, err
	}
	return len(p), nil
}

func (g *merging) view() io.ReaderAt { return layerReader{g.m.Layer(), g.base, g.epoch} }

// hash is a checksum of the first bytes of r, as many as the base has.
func (g *merging) hash(ctx context.Context, r io.ReaderAt) (sum [sha256.Size]byte, err error) {
	h := sha256.New()
	err = eachChunk(ctx, r, g.base.Size(), func(_ int64, p []byte) error {
		h.Write(p)
		return nil
	})
	copy(sum[:], h.Sum(nil))
	return sum, err
}

func eachChunk(ctx context.Context, r io.ReaderAt, size int64, fn func(off int64, p []byte) error) error {
	arena, err := blockio.NewArena(chunk)
	if err != nil {
		return err
	}
	defer arena.Close()
	for off := int64(0); off < size; off += chunk {
		if err := ctx.Err(); err != nil {
			return err
		}
		p := arena.Bytes()[:min(chunk, size-off)]
		if n, err := r.ReadAt(p, off); n < len(p) {
			if err == nil || err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			return err
		}
		if err := fn(off, p); err != nil {
			return err
		}
	}
	return nil
}

// zeros is a base without end that holds nothing.
type zeros struct{}

func (zeros) ReadAt(p []byte, _ int64) (int, error) {
	clear(p)
	return len(p), nil
}

// NoBase stands for a base of zeros that is as long as the COW needs.
const NoBase = "none"

// view is the view of a COW file over a base, only read.
type view struct {
	io.ReaderAt
	size    int64
	closers []io.Closer
}

func (v *view) close() error {
	var errs []error
	for _, c := range v.closers {
		errs = append(errs, c.Close())
	}
	return errors.Join(errs...)
}

// openView opens the view of a COW over a base, honouring what a half-merged
// file records of its progress.
func openView(fsys blockio.FS, cowPath string, label *uint64, base string) (v *view, err error) {
	v = &view{}
	defer func() {
		if err != nil {
			err = errors.Join(err, v.close())
		}
	}()
	w, err := snapshot.OpenCOW(fsys, cowPath, snapshot.OpenCOWOptions{Label: label})
	if err != nil {
		return v, err
	}
	v.closers = append(v.closers, w)
	file, err := cow.Open(w.File, w.File.Size(), cow.OpenOptions{Label: label})
	if err != nil {
		return v, err
	}
	seed, err := merge.ReadSeed(file, w.File, w.Ops)
	if err != nil {
		return v, fmt.Errorf("%s: %w", cowPath, err)
	}
	layer, err := merge.NewLayer(w.Ops, w.File, seed)
	if err != nil {
		return v, err
	}
	blocks, _ := w.Ops.Bounds()
	var below io.ReaderAt = zeros{}
	v.size = int64(blocks) * bs
	if base != NoBase {
		f, err := fsys.Open(base, blockio.ReadOnly)
		if err != nil {
			return v, err
		}
		v.closers = append(v.closers, f)
		if err := errors.Join(merge.CheckBase(w.Ops, f.Size()), merge.CheckUnclaimed(f)); err != nil {
			return v, fmt.Errorf("%s: %w", base, err)
		}
		below, v.size = f, f.Size()
	}
	v.ReaderAt = layerReader{layer, below, merge.NewEpoch()}
	return v, nil
}

// VerifyOptions say what to verify.
type VerifyOptions struct {
	COW   string
	Label *uint64
	// Base and Target, if given (both or none), are images of which the COW is
	// said to make the second out of the first. Base may be NoBase.
	Base, Target string
	Progress     func(done, total int64)
	FS           blockio.FS
}

// Verify checks the structure of a COW file, its checksums if sums lie beside
// it, and that its view over the base equals the target.
func Verify(ctx context.Context, o VerifyOptions) error {
	if o.FS == nil {
		o.FS = blockio.OS()
	}
	// Structure is checked in the file itself, whatever an index says.
	w, err := snapshot.OpenCOW(o.FS, o.COW, snapshot.OpenCOWOptions{Label: o.Label, NoIndex: true})
	if err != nil {
		return err
	}
	if err := w.Close(); err != nil {
		return err
	}
	if ok, err := o.FS.Exists(snapshot.SumsPath(o.COW)); err != nil {
		return err
	} else if ok {
		if err := snapshot.VerifySums(ctx, o.FS, o.COW, o.Progress); err != nil {
			return err
		}
	}
	if o.Target == "" {
		return nil
	}
	v, err := openView(o.FS, o.COW, o.Label, o.Base)
	if err != nil {
		return err
	}
	return errors.Join(compare(ctx, o, v), v.close())
}

func compare(ctx context.Context, o VerifyOptions, v *view) error {
	target, err := o.FS.Open(o.Target, blockio.ReadOnly)
	if err != nil {
		return err
	}
	defer target.Close()
	if target.Size() != v.size {
		return &DifferenceError{What: fmt.Sprintf("the view has %d bytes, %s has %d", v.size, o.Target, target.Size()), Off: -1}
	}
	other := make([]byte, chunk)
	return eachChunk(ctx, v, v.size, func(off int64, p []byte) error {
		q := other[:len(p)]
		if n, err := target.ReadAt(q, off); n < len(q) {
			return err
		}
		if o.Progress != nil {
			o.Progress(off+int64(len(p)), v.size)
		}
		if bytes.Equal(p, q) {
			return nil
		}
		for i := 0; i < len(p); i += bs {
			if !bytes.Equal(p[i:min(i+bs, len(p))], q[i:min(i+bs, len(p))]) {
				return &DifferenceError{What: "the view differs from " + o.Target, Off: off + int64(i)}
			}
		}
		return nil
	})
}

// ExtractOptions say what to extract.
type ExtractOptions struct {
	COW   string
	Label *uint64
	Base  string // or NoBase
	// Out is the file that is made; it must not exist.
	Out      string
	Progress func(done, total int64)
	FS       blockio.FS
}

// Extract writes the view to a new file, blocks of zeros as holes. On an error
// the file is removed.
func Extract(ctx context.Context, o ExtractOptions) (err error) {
	if o.FS == nil {
		o.FS = blockio.OS()
	}
	v, err := openView(o.FS, o.COW, o.Label, o.Base)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, v.close()) }()
	out, err := o.FS.Open(o.Out, blockio.Create|blockio.Excl)
	if err != nil {
		return err
	}
	if err = out.Truncate(v.size); err == nil {
		err = eachChunk(ctx, v, v.size, func(off int64, p []byte) error {
			if o.Progress != nil {
				o.Progress(off+int64(len(p)), v.size)
			}
			return writeSparse(out, p, off)
		})
	}
	if err == nil {
		err = out.Flush()
	}
	if err = errors.Join(err, out.Close()); err != nil {
		err = errors.Join(err, o.FS.Remove(o.Out))
	}
	return err
}

// writeSparse writes the blocks of p that are not zero, neighbours together.
func writeSparse(out io.WriterAt, p []byte, off int64) error {
	zero := make([]byte, bs)
	start := 0 // of the run that is not written yet
	write := func(end int) error {
		if end == start {
			return nil
		}
		_, err := out.WriteAt(p[start:end], off+int64(start))
		return err
	}
	for i := 0; i < len(p); i += bs {
		end := min(i+bs, len(p))
		if !bytes.Equal(p[i:end], zero[:end-i]) {
			continue
		}
		if err := write(i); err != nil {
			return err
		}
		start = end
	}
	return write(len(p))
}
