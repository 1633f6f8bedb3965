package snapshot

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"syscall"
	"testing"

	"github.com/snapmerge/snapmerge/pkg/blockio"
	"github.com/snapmerge/snapmerge/pkg/blockio/crashfs"
	"github.com/snapmerge/snapmerge/pkg/cow"
)

// memView is a View in memory, with holes where whole granules are zeros and
// not listed in full.
type memView struct {
	data []byte
	hole func(off int64) bool // of a multiple of 4 KiB
}

func (v *memView) Size() int64 { return int64(len(v.data)) }

func (v *memView) ReadAt(p []byte, off int64) (int, error) {
	return bytes.NewReader(v.data).ReadAt(p, off)
}

func (v *memView) NextData(off int64) (start, end int64, err error) {
	size := v.Size()
	start = off
	for ; start < size && v.hole(start&^(bs-1)); start = start&^(bs-1) + bs {
	}
	if start >= size {
		return 0, 0, io.EOF
	}
	for end = start; end < size && !v.hole(end&^(bs-1)); end = end&^(bs-1) + bs {
	}
	return start, end, nil
}

// newView makes an image of size bytes with holes, zeros that are no holes, data
// that packs and data that does not.
func newView(rng *rand.Rand, size int64) *memView {
	v := &memView{data: make([]byte, size)}
	holes := map[int64]bool{}
	for off := int64(0); off < size; {
		n := min(int64(1+rng.IntN(40))*bs, size-off)
		p := v.data[off : off+n]
		switch rng.IntN(4) {
		case 0:
			for o := off; o < off+n; o += bs {
				holes[o] = true
			}
		case 1: // zeros
		case 2:
			fill(rng, p)
		case 3:
			noise(rng, p)
		}
		off += n
	}
	v.hole = func(off int64) bool { return holes[off] }
	return v
}

// checkSnapshot checks that the COW in dir is indexed, matches its sums and makes
// the image.
func checkSnapshot(fsys blockio.FS, dir string, image []byte) error {
	name := dir + "/" + cowName
	if err := VerifySums(ctx, fsys, name, nil); err != nil {
		return err
	}
	c, err := OpenCOW(fsys, name, OpenCOWOptions{Cache: NewCache(1 << 20)})
	if err != nil {
		return err
	}
	defer c.Close()
	if c.IndexError != nil || !c.Indexed() {
		return fmt.Errorf("the index is not used: %v", c.IndexError)
	}
	got, err := decode(c, int64(len(image)))
	if err != nil {
		return err
	}
	if !bytes.Equal(got, image) {
		return fmt.Errorf("the image differs")
	}
	return nil
}

// TestEncodeRoundTrip decodes what was encoded, with several sizes of the tail
// and all compressions; the files do not depend on the number of jobs.
func TestEncodeRoundTrip(t *testing.T) {
	for _, compression := range []string{"", "lz4", "zstd", "zstd,9", "none", "gz,1"} {
		for _, size := range []int64{0, bs, 3 * bs, 16 * bs, 17 * bs, 3<<20 + 11*bs} {
			t.Run(fmt.Sprintf("%s %d", compression, size), func(t *testing.T) {
				v := newView(newRand(t, uint64(size)), size)
				var first [3][]byte
				for _, jobs := range []int{1, 2, 4, 0} {
					fsys := crashfs.New("d")
					last := int64(0)
					info, err := Encode(ctx, fsys, "d", v, EncodeOptions{
						Compression: compression, Jobs: jobs,
						OnProgress: func(done, total int64) {
							if done < last || done > total {
								t.Errorf("progress %d of %d after %d", done, total, last)
							}
							last = done
						},
					})
					must(t, err)
					files := [3][]byte{readFile(t, fsys, "d/data.cow"), readFile(t, fsys, "d/data.idx"), readFile(t, fsys, "d/data.sum")}
					if jobs == 1 {
						first = files
						must(t, checkSnapshot(fsys, "d", v.data))
						checkOps(t, fsys, v, info)
						continue
					}
					for i := range files {
						if !bytes.Equal(files[i], first[i]) {
							t.Errorf("file %d differs with %d jobs", i, jobs)
						}
					}
				}
			})
		}
	}
}

// checkOps checks which ops a snapshot is made of, its info, and the index and
// sums against those that are made from the file alone.
func checkOps(t *testing.T, fsys *crashfs.FS, v *memView, info Info) {
	t.Helper()
	c := openCOW(t, fsys, "d/data.cow", OpenCOWOptions{NoIndex: true})
	if info.Length != c.Identity.Length || info.CRC != c.Identity.CRC || info.Ops != c.Ops.Len() || info.Blocks != c.Ops.TargetBlocks() ||
		info.Compression != c.Header.Compression.String() {
		t.Errorf("info %+v, COW %+v with %d ops", info, c.Identity, c.Ops.Len())
	}
	size := v.Size()
	var written uint64
	for off := int64(0); off < size; off += encodeChunk {
		end := min(off+encodeChunk, size)
		hole := true
		for o := off; o < end; o += bs {
			hole = hole && v.hole(o)
		}
		zero := bytes.Equal(v.data[off:end], zeros[:end-off])
		ops := 0
		for block := uint64(off / bs); block < uint64(end/bs); {
			op, _, ok, err := c.Ops.Find(block)
			must(t, err)
			want := cow.Replace
			if zero {
				want = cow.Zero
			}
			if ok == hole || ok && op.Type != want {
				t.Fatalf("block %d of a chunk with hole %v, zeros %v: op %v %s", block, hole, zero, ok, op.Type)
			}
			if !ok {
				break
			}
			ops++
			written += uint64(op.Blocks)
			block = op.NewBlock + uint64(op.Blocks)
		}
		if !hole && !zero && end-off == encodeChunk && ops != 1 {
			t.Fatalf("chunk at %d has %d ops", off, ops)
		}
	}
	if written != info.Blocks {
		t.Errorf("%d blocks written, info says %d", written, info.Blocks)
	}
	if c.Ops.Ordered() != 0 || c.Header.BufferSize != 0 {
		t.Errorf("%d ordered ops, scratch of %d bytes", c.Ops.Ordered(), c.Header.BufferSize)
	}
	index, sums := readFile(t, fsys, "d/data.idx"), readFile(t, fsys, "d/data.sum")
	must(t, BuildIndex(ctx, fsys, "d/data.cow"))
	must(t, WriteSums(ctx, fsys, "d/data.cow"))
	if !bytes.Equal(index, readFile(t, fsys, "d/data.idx")) || !bytes.Equal(sums, readFile(t, fsys, "d/data.sum")) {
		t.Error("index or sums are not those of the finished COW")
	}
}

// TestEncodeOnDisk encodes between real files, holes included.
func TestEncodeOnDisk(t *testing.T) {
	dir := t.TempDir()
	rng := newRand(t, 1)
	image := make([]byte, 8<<20)
	f, err := blockio.OS().Open(dir+"/image", blockio.Create)
	must(t, err)
	defer f.Close()
	must(t, f.Truncate(int64(len(image))))
	for _, off := range []int{0, 1 << 20, 5<<20 + 4096} {
		p := image[off : off+200<<10]
		fill(rng, p)
		_, err = f.WriteAt(p, int64(off))
		must(t, err)
	}
	info, err := Encode(ctx, blockio.OS(), dir, f, EncodeOptions{Jobs: 2})
	must(t, err)
	must(t, checkSnapshot(blockio.OS(), dir, image))
	if info.Blocks*bs > 1<<20 {
		t.Errorf("%d blocks: holes were encoded", info.Blocks)
	}
}

// TestEncodeReplaces: what an earlier one left, complete or not, is gone.
func TestEncodeReplaces(t *testing.T) {
	fsys := crashfs.New("d")
	rng := newRand(t, 2)
	_, err := Encode(ctx, fsys, "d", newView(rng, 1<<20), EncodeOptions{})
	must(t, err)
	for _, name := range []string{"d/data.cow.tmp", "d/data.idx.tmp", "d/data.sum.tmp"} {
		must(t, fsys.Put(name, []byte("half")))
	}
	v := newView(rng, 2<<20)
	_, err = Encode(ctx, fsys, "d", v, EncodeOptions{})
	must(t, err)
	must(t, checkSnapshot(fsys, "d", v.data))
	checkFiles(t, fsys, "[data.cow data.idx data.sum]")
}

func checkFiles(t *testing.T, fsys blockio.FS, want string) {
	t.Helper()
	names, err := fsys.ReadDir("d")
	must(t, err)
	if fmt.Sprint(names) != want {
		t.Errorf("files %v, want %s", names, want)
	}
}

// movingView is a view whose holes become data that is zeros once they were
// looked at, as a merge below a view may make them.
type movingView struct {
	*memView
	walked bool
}

func (v *movingView) NextData(off int64) (start, end int64, err error) {
	if v.walked {
		return off, v.Size(), nil
	}
	start, end, err = v.memView.NextData(off)
	v.walked = err == io.EOF
	return start, end, err
}

func TestEncodeMovingHoles(t *testing.T) {
	fsys := crashfs.New("d")
	v := &movingView{memView: newView(newRand(t, 3), 4<<20)}
	for off := int64(2 << 20); off < 4<<20; off += bs {
		clear(v.data[off : off+bs])
	}
	hole := v.hole
	v.hole = func(off int64) bool { return off >= 2<<20 || hole(off) }
	_, err := Encode(ctx, fsys, "d", v, EncodeOptions{})
	must(t, err)
	must(t, checkSnapshot(fsys, "d", v.data))
}

// brokenView fails, or lies about its data.
type brokenView struct {
	*memView
	size  int64
	read  error
	next  error
	start func(off int64) int64
}

func (v *brokenView) Size() int64 { return v.size }

func (v *brokenView) ReadAt(p []byte, off int64) (int, error) {
	if v.read != nil {
		return 0, v.read
	}
	return v.memView.ReadAt(p, off)
}

func (v *brokenView) NextData(off int64) (start, end int64, err error) {
	if v.next != nil {
		return 0, 0, v.next
	}
	return v.start(off), off, nil
}

func TestEncodeBadInput(t *testing.T) {
	injected := errors.New("injected")
	plain := newView(newRand(t, 4), 1<<20)
	tests := []struct {
		name string
		view View
		o    EncodeOptions
		want error
	}{
		{"not whole blocks", &brokenView{memView: plain, size: 1<<20 - 512}, EncodeOptions{}, nil},
		{"too large", &brokenView{memView: plain, size: maxImage + bs}, EncodeOptions{}, nil},
		{"negative", &brokenView{memView: plain, size: -bs}, EncodeOptions{}, nil},
		{"shorter than it says", &brokenView{memView: plain, size: 2 << 20, next: injected}, EncodeOptions{}, injected},
		{"no progress", &brokenView{memView: plain, size: 1 << 20, start: func(off int64) int64 { return off }}, EncodeOptions{}, nil},
		{"backwards", &brokenView{memView: plain, size: 1 << 20, start: func(off int64) int64 { return off - bs }}, EncodeOptions{}, nil},
		{"compression", plain, EncodeOptions{Compression: "rar"}, nil},
		{"brotli", plain, EncodeOptions{Compression: "brotli"}, nil},
		{"level", plain, EncodeOptions{Compression: "zstd,99"}, nil},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			fsys := crashfs.New("d")
			_, err := Encode(ctx, fsys, "d", test.view, test.o)
			t.Log(err)
			if err == nil || test.want != nil && !errors.Is(err, test.want) {
				t.Errorf("error %v, want %v", err, test.want)
			}
			checkFiles(t, fsys, "[]")
		})
	}
}

// failingView fails at some read.
type failingView struct {
	*memView
	left int
	err  error
}

func (v *failingView) ReadAt(p []byte, off int64) (int, error) {
	if v.left--; v.left < 0 {
		return 0, v.err
	}
	return v.memView.ReadAt(p, off)
}

func TestEncodeViewFails(t *testing.T) {
	for _, err := range []error{syscall.EIO, io.EOF} {
		fsys := crashfs.New("d")
		v := &failingView{memView: newView(newRand(t, 5), 8<<20), left: 3, err: err}
		_, got := Encode(ctx, fsys, "d", v, EncodeOptions{})
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		if !errors.Is(got, err) {
			t.Errorf("error %v, want %v", got, err)
		}
		checkFiles(t, fsys, "[]")
	}
}

// TestEncodeNoSpace encodes into file systems of every size that is too small.
func TestEncodeNoSpace(t *testing.T) {
	v := newView(newRand(t, 6), 1<<20)
	for capacity := int64(bs); ; capacity += bs {
		fsys := crashfs.New("d")
		fsys.SetCapacity(capacity)
		_, err := Encode(ctx, fsys, "d", v, EncodeOptions{Jobs: 2})
		if err == nil {
			must(t, checkSnapshot(fsys, "d", v.data))
			t.Logf("fits %d bytes", capacity)
			return
		}
		if !errors.Is(err, syscall.ENOSPC) {
			t.Fatalf("capacity %d: error %v", capacity, err)
		}
		checkFiles(t, fsys, "[]")
		// The space is free again.
		must(t, fsys.Put("d/x", nil))
		f, err := fsys.Open("d/x", 0)
		must(t, err)
		must(t, f.Allocate(0, capacity))
		must(t, f.Close())
	}
}

// TestEncodeSteps: whatever step fails, no file is left, and it can be done
// again.
func TestEncodeSteps(t *testing.T) {
	injected := errors.New("injected")
	v := newView(newRand(t, 7), 2<<20)
	for step := int64(1); ; step++ {
		fsys := crashfs.New("d")
		must(t, fsys.Put("d/data.cow", []byte("old")))
		failed := false
		fsys.OnStep(func(s crashfs.Step) error {
			if s.N == step {
				failed = true
				return injected
			}
			return nil
		})
		_, err := Encode(ctx, fsys, "d", v, EncodeOptions{})
		if !failed {
			must(t, err)
			t.Logf("%d steps", step-1)
			return
		}
		if !errors.Is(err, injected) {
			t.Fatalf("step %d: error %v", step, err)
		}
		checkFiles(t, fsys, "[]")
		_, err = Encode(ctx, fsys, "d", v, EncodeOptions{})
		must(t, err)
		must(t, checkSnapshot(fsys, "d", v.data))
	}
}

// TestEncodeCancelled stops it at every moment at which it asks for leave.
func TestEncodeCancelled(t *testing.T) {
	v := newView(newRand(t, 8), 4<<20)
	for n := 0; ; n++ {
		fsys := crashfs.New("d")
		stop, cancel := context.WithCancel(ctx)
		calls := 0
		_, err := Encode(stop, fsys, "d", v, EncodeOptions{Pace: func(ctx context.Context, bytes int) error {
			if bytes <= 0 || bytes > encodeRead {
				t.Errorf("pace is asked for %d bytes", bytes)
			}
			if calls++; calls == n {
				cancel()
				return ctx.Err()
			}
			return nil
		}})
		cancel()
		if calls < n {
			must(t, err)
			t.Logf("asked %d times", calls)
			return
		}
		if n == 0 {
			must(t, err)
			continue
		}
		if !errors.Is(err, context.Canceled) || calls > n {
			t.Fatalf("cancelled at call %d of %d: error %v", n, calls, err)
		}
		checkFiles(t, fsys, "[]")
	}
}

// TestEncodeCancelledUnpaced stops it in the middle of the view.
func TestEncodeCancelledUnpaced(t *testing.T) {
	fsys := crashfs.New("d")
	stop, cancel := context.WithCancel(ctx)
	calls := 0
	_, err := Encode(stop, fsys, "d", newView(newRand(t, 8), 8<<20), EncodeOptions{OnProgress: func(int64, int64) {
		calls++
		cancel()
	}})
	if !errors.Is(err, context.Canceled) || calls != 1 {
		t.Errorf("error %v after %d reports of progress", err, calls)
	}
	checkFiles(t, fsys, "[]")
}

// TestEncodeHugeHole: time and memory follow the data, not the size.
func TestEncodeHugeHole(t *testing.T) {
	fsys := crashfs.New("d")
	v := &sparseView{size: maxImage, at: maxImage - encodeChunk}
	rng := rand.New(rand.NewPCG(9, 9))
	fill(rng, v.data[:])
	info, err := Encode(ctx, fsys, "d", v, EncodeOptions{})
	must(t, err)
	c := openCOW(t, fsys, "d/data.cow", OpenCOWOptions{})
	op, _, ok, err := c.Ops.Find(1<<32 - 1)
	must(t, err)
	if info.Ops != 1 || !ok || op.NewBlock != 1<<32-16 || op.Blocks != 16 {
		t.Errorf("info %+v, op %+v", info, op)
	}
}

// sparseView has one chunk of data.
type sparseView struct {
	size, at int64
	data     [encodeChunk]byte
}

func (v *sparseView) Size() int64 { return v.size }

func (v *sparseView) ReadAt(p []byte, off int64) (int, error) {
	return copy(p, v.data[off-v.at:]), nil
}

func (v *sparseView) NextData(off int64) (start, end int64, err error) {
	if off >= v.at+encodeChunk {
		return 0, 0, io.EOF
	}
	return max(off, v.at), v.at + encodeChunk, nil
}
