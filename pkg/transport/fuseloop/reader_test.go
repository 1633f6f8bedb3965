package fuseloop

import (
	"fmt"
	"os"
	"runtime"
	"strings"
	"sync"
	"testing"

	"github.com/snapmerge/snapmerge/pkg/transport"
)

// TestIdleVolumesAreCheap looks at the locked memory of many idle devices.
func TestIdleVolumesAreCheap(t *testing.T) {
	needLocking(t)
	const n = 20
	var volumes []string
	for i := range n {
		volumes = append(volumes, fmt.Sprint("idle-", i))
	}
	noLeftovers(t, volumes...)
	tr := New(nil)
	before := statusKiB(t, "VmLck")
	for _, v := range volumes {
		create(t, tr, v, newMemBackend(4096), transport.Options{})
	}
	eventually(t, "idle readers give their memory back", func() bool { return statusKiB(t, "VmLck") <= before })
	eventually(t, "readers that are not needed end", func() bool { return countReaders() == n*minReaders })
}

// TestReadersGrow checks that a busy volume gets more readers, and loses them.
func TestReadersGrow(t *testing.T) {
	needLocking(t)
	noLeftovers(t, "grow")
	before := statusKiB(t, "VmLck")
	m := newMemBackend(1 << 20)
	d := create(t, New(nil), "grow", m, transport.Options{})
	f := openGuest(t, d.Path(), os.O_RDONLY)
	defer f.Close()
	release := hangingReads(t, m, f)
	eventually(t, "all requests in service", func() bool { return d.srv.inBackend.Load() == int64(maxReaders) })
	if got, want := statusKiB(t, "VmLck"), int(maxReaders)*frameSize()>>10; got < want {
		t.Errorf("%d readers have locked %d KiB, want at least %d", maxReaders, got, want)
	}
	release()
	eventually(t, "readers that are not needed end", func() bool { return countReaders() == minReaders })
	eventually(t, "idle readers give their memory back", func() bool { return statusKiB(t, "VmLck") <= before })
	if _, err := f.ReadAt(aligned(t, blockSize), 0); err != nil {
		t.Error(err)
	}
}

// TestReadersShareALimit: where other volumes have as many readers as there may be, one
// gets on with the least.
func TestReadersShareALimit(t *testing.T) {
	needRoot(t)
	noLeftovers(t, "limit")
	extra.Add(maxExtra)
	defer func() {
		if n := extra.Add(-maxExtra); n != 0 {
			t.Errorf("%d readers too many are counted", n)
		}
	}()
	m := newMemBackend(1 << 20)
	d := create(t, New(nil), "limit", m, transport.Options{})
	f := openGuest(t, d.Path(), os.O_RDONLY)
	defer f.Close()
	release := hangingReads(t, m, f)
	eventually(t, "requests in service", func() bool { return d.srv.inBackend.Load() == minReaders })
	if n := countReaders(); n != minReaders {
		t.Errorf("%d readers", n)
	}
	release()
}

// TestReaderCannotBeAdded: a further reader that cannot wait for requests is done without.
func TestReaderCannotBeAdded(t *testing.T) {
	before := extra.Load()
	s := &readerSet{fuse: -1, fail: func(err error) { t.Error(err) }}
	s.total.Store(minReaders) // all busy
	s.grow()
	s.wg.Wait()
	if n := s.total.Load(); n != minReaders || !s.short.Load() {
		t.Errorf("%d readers, one could not be added: %t", n, s.short.Load())
	}
	if n := extra.Load(); n != before {
		t.Errorf("%d readers too many are counted", n-before)
	}
	// One of the least is missed.
	failed := false
	s.fail = func(error) { failed = true }
	s.read()
	if !failed {
		t.Error("goes on without the least readers")
	}
}

// hangingReads begins maxReaders reads that do not end until release, which waits for
// them, is called.
func hangingReads(t *testing.T, m *memBackend, f *os.File) (release func()) {
	t.Helper()
	hang := make(chan struct{})
	m.hang.Store(hang)
	var wg sync.WaitGroup
	for i := range int64(maxReaders) {
		buf := aligned(t, blockSize)
		wg.Go(func() {
			if _, err := f.ReadAt(buf, i*blockSize); err != nil {
				t.Error(err)
			}
		})
	}
	return func() {
		close(hang)
		wg.Wait()
	}
}

// needLocking skips the test where frames cannot be locked, by which it counts
// them: all other memory of the process comes and goes as its collector likes.
func needLocking(t *testing.T) {
	t.Helper()
	needRoot(t)
	before := statusKiB(t, "VmLck")
	for range maxReaders {
		f, err := newFrame()
		if err != nil {
			t.Fatal(err)
		}
		defer f.free()
	}
	if have, want := statusKiB(t, "VmLck")-before, int(maxReaders)*frameSize()>>10; have < want {
		t.Skipf("this process may lock %d KiB of memory, %d readers have %d (ulimit -l)", have, maxReaders, want)
	}
}

// countReaders counts the readers of this process.
func countReaders() int {
	buf := make([]byte, 1<<20)
	return strings.Count(string(buf[:runtime.Stack(buf, true)]), "fuseloop.(*readerSet).serve(")
}

func statusKiB(t *testing.T, key string) (kib int) {
	t.Helper()
	b, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(line, key+":"); ok {
			fmt.Sscan(v, &kib)
		}
	}
	return kib
}
