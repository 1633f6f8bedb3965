package demo

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// file is a file with its checksum.
type file struct {
	name string
	size int64
	sum  [sha256.Size]byte
}

const (
	// wantFiles is how many files the demo copies, if there are that many.
	wantFiles = 600
	// fewestFiles is how many it needs to show anything, and roomPerFile the bytes
	// that those before leave for each of them.
	fewestFiles = 200
	roomPerFile = 64 << 10
	// largestFile bounds one file, so that many fit.
	largestFile = 32 << 20
)

// copyRealFiles copies files of this machine, below root, into dir, at most limit
// bytes, and syncs them.
func copyRealFiles(ctx context.Context, root, dir string, limit int64) ([]file, error) {
	var files []file
	total := int64(0)
	small := 20 // one of so many small files is taken
	walk := func(path string, e fs.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() {
			return nil // what cannot be read is left out
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		info, err := e.Info()
		if err != nil || info.Size() < 1<<10 || info.Size() > min(largestFile, limit/20) {
			return nil
		}
		missing := int64(max(fewestFiles-len(files)-1, 0))
		if total+info.Size()+missing*roomPerFile > limit {
			return nil
		}
		// Not only the first folder's files: one in a few, more of the large.
		if info.Size() < roomPerFile && rand.IntN(small) > 0 {
			return nil
		}
		f, err := copyFile(path, dir, fmt.Sprintf("d%02d/%05d-%s", len(files)%20, len(files), filepath.Base(path)))
		if err != nil {
			return err
		}
		files = append(files, f)
		total += f.size
		if len(files) == wantFiles {
			return fs.SkipAll
		}
		return nil
	}
	if err := filepath.WalkDir(root, walk); err != nil {
		return nil, err
	}
	if len(files) < fewestFiles { // a small system: all of them
		small = 1
		if err := filepath.WalkDir(root, walk); err != nil {
			return nil, err
		}
	}
	if len(files) < fewestFiles {
		return nil, fmt.Errorf("only %d files of %s fit, the demo wants %d", len(files), root, fewestFiles)
	}
	d, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	return files, unix.Syncfs(int(d.Fd()))
}

func copyFile(from, dir, name string) (file, error) {
	in, err := os.Open(from)
	if err != nil {
		return file{}, err
	}
	defer in.Close()
	to := filepath.Join(dir, name)
	if err := os.MkdirAll(filepath.Dir(to), 0o700); err != nil {
		return file{}, err
	}
	out, err := os.OpenFile(to, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return file{}, err
	}
	h := sha256.New()
	n, err := io.Copy(io.MultiWriter(out, h), in)
	f := file{name: name, size: n}
	copy(f.sum[:], h.Sum(nil))
	return f, errors.Join(err, out.Close())
}

// writeFiles makes n files of random data under dir and syncs each.
func writeFiles(dir, sub string, n int) ([]file, error) {
	if err := os.Mkdir(filepath.Join(dir, sub), 0o700); err != nil {
		return nil, err
	}
	var files []file
	for i := range n {
		p := make([]byte, 4096+rand.IntN(256<<10))
		fillRandom(p, uint64(i))
		f := file{name: filepath.Join(sub, fmt.Sprintf("%03d", i)), size: int64(len(p)), sum: sha256.Sum256(p)}
		out, err := os.OpenFile(filepath.Join(dir, f.name), os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
		if err != nil {
			return nil, err
		}
		_, err = out.Write(p)
		if err := errors.Join(err, out.Sync(), out.Close()); err != nil {
			return nil, err
		}
		files = append(files, f)
	}
	return files, nil
}

func fillRandom(p []byte, seed uint64) {
	r := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8), 1})
	_, _ = r.Read(p) // it never fails
}

// verify reads every file, past the page cache, and compares its checksum.
func verify(ctx context.Context, dir string, files []file) error {
	for _, f := range files {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := verifyFile(dir, f); err != nil {
			return err
		}
	}
	return nil
}

func verifyFile(dir string, f file) error {
	in, err := os.Open(filepath.Join(dir, f.name))
	if err != nil {
		return err
	}
	defer in.Close()
	// Clean pages of an earlier read go, so that the device is asked.
	_ = unix.Fadvise(int(in.Fd()), 0, 0, unix.FADV_DONTNEED)
	h := sha256.New()
	n, err := io.Copy(h, in)
	if err != nil {
		return err
	}
	if n != f.size || string(h.Sum(nil)) != string(f.sum[:]) {
		return fmt.Errorf("%s: %d bytes with another checksum, %d were written", f.name, n, f.size)
	}
	return nil
}

func readFirstByte(name string) error {
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = io.ReadFull(f, make([]byte, 1))
	return err
}

// load writes and reads a file system without pause.
type load struct {
	dir     string
	room    int64 // that it may take in the file system, in bytes
	stop    context.CancelFunc
	stopped <-chan struct{} // closed by stop
	ended   chan struct{}   // closed when no request is under way any more

	mu  sync.Mutex
	res loadResult
	err error
}

type loadResult struct {
	writes, reads int
	longest       time.Duration
	file          file // what was written
}

func startLoad(dir string, room int64) *load {
	ctx, stop := context.WithCancel(context.Background())
	l := &load{dir: dir, room: room, stop: stop, stopped: ctx.Done(), ended: make(chan struct{})}
	var wg sync.WaitGroup
	wg.Go(func() { l.note(l.write()) })
	wg.Go(func() { l.note(l.read()) })
	go func() {
		wg.Wait()
		close(l.ended)
	}()
	return l
}

func (l *load) note(err error) {
	l.mu.Lock()
	l.err = errors.Join(l.err, err)
	l.mu.Unlock()
}

// close stops the load, if there is one, and waits until it has left the file
// system. No context ends the wait: what is in use cannot be unmounted.
func (l *load) close() error {
	if l == nil {
		return nil
	}
	l.stop()
	select {
	case <-l.ended:
		return nil
	case <-time.After(time.Minute):
		return errors.New("a request has not ended after a minute")
	}
}

// end closes the load and tells how it went.
func (l *load) end() (loadResult, error) {
	if err := l.close(); err != nil {
		return loadResult{}, err
	}
	return l.res, l.err
}

// each calls fn until the load is stopped and keeps the longest time it took.
func (l *load) each(count *int, fn func() error) error {
	for {
		select {
		case <-l.stopped:
			return nil
		default:
		}
		start := time.Now()
		if err := fn(); err != nil {
			return err
		}
		l.mu.Lock()
		*count++
		l.res.longest = max(l.res.longest, time.Since(start))
		l.mu.Unlock()
	}
}

// write writes pieces of a file and syncs each.
func (l *load) write() error {
	w, err := createRing(l.dir, "written-during-the-kill", l.room)
	if err != nil {
		return err
	}
	defer w.f.Close()
	err = l.each(&l.res.writes, w.write)
	l.res.file = w.file()
	return err
}

// ring is a file that is written from its start again when it has reached a size:
// however long the load goes on, it must not fill the volume.
type ring struct {
	f      *os.File
	name   string
	seeds  []uint64 // of the pieces that the file has
	pieces uint64   // that it is to have
	writes uint64
}

// ringPiece is how much of a ring is written at a time, in bytes.
const ringPiece = 16 << 10

func createRing(dir, name string, size int64) (*ring, error) {
	f, err := os.OpenFile(filepath.Join(dir, name), os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	return &ring{f: f, name: name, pieces: uint64(size / ringPiece)}, err
}

// write writes the next piece and syncs it.
func (w *ring) write() error {
	p := make([]byte, ringPiece)
	fillRandom(p, w.writes)
	at := w.writes % w.pieces
	if _, err := w.f.WriteAt(p, int64(at)*ringPiece); err != nil {
		return err
	}
	if at == uint64(len(w.seeds)) {
		w.seeds = append(w.seeds, 0)
	}
	w.seeds[at] = w.writes
	w.writes++
	return w.f.Sync()
}

// file is what the ring has become.
func (w *ring) file() file {
	f := file{name: w.name, size: int64(len(w.seeds)) * ringPiece}
	h := sha256.New()
	p := make([]byte, ringPiece)
	for _, seed := range w.seeds {
		fillRandom(p, seed)
		h.Write(p)
	}
	h.Sum(f.sum[:0])
	return f
}

// read reads pieces of files all over the file system, past the page cache.
func (l *load) read() error {
	var names []string
	err := filepath.WalkDir(l.dir, func(path string, e fs.DirEntry, err error) error {
		if err == nil && e.Type().IsRegular() && e.Name() != "written-during-the-kill" {
			names = append(names, path)
		}
		return nil
	})
	if err != nil {
		return err
	}
	p := make([]byte, 64<<10)
	return l.each(&l.res.reads, func() error {
		f, err := os.Open(names[rand.IntN(len(names))])
		if err != nil {
			return err
		}
		defer f.Close()
		_ = unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)
		if _, err := f.Read(p); err != nil && err != io.EOF {
			return err
		}
		return nil
	})
}
