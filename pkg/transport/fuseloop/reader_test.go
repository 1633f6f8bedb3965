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
	if testing.Short() {
		t.Skip("the short tests are those for the race detector, whose memory comes and goes")
	}
	const n = 20
	var volumes []string
	for i := range n {
		volumes = append(volumes, fmt.Sprint("idle-", i))
	}
	noLeftovers(t, volumes...)
	tr := New(nil)
	before := statusKiB(t, "VmRSS")
	for _, v := range volumes {
		create(t, tr, v, newMemBackend(4096), transport.Options{})
	}
	busy := statusKiB(t, "VmRSS")
	eventually(t, "idle readers give their memory back", func() bool { return statusKiB(t, "VmRSS") < before+n*100 })
	eventually(t, "readers that are not needed end", func() bool { return countReaders() == n*minReaders })
	t.Logf("resident memory: %d KiB, with %d new volumes %d, idle %d", before, n, busy, statusKiB(t, "VmRSS"))
}

// TestReadersGrow checks that a busy volume gets more readers, and loses them.
func TestReadersGrow(t *testing.T) {
	noLeftovers(t, "grow")
	m := newMemBackend(1 << 20)
	d := create(t, New(nil), "grow", m, transport.Options{})
	f := openGuest(t, d.Path(), os.O_RDONLY)
	defer f.Close()
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
	eventually(t, "all requests in service", func() bool { return d.srv.inBackend.Load() == maxReaders })
	close(hang)
	wg.Wait()
	eventually(t, "readers that are not needed end", func() bool { return countReaders() == minReaders })
	if _, err := f.ReadAt(aligned(t, blockSize), 0); err != nil {
		t.Error(err)
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
