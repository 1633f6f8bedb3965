// Package devicetest is what the tests of all transports need: backends in
// memory and in a file, guests that do random I/O, and a load that verifies what
// it reads while the server of a device is killed.
package devicetest

import (
	"bytes"
	"os"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// BlockSize is that of devices, in bytes.
const BlockSize = 4096

// Memory is a volume in memory that counts calls, and fails or hangs when told.
type Memory struct {
	Reads, Writes, Flushes, Zeros atomic.Int64

	mu   sync.RWMutex
	data []byte

	state sync.Mutex
	fail  error
	hang  chan struct{}
}

// NewMemory makes a volume of zeros.
func NewMemory(size int64) *Memory { return &Memory{data: make([]byte, size)} }

// FailWith makes every call return err, until FailWith(nil).
func (m *Memory) FailWith(err error) {
	m.state.Lock()
	defer m.state.Unlock()
	m.fail = err
}

// Hang makes every call wait until release is called.
func (m *Memory) Hang() (release func()) {
	m.state.Lock()
	defer m.state.Unlock()
	hang := make(chan struct{})
	m.hang = hang
	return sync.OnceFunc(func() {
		m.state.Lock()
		m.hang = nil
		m.state.Unlock()
		close(hang)
	})
}

// enter is the common beginning of all calls.
func (m *Memory) enter(count *atomic.Int64) error {
	count.Add(1)
	m.state.Lock()
	hang := m.hang
	m.state.Unlock()
	if hang != nil {
		<-hang
	}
	m.state.Lock()
	defer m.state.Unlock()
	return m.fail
}

// ReadAt and the others are those of transport.Backend.
func (m *Memory) ReadAt(p []byte, off int64) (int, error) {
	if err := m.enter(&m.Reads); err != nil {
		return 0, err
	}
	m.mu.RLock()
	defer m.mu.RUnlock()
	return copy(p, m.data[off:]), nil
}

// WriteAt writes.
func (m *Memory) WriteAt(p []byte, off int64) (int, error) {
	if err := m.enter(&m.Writes); err != nil {
		return 0, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	return copy(m.data[off:], p), nil
}

// Flush counts.
func (m *Memory) Flush() error { return m.enter(&m.Flushes) }

// Zero clears.
func (m *Memory) Zero(off, n int64) error {
	if err := m.enter(&m.Zeros); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	clear(m.data[off : off+n])
	return nil
}

// Size in bytes.
func (m *Memory) Size() int64 {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return int64(len(m.data))
}

// Content is a copy of everything.
func (m *Memory) Content() []byte {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return bytes.Clone(m.data)
}

// Grow adds zeros.
func (m *Memory) Grow(size int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.data = append(m.data, make([]byte, size-int64(len(m.data)))...)
}

// File is a volume in a file, with direct I/O, which it lends as a merged volume does.
type File struct {
	fd   int
	size int64
}

// OpenFile opens an existing file.
func OpenFile(path string) (*File, error) {
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_DIRECT|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, os.NewSyscallError("fstat", err)
	}
	return &File{fd, st.Size}, nil
}

// ReadAt and the others are those of transport.Backend.
func (f *File) ReadAt(p []byte, off int64) (int, error) { return unix.Pread(f.fd, p, off) }

// WriteAt writes.
func (f *File) WriteAt(p []byte, off int64) (int, error) { return unix.Pwrite(f.fd, p, off) }

// Lend is that of transport.Lender.
func (f *File) Lend(int64, int64, bool) (fd int, back func(done bool), ok bool) {
	return f.fd, func(bool) {}, true
}

// Flush is fdatasync(2).
func (f *File) Flush() error { return unix.Fdatasync(f.fd) }

// Zero punches a hole.
func (f *File) Zero(off, n int64) error {
	return unix.Fallocate(f.fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
}

// Size in bytes, as it was when the file was opened.
func (f *File) Size() int64 { return f.size }

// Close closes the file.
func (f *File) Close() error { return unix.Close(f.fd) }

// Served is a File of a server that may be killed. It lends itself to every other
// request.
type Served struct {
	*File
	asked atomic.Int64
}

// OpenServed opens an existing file and locks it, as volumes do: the last I/O of a
// server that was killed comes before that of the next.
func OpenServed(path string) (*Served, error) {
	f, err := OpenFile(path)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(f.fd, unix.LOCK_EX); err != nil {
		f.Close()
		return nil, os.NewSyscallError("flock", err)
	}
	return &Served{File: f}, nil
}

// Lend is that of transport.Lender.
func (f *Served) Lend(off, n int64, write bool) (fd int, back func(done bool), ok bool) {
	if f.asked.Add(1)%2 == 0 {
		return -1, nil, false
	}
	return f.File.Lend(off, n, write)
}
