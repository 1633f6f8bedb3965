package bench

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
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
	var stdout, stderr bytes.Buffer
	c := exec.CommandContext(ctx, "fio", "--name=load", "--filename="+name, "--direct=1", "--ioengine=psync", "--rw=randrw", "--bs=4k",
		"--fsync=1", "--norandommap", "--randrepeat=0", "--thread", "--time_based", fmt.Sprintf("--ramp_time=%d", int(warm.Seconds())), fmt.Sprintf("--runtime=%d", int(d.Seconds())), "--output-format=json")
	c.Stdout, c.Stderr = &stdout, &stderr
	if err := c.Run(); err != nil {
		return FioLoad{}, fmt.Errorf("fio: %w: %s", err, bytes.TrimSpace(stderr.Bytes()))
	}
	return parseFio(stdout.Bytes())
}

// parseFio reads fio's JSON, before which there may be notes.
func parseFio(out []byte) (FioLoad, error) {
	type latency struct {
		Percentile struct {
			P99 float64 `json:"99.000000"`
		} `json:"percentile"`
	}
	type direction struct {
		IOPS    float64 `json:"iops"`
		Latency latency `json:"clat_ns"`
	}
	var r struct {
		Jobs []struct {
			Read  direction `json:"read"`
			Write direction `json:"write"`
			Sync  struct {
				Latency latency `json:"lat_ns"`
			} `json:"sync"`
		} `json:"jobs"`
	}
	if err := json.Unmarshal(out[max(bytes.IndexByte(out, '{'), 0):], &r); err != nil {
		return FioLoad{}, fmt.Errorf("what fio says: %w", err)
	}
	if len(r.Jobs) != 1 {
		return FioLoad{}, fmt.Errorf("what fio says: %d jobs, want 1", len(r.Jobs))
	}
	const µs = 1000
	j := &r.Jobs[0]
	l := FioLoad{IOPS: j.Read.IOPS + j.Write.IOPS, Read: j.Read.Latency.Percentile.P99 / µs, Write: j.Write.Latency.Percentile.P99 / µs,
		Flush: j.Sync.Latency.Percentile.P99 / µs}
	if l.IOPS == 0 || l.Read == 0 || l.Write == 0 || l.Flush == 0 {
		return l, fmt.Errorf("what fio says: something was not measured: %+v", l)
	}
	return l, nil
}
