package fuseloop

import (
	"bytes"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"unsafe"
)

// memBackend is a volume in memory that counts, and fails or hangs when told.
type memBackend struct {
	mu   sync.RWMutex
	data []byte

	reads, writes, flushes, zeros atomic.Int64
	largest                       atomic.Int64 // bytes of the largest transfer
	unaligned                     atomic.Int64 // transfers whose memory was not page aligned

	fail atomic.Pointer[error] // what every call returns
	hang atomic.Value          // a chan struct{}: calls wait until it is closed
}

func newMemBackend(size int64) *memBackend { return &memBackend{data: make([]byte, size)} }

// enter is the common beginning of all calls.
func (m *memBackend) enter(count *atomic.Int64, n int) error {
	count.Add(1)
	for {
		have := m.largest.Load()
		if int64(n) <= have || m.largest.CompareAndSwap(have, int64(n)) {
			break
		}
	}
	if hang, ok := m.hang.Load().(chan struct{}); ok {
		<-hang
	}
	if err := m.fail.Load(); err != nil {
		return *err
	}
	return nil
}

func (m *memBackend) failWith(err error) {
	if err == nil {
		m.fail.Store(nil)
	} else {
		m.fail.Store(&err)
	}
}

// checkMemory counts memory that is of no use for direct I/O.
func (m *memBackend) checkMemory(p []byte) {
	if uintptr(unsafe.Pointer(unsafe.SliceData(p)))%uintptr(os.Getpagesize()) != 0 {
		m.unaligned.Add(1)
	}
}

func (m *memBackend) ReadAt(p []byte, off int64) (int, error) {
	m.checkMemory(p)
	if err := m.enter(&m.reads, len(p)); err != nil {
		return 0, err
	}
	m.mu.RLock()
	defer m.mu.RUnlock()
	return copy(p, m.data[off:]), nil
}

func (m *memBackend) WriteAt(p []byte, off int64) (int, error) {
	m.checkMemory(p)
	if err := m.enter(&m.writes, len(p)); err != nil {
		return 0, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	return copy(m.data[off:], p), nil
}

func (m *memBackend) Flush() error { return m.enter(&m.flushes, 0) }

func (m *memBackend) Zero(off, n int64) error {
	if err := m.enter(&m.zeros, 0); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	clear(m.data[off : off+n])
	return nil
}

func (m *memBackend) Size() int64 {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return int64(len(m.data))
}

// content is a copy of n bytes of the volume.
func (m *memBackend) content(off, n int64) []byte {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return bytes.Clone(m.data[off : off+n])
}

func (m *memBackend) grow(size int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.data = append(m.data, make([]byte, size-int64(len(m.data)))...)
}

// imageFile makes a file of the size with every block allocated.
func imageFile(t testing.TB, size int64) string {
	t.Helper()
	f, err := os.CreateTemp(t.TempDir(), "image")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	buf := make([]byte, 1<<20)
	for off := int64(0); off < size; off += int64(len(buf)) {
		if _, err := f.WriteAt(buf[:min(int64(len(buf)), size-off)], off); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
	return f.Name()
}
