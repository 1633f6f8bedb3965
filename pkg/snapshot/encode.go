package snapshot

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"path"
	"runtime"

	"github.com/snapmerge/snapmerge/pkg/blockio"
	"github.com/snapmerge/snapmerge/pkg/cow"
)

// View is a frozen image of a volume.
type View interface {
	io.ReaderAt
	// Size is the length in bytes, a multiple of cow.BlockSize.
	Size() int64
	// NextData finds the first range at or after off that may hold anything but
	// zeros; no such range: io.EOF.
	NextData(off int64) (start, end int64, err error)
}

// EncodeOptions says how to encode a snapshot.
type EncodeOptions struct {
	// Compression is as cow.ParseCompression takes it; empty stands for lz4.
	Compression string
	// Jobs is the number of goroutines that pack data; 0 stands for one for each
	// processor. The files do not depend on it.
	Jobs int
	// Pace, if not nil, is asked before each read, of the view or back from the
	// COW, of so many bytes and returns when it may go on, or why not.
	Pace func(ctx context.Context, bytes int) error
	// OnProgress, if not nil, is told how many bytes are done of those that the
	// view's data has. Only when the snapshot is complete are they all.
	OnProgress func(done, total int64)
}

// Info describes the COW of a snapshot.
type Info struct {
	// Length is the file's size in bytes.
	Length int64 `json:"length"`
	// CRC is that of its cow.Identity.
	CRC uint32 `json:"crc"`
	// Ops is the number of its ops.
	Ops uint64 `json:"ops"`
	// Blocks is the number of blocks that they write.
	Blocks uint64 `json:"blocks"`
	// Compression is the name of the algorithm.
	Compression string `json:"compression"`
}

const (
	cowName = "data.cow"

	// encodeChunk is what one op writes, in bytes: large enough to pack well and
	// to keep the ops few, small enough that a random read of a block is not
	// much dearer than one of 4 KiB.
	encodeChunk = 64 << 10
	// encodeRead is how much of the view is read at once, in bytes.
	encodeRead = 16 * encodeChunk

	maxImage = 1 << 32 * cow.BlockSize // block numbers have 32 bits
)

// Encode writes a view as a full snapshot into dir: a COW that makes the image
// out of zeros, its index and its sums. All three are durable when it returns,
// and none is there under its name before all are complete; files of an earlier
// Encode, complete or cut off, are replaced. After an error there are none. The
// view must not change and is read once.
func Encode(ctx context.Context, fsys blockio.FS, dir string, v View, o EncodeOptions) (Info, error) {
	e := &encoder{fsys: fsys, dir: dir, view: v, o: o}
	info, err := e.run(ctx)
	if err != nil {
		err = fmt.Errorf("encode a snapshot into %s: %w", dir, err)
		return Info{}, errors.Join(err, e.remove())
	}
	if o.OnProgress != nil {
		o.OnProgress(e.total, e.total)
	}
	return info, nil
}

type encoder struct {
	fsys  blockio.FS
	dir   string
	view  View
	o     EncodeOptions
	files []*newFile // open ones

	data  chunkMap
	total int64 // bytes of the chunks in data
}

// remove closes all files and removes them, whatever their name is by now.
func (e *encoder) remove() error {
	var errs []error
	for _, f := range e.files {
		errs = append(errs, f.Close())
	}
	e.files = nil
	cowPath := path.Join(e.dir, cowName)
	for _, name := range []string{cowPath, IndexPath(cowPath), SumsPath(cowPath)} {
		errs = append(errs, removeFile(e.fsys, name), removeFile(e.fsys, name+tmpSuffix))
	}
	return errors.Join(errs...)
}

func (e *encoder) run(ctx context.Context) (Info, error) {
	name := e.o.Compression
	if name == "" {
		name = cow.LZ4.String()
	}
	compression, level, err := cow.ParseCompression(name)
	if err != nil {
		return Info{}, err
	}
	size := e.view.Size()
	if size < 0 || size > maxImage || size%cow.BlockSize != 0 {
		return Info{}, fmt.Errorf("an image of %d bytes: not whole blocks of %d, or more than 2^32 of them", size, cow.BlockSize)
	}
	if err := e.mapData(ctx); err != nil {
		return Info{}, err
	}

	// An old index must never lie beside the new COW.
	if err := e.remove(); err != nil {
		return Info{}, err
	}
	if err := e.fsys.SyncDir(e.dir); err != nil {
		return Info{}, err
	}
	cowPath := path.Join(e.dir, cowName)
	for _, name := range []string{IndexPath(cowPath), SumsPath(cowPath), cowPath} {
		f, err := createFile(e.fsys, name)
		if err != nil {
			return Info{}, err
		}
		e.files = append(e.files, f)
	}
	index, sums, data := e.files[0], e.files[1], e.files[2]
	if err := e.writeCOW(ctx, data, compression, level); err != nil {
		return Info{}, err
	}
	info, err := describe(ctx, data, index, sums, e.pace)
	if err != nil {
		return Info{}, err
	}
	// The COW comes last, so that one with a name has its index and sums.
	for len(e.files) > 0 {
		f := e.files[0]
		e.files = e.files[1:]
		if err := f.commit(); err != nil {
			return Info{}, err
		}
	}
	return info, e.fsys.SyncDir(e.dir)
}

// chunkMap has a bit for each chunk of an image, set if the chunk may hold
// anything but zeros.
type chunkMap []uint64

func (m chunkMap) set(n int64)      { m[n/64] |= 1 << (n % 64) }
func (m chunkMap) has(n int64) bool { return m[n/64]>>(n%64)&1 != 0 }

// mapData fills data. The map and not a second walk decides what is encoded: a
// merge below the view, which does not change it, may well change where it is
// known to be zero, and the room for ops is fixed by what was seen first. A
// terabyte takes 2 MiB.
func (e *encoder) mapData(ctx context.Context) error {
	size := e.view.Size()
	e.data = make(chunkMap, size/(64*encodeChunk)+1)
	for off := int64(0); off < size; {
		if err := ctx.Err(); err != nil {
			return err
		}
		start, end, err := e.view.NextData(off)
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		if start < off || end <= start {
			return fmt.Errorf("the view says that data after %d is from %d to %d", off, start, end)
		}
		for n := start / encodeChunk; n*encodeChunk < min(end, size); n++ {
			e.data.set(n)
			off = min((n+1)*encodeChunk, size)
			e.total += off - n*encodeChunk
		}
		off = max(off, end)
	}
	return nil
}

func (e *encoder) pace(ctx context.Context, n int) error {
	if err := ctx.Err(); err != nil || e.o.Pace == nil {
		return err
	}
	return e.o.Pace(ctx, n)
}

// writeCOW writes the COW.
func (e *encoder) writeCOW(ctx context.Context, f blockio.File, c cow.Compression, level int) error {
	jobs := e.o.Jobs
	if jobs <= 0 {
		jobs = min(runtime.GOMAXPROCS(0), runtime.NumCPU())
	}
	w, err := cow.NewWriter(f, cow.WriterOptions{
		Version:     3,
		Compression: c,
		Level:       level,
		MaxBlock:    encodeChunk,
		// An op for each block if all data turns out to be zeros. What is left
		// over is a hole in the file.
		OpCountMax: uint64(e.total / cow.BlockSize),
		// No scratch: it is for ops that read the base, of which there are none,
		// and progress in the header is all that a merge in place of the others
		// needs. Android's engine, old and new, takes files without.
		ScratchSize: 0,
		Jobs:        jobs,
	})
	if err != nil {
		return err
	}
	size, done := e.view.Size(), int64(0)
	buf := make([]byte, min(size, encodeRead))
	for off := int64(0); off < size; {
		n := off / encodeChunk
		end := off
		for ; end < size && end-off < encodeRead && e.data.has(n); n++ {
			end = min(end+encodeChunk, size)
		}
		if end == off {
			off += encodeChunk
			continue
		}
		p := buf[:end-off]
		if err := e.pace(ctx, len(p)); err != nil {
			return err
		}
		if err := readFull(e.view, p, off); err != nil {
			return fmt.Errorf("the view: %w", err)
		}
		if err := writeChunks(w, uint64(off/cow.BlockSize), p); err != nil {
			return err
		}
		done += int64(len(p))
		off = end
		if e.o.OnProgress != nil && done < e.total {
			e.o.OnProgress(done, e.total)
		}
	}
	return w.Finalize()
}

var zeros [encodeChunk]byte

// writeChunks adds ops for chunks from a block on. A chunk of zeros gets zero ops
// although a restored volume begins as zeros: the COW shall say all that is known
// of the blocks that were ever written.
func writeChunks(w *cow.Writer, block uint64, p []byte) error {
	for len(p) > 0 {
		chunk := p[:min(len(p), encodeChunk)]
		p = p[len(chunk):]
		blocks := len(chunk) / cow.BlockSize
		var err error
		if bytes.Equal(chunk, zeros[:len(chunk)]) {
			err = w.Zero(block, blocks)
		} else {
			err = w.Replace(block, chunk)
		}
		if err != nil {
			return err
		}
		block += uint64(blocks)
	}
	return nil
}
