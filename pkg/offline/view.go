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
	cow   string // its file
	layer *merge.Layer
	below io.ReaderAt
	epoch *merge.Epoch
}

func (r layerReader) ReadAt(p []byte, off int64) (int, error) {
	defer r.epoch.Enter().Leave()
	if err := r.layer.ReadAt(r.below, p, off); err != nil {
		return 0, inFile(r.cow, err)
	}
	return len(p), nil
}

// inFile adds the name of the COW to what is wrong in it.
func inFile(cowPath string, err error) error {
	var f *cow.FormatError
	if errors.As(err, &f) {
		return fmt.Errorf("%s: %w", cowPath, err)
	}
	return err
}

func (g *merging) view() io.ReaderAt { return layerReader{g.o.COW, g.m.Layer(), g.base, g.epoch} }

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

// NoBase stands for no base, where the COW alone makes the image.
const NoBase = "none"

// ErrNeedsBase says that a COW makes no image without a base.
var ErrNeedsBase = errors.New("the COW needs a base")

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
	w, err := snapshot.OpenCOW(fsys, cowPath, snapshot.OpenCOWOptions{Label: label, CheckIndex: true})
	if err != nil {
		return v, err
	}
	v.closers = append(v.closers, w)
	seed, err := readSeed(w, label)
	if err != nil {
		return v, err
	}
	layer, err := merge.NewLayer(w.Ops, w.File, seed)
	if err != nil {
		return v, err
	}
	var below io.ReaderAt = zeros{}
	if base == NoBase {
		if w.Ops.Ordered() > 0 || seed.Committed > 0 {
			return v, fmt.Errorf("%s: %w: %d of its ops read it, %d are merged into it", cowPath, ErrNeedsBase, w.Ops.Ordered(), seed.Committed)
		}
		blocks, _ := w.Ops.Bounds()
		v.size = int64(blocks) * bs
	} else {
		f, err := fsys.Open(base, blockio.ReadOnly)
		if err != nil {
			return v, err
		}
		v.closers = append(v.closers, f)
		if err := CheckBase(f, w.Ops); err != nil {
			return v, err
		}
		if err := merge.CheckUnclaimed(f); err != nil {
			return v, err
		}
		below, v.size = f, f.Size()
	}
	v.ReaderAt = layerReader{cowPath, layer, below, merge.NewEpoch()}
	return v, nil
}

// readSeed reads what a COW itself records of a merge.
func readSeed(w *snapshot.COW, label *uint64) (*merge.Seed, error) {
	file, err := cow.Open(w.File, w.File.Size(), cow.OpenOptions{Label: label})
	if err != nil {
		return nil, fmt.Errorf("%s: %w", w.File.Name(), err)
	}
	seed, err := merge.ReadSeed(file, w.File, w.Ops)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", w.File.Name(), err)
	}
	return seed, nil
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

// Verified says what a file was found good in.
type Verified struct {
	Structure bool `json:"structure"`
	Sums      bool `json:"sums"` // there are some beside the file, and they match
	View      bool `json:"view"` // the view over the base equals the target
}

// Verify checks the structure of a COW file, its checksums if sums lie beside
// it, and that its view over the base equals the target.
func Verify(ctx context.Context, o VerifyOptions) (Verified, error) {
	if o.FS == nil {
		o.FS = blockio.OS()
	}
	var v Verified
	if err := checkStructure(o); err != nil {
		return v, err
	}
	v.Structure = true
	ok, err := o.FS.Exists(snapshot.SumsPath(o.COW))
	if err != nil {
		return v, err
	}
	if ok {
		if err := snapshot.VerifySums(ctx, o.FS, o.COW, o.Progress); err != nil {
			return v, err
		}
		v.Sums = true
	}
	if o.Target == "" {
		return v, nil
	}
	w, err := openView(o.FS, o.COW, o.Label, o.Base)
	if err != nil {
		return v, err
	}
	err = errors.Join(compare(ctx, o, w), w.close())
	v.View = err == nil
	return v, err
}

// checkStructure looks at the file itself, whatever an index says.
func checkStructure(o VerifyOptions) error {
	w, err := snapshot.OpenCOW(o.FS, o.COW, snapshot.OpenCOWOptions{Label: o.Label, NoIndex: true})
	if err != nil {
		return err
	}
	_, err = readSeed(w, o.Label)
	return errors.Join(err, w.Close())
}

func compare(ctx context.Context, o VerifyOptions, v *view) error {
	target, err := o.FS.Open(o.Target, blockio.ReadOnly)
	if err != nil {
		return err
	}
	defer target.Close()
	size := target.Size()
	if o.Base == NoBase && size%bs == 0 {
		v.size = max(v.size, size) // what the COW does not write is zero
	}
	if size != v.size {
		return &DifferenceError{What: fmt.Sprintf("the view has %d bytes, %s has %d", v.size, o.Target, size), Off: -1}
	}
	other := make([]byte, chunk)
	return eachChunk(ctx, v, v.size, func(off int64, p []byte) error {
		q := other[:len(p)]
		if n, err := target.ReadAt(q, off); n < len(q) {
			return fmt.Errorf("%s: read %d bytes at %d: %w", o.Target, len(q), off, errors.Join(err, io.ErrUnexpectedEOF))
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

// Extract writes the view to a new file, blocks of zeros as holes. The file gets
// its name when it is complete and durable; on an error nothing of it stays.
func Extract(ctx context.Context, o ExtractOptions) (err error) {
	if o.FS == nil {
		o.FS = blockio.OS()
	}
	v, err := openView(o.FS, o.COW, o.Label, o.Base)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, v.close()) }()
	if err := checkAbsent(o.FS, o.Out); err != nil {
		return err
	}
	part := o.Out + partSuffix
	out, err := createPart(o.FS, part)
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
	if err == nil {
		err = publish(o.FS, part, o.Out)
	}
	// Still locked, so that it is no other run's; after a rename it is gone.
	return errors.Join(err, o.FS.RemoveAll(part), out.Close())
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
