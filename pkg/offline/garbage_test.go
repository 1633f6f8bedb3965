package offline

import (
	"runtime"
	"runtime/metrics"
	"testing"
)

// TestBoundGarbage makes garbage beside a large heap, as a merge of many ops does.
func TestBoundGarbage(t *testing.T) {
	heap := []metrics.Sample{{Name: "/memory/classes/heap/objects:bytes"}}
	live := make([]byte, 128<<20)
	defer boundGarbage()()
	metrics.Read(heap)
	before, peak := heap[0].Value.Uint64(), uint64(0)
	var garbage []byte
	for range 4096 {
		garbage = make([]byte, 64<<10)
		metrics.Read(heap)
		peak = max(peak, heap[0].Value.Uint64())
	}
	runtime.KeepAlive(garbage)
	runtime.KeepAlive(live)
	// The collector takes its time; without the bound it is 128 MiB and more.
	if used := peak - before; used > 4*garbageBytes {
		t.Errorf("%d MiB of garbage", used>>20)
	}
}
