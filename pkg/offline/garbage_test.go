package offline

import (
	"runtime"
	"testing"
)

// TestBoundGarbage looks at how much garbage the collector waits for beside a large
// heap, as a merge of many ops has. How much there is in the end depends on the
// machine, too: the collector takes its time.
func TestBoundGarbage(t *testing.T) {
	live := make([]byte, 128<<20)
	room := func() int64 {
		runtime.GC()
		var s runtime.MemStats
		runtime.ReadMemStats(&s)
		return int64(s.NextGC) - int64(s.HeapAlloc)
	}
	before := room()
	restore := boundGarbage()
	bound := room()
	restore()
	after := room()
	runtime.KeepAlive(live)
	t.Logf("%d MiB, with the bound %d MiB", before>>20, bound>>20)
	if bound > 2*garbageBytes {
		t.Errorf("the collector waits for %d MiB of garbage", bound>>20)
	}
	if after < before/2 {
		t.Errorf("after that for %d MiB, before for %d MiB", after>>20, before>>20)
	}
}
