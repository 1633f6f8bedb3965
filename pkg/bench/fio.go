package bench

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os/exec"
	"slices"
	"time"
)

// ErrNoFio says that fio is not installed.
var ErrNoFio = errors.New("fio is not installed, which makes the load (Debian, Ubuntu: fio)")

// FindFio tells whether there is a fio, ErrNoFio if not.
func FindFio() error {
	if _, err := exec.LookPath("fio"); err != nil {
		return ErrNoFio
	}
	return nil
}

// FioLoad is what fio has found: requests per second, and the time that all but one in a
// hundred took at most, in µs.
type FioLoad struct{ IOPS, Read, Write, Flush float64 }

// Fio reads and writes blocks of 4 KiB all over a device or a file for that time, with
// a flush after each write, one request at a time. What it finds in the time warm before
// that does not count; both are whole seconds. It ends early with ctx.
func Fio(ctx context.Context, name string, warm, d time.Duration) (FioLoad, error) {
	jobs, err := fio(ctx, "--filename="+name, "--name=load", "--rw=randrw", "--bs=4k", "--fsync=1", "--norandommap", "--randrepeat=0", "--time_based",
		fmt.Sprintf("--ramp_time=%d", int(warm.Seconds())), fmt.Sprintf("--runtime=%d", int(d.Seconds())))
	if err != nil {
		return FioLoad{}, err
	}
	const µs = 1e6
	j := &jobs[0]
	l := FioLoad{IOPS: j.Read.IOPS + j.Write.IOPS, Read: fioTime(0.99, j.Read.Latency) * µs, Write: fioTime(0.99, j.Write.Latency) * µs, Flush: fioTime(0.99, j.Sync.Latency) * µs}
	if l.IOPS == 0 || l.Read == 0 || l.Write == 0 || l.Flush == 0 {
		return l, fmt.Errorf("what fio says: something was not measured: %+v", l)
	}
	return l, nil
}

// fioJob is what fio says of a group of its jobs.
type fioJob struct {
	Read, Write fioRequests
	Sync        struct {
		Latency fioLatency `json:"lat_ns"`
	}
}

type fioRequests struct {
	IOPS    float64
	Latency fioLatency `json:"clat_ns"`
}

// fioLatency counts requests by how long they took, in ns; fio rounds that, but not the
// mean of all N.
type fioLatency struct {
	Mean float64
	N    float64
	Bins map[uint64]uint64
}

// fio runs it, with direct I/O and one request at a time of each job, each of which is a
// thread, and returns what it says of each group, of which there is one at least.
func fio(ctx context.Context, args ...string) ([]fioJob, error) {
	var stdout, stderr bytes.Buffer
	c := exec.CommandContext(ctx, "fio", append([]string{"--direct=1", "--ioengine=psync", "--thread", "--group_reporting", "--output-format=json+"}, args...)...)
	c.Stdout, c.Stderr = &stdout, &stderr
	if err := c.Run(); err != nil {
		return nil, fmt.Errorf("fio: %w: %s", err, bytes.TrimSpace(stderr.Bytes()))
	}
	return parseFio(stdout.Bytes())
}

// parseFio reads fio's JSON, before which there may be notes.
func parseFio(out []byte) ([]fioJob, error) {
	var r struct{ Jobs []fioJob }
	if err := json.Unmarshal(out[max(bytes.IndexByte(out, '{'), 0):], &r); err != nil {
		return nil, fmt.Errorf("what fio says: %w", err)
	}
	if len(r.Jobs) == 0 {
		return nil, errors.New("what fio says: there are no jobs")
	}
	return r.Jobs, nil
}

// fioTime is how long that part of all requests took at most, in seconds; 0: there are
// none.
func fioTime(part float64, latencies ...fioLatency) float64 {
	all, total := map[uint64]uint64{}, uint64(0)
	for _, l := range latencies {
		for ns, n := range l.Bins {
			all[ns] += n
			total += n
		}
	}
	left := uint64(part * float64(total))
	for _, ns := range slices.Sorted(maps.Keys(all)) {
		if n := all[ns]; left >= n {
			left -= n
			continue
		}
		return float64(ns) / 1e9
	}
	return 0
}
