package driver

import (
	"fmt"
	"os/exec"
	"slices"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
)

// BenchmarkStage measures what a pod waits for: NodeStageVolume and
// NodePublishVolume of a volume just restored from a snapshot, of three sizes.
// The file system is nearly full, so that the snapshot has ops for all of it;
// its data packs well, so that 20 GiB of it fit on the machine twice.
func BenchmarkStage(b *testing.B) {
	for _, size := range []int64{1, 5, 20} {
		b.Run(fmt.Sprintf("%dGiB", size), func(b *testing.B) { benchmarkStage(b, size*gib) })
	}
}

func benchmarkStage(b *testing.B, size int64) {
	needDevices(b, "mkfs.ext4")
	n := newNode(b, nil)
	c := mountCap(writer, ext4)
	id := n.create("source", size, "", c)
	// Lines of numbers: nothing repeats exactly, and there are no holes.
	fill := fmt.Sprintf("seq 1000000000 9999999999 | head -c %d >%s/data && sync -f %[2]s/data", size*9/10, n.use(id, c))
	if out, err := exec.Command("sh", "-ec", fill).CombinedOutput(); err != nil {
		b.Fatalf("%s: %v\n%s", fill, err, out)
	}
	snap := n.snapshot("snap", id)
	n.leave(id)
	var times []time.Duration
	for b.Loop() {
		copied := n.create("copy", size, snap.SnapshotId, c, "mergeRate", "1")
		start := time.Now()
		n.use(copied, c)
		times = append(times, time.Since(start))
		b.StopTimer()
		n.leave(copied)
		n.delete(copied)
		b.StartTimer()
	}
	slices.Sort(times)
	b.ReportMetric(float64(times[len(times)/2].Microseconds())/1000, "median-ms")
	b.ReportMetric(float64(times[len(times)-1].Microseconds())/1000, "max-ms")
	if _, err := n.DeleteSnapshot(b.Context(), &csi.DeleteSnapshotRequest{SnapshotId: snap.SnapshotId}); err != nil {
		b.Error(err)
	}
	n.delete(id)
}
