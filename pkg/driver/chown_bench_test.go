package driver

import (
	"fmt"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
)

// BenchmarkChown measures what a change of the owner of all files, as the kubelet
// does it for a pod with fsGroup, costs a volume just restored from a snapshot: its
// time, what it writes to the device, and the disk space that the write log has
// then. The merge is paused, so that nothing is folded meanwhile.
func BenchmarkChown(b *testing.B) {
	for _, fs := range []string{ext4, xfs} {
		for _, files := range []int{10_000, 100_000} {
			b.Run(fmt.Sprintf("%s/%d", fs, files), func(b *testing.B) { benchmarkChown(b, fs, files) })
		}
	}
}

func benchmarkChown(b *testing.B, fs string, files int) {
	needDevices(b, "mkfs."+fs)
	n := newNode(b, nil)
	c := mountCap(writer, fs)
	id := n.create("source", 4*gib, "", c)
	const perDirectory = 1000
	sh(b, fmt.Sprintf(`cd %s; for d in $(seq %d); do mkdir $d; (cd $d; seq %d | xargs touch); done; sync -f .`, n.use(id, c), files/perDirectory, perDirectory))
	snap := n.snapshot("snap", id)
	n.leave(id)
	var took time.Duration
	var log, written int64
	for b.Loop() {
		b.StopTimer()
		copied := n.create("copy", 4*gib, snap.SnapshotId, c)
		v, err := n.p.volumes.Get(copied)
		if err == nil {
			err = v.SetPaused(true)
		}
		if err != nil {
			b.Fatal(err)
		}
		path := n.use(copied, c)
		sh(b, "sync -f "+path)
		before := writtenTo(b, n.p.volumes.Device(copied))
		b.StartTimer()
		start := time.Now()
		sh(b, fmt.Sprintf("chown -R 2000:2000 %s && sync -f %[1]s", path))
		took += time.Since(start)
		b.StopTimer()
		log += v.Status().LogBytes
		written += writtenTo(b, n.p.volumes.Device(copied)) - before
		n.leave(copied)
		n.delete(copied)
		b.StartTimer()
	}
	b.ReportMetric(float64(written)/float64(b.N)/mib, "written-MiB")
	b.ReportMetric(float64(log)/float64(b.N)/mib, "log-MiB")
	b.ReportMetric(took.Seconds()/float64(b.N), "s")
	if _, err := n.DeleteSnapshot(b.Context(), &csi.DeleteSnapshotRequest{SnapshotId: snap.SnapshotId}); err != nil {
		b.Error(err)
	}
	n.delete(id)
}

// writtenTo is how many bytes have been written to the block device.
func writtenTo(b *testing.B, dev string) int64 {
	b.Helper()
	f := strings.Fields(statOf(dev))
	if len(f) < 7 {
		b.Fatalf("%s: no statistics", dev)
	}
	sectors, err := strconv.ParseInt(f[6], 10, 64)
	if err != nil {
		b.Fatal(err)
	}
	return sectors * 512
}
