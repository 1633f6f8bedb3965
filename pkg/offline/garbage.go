package offline

import (
	"runtime"
	"runtime/debug"
)

// garbageBytes is how much garbage a merge may leave before it is collected.
const garbageBytes = 16 << 20

// boundGarbage has garbage collected when there are garbageBytes of it, whatever
// the heap holds, until restore. The runtime's own rule is as much garbage as there
// is live data, which for a long list of ops would be twice its 24 bytes an op. The
// list has no pointers, so a collection costs little.
func boundGarbage() (restore func()) {
	runtime.GC()
	var s runtime.MemStats
	runtime.ReadMemStats(&s)
	percent := int(max(garbageBytes*100/max(s.HeapAlloc, 1), 1))
	old := debug.SetGCPercent(percent)
	if old < percent { // GOGC asks for less garbage, or for no collector
		debug.SetGCPercent(old)
	}
	return func() { debug.SetGCPercent(old) }
}
