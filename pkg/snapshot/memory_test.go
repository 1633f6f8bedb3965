package snapshot

import (
	"runtime"
	"testing"
	"time"

	"github.com/snapmerge/snapmerge/pkg/blockio"
)

// TestIndexMemory opens a COW of millions of ops by its index and looks for
// random blocks: the heap must not grow beyond the cache.
func TestIndexMemory(t *testing.T) {
	ops := 3_000_000
	if testing.Short() {
		ops = 300_000
	}
	const cacheBytes = 2 << 20
	name := t.TempDir() + "/x.cow"
	writeZeros(t, blockio.OS(), name, ops, false)
	start := time.Now()
	must(t, BuildIndex(ctx, blockio.OS(), name))
	t.Logf("index of %d ops built in %v", ops, time.Since(start).Round(time.Millisecond))

	heap := func() int64 {
		runtime.GC()
		runtime.GC() // the second one clears pools
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return int64(m.HeapAlloc)
	}
	before := heap()
	start = time.Now()
	c, err := OpenCOW(blockio.OS(), name, OpenCOWOptions{Cache: NewCache(cacheBytes)})
	took := time.Since(start)
	must(t, err)
	defer c.Close()
	if !c.Indexed() || c.Ops.Len() != uint64(ops) {
		t.Fatalf("index used %v, %d ops: %v", c.Indexed(), c.Ops.Len(), c.IndexError)
	}
	opened := heap() - before
	rng := newRand(t, 1)
	const lookups = 200_000
	start = time.Now()
	for range lookups {
		block := rng.Uint64N(uint64(3 * ops))
		op, pos, ok, err := c.Ops.Next(block)
		must(t, err)
		if want := (max(block, 3) + 2) / 3; !ok || op.NewBlock != 3*want || pos != want-1 {
			t.Fatalf("Next(%d) = block %d at %d, %v", block, op.NewBlock, pos, ok)
		}
	}
	rate := time.Since(start) / lookups
	grown := heap() - before
	t.Logf("heap grew by %d bytes at opening, which took %v, and by %d in all; bound %d; %v a random look-up",
		opened, took.Round(time.Microsecond), grown, cacheBytes+256<<10, rate)
	if opened > 128<<10 {
		t.Errorf("heap grew by %d bytes at opening", opened)
	}
	if grown > cacheBytes+256<<10 {
		t.Errorf("heap grew by %d bytes with a cache of %d", grown, cacheBytes)
	}
	runtime.KeepAlive(c)
}
