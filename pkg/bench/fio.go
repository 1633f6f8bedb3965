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

// findFio tells whether there is a fio, ErrNoFio if not.
func findFio() error {
	if _, err := exec.LookPath("fio"); err != nil {
		return ErrNoFio
	}
	return nil
}

// load is what fio has found: requests per second, and the time that all but one in a
// hundred took at most, in µs.
type load struct{ iops, read, write, flush float64 }

// fio reads and writes blocks of 4 KiB all over a device for that time.
func fio(ctx context.Context, device string, d time.Duration) (load, error) {
	var stdout, stderr bytes.Buffer
	c := exec.CommandContext(ctx, "fio", "--name=load", "--filename="+device, "--direct=1", "--ioengine=psync", "--rw=randrw", "--bs=4k",
		"--fsync=1", "--norandommap", "--randrepeat=0", "--time_based", fmt.Sprintf("--runtime=%d", int(d.Seconds())), "--output-format=json")
	c.Stdout, c.Stderr = &stdout, &stderr
	if err := c.Run(); err != nil {
		return load{}, fmt.Errorf("fio: %w: %s", err, bytes.TrimSpace(stderr.Bytes()))
	}
	return parseFio(stdout.Bytes())
}

// parseFio reads fio's JSON, before which there may be notes.
func parseFio(out []byte) (load, error) {
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
		return load{}, fmt.Errorf("what fio says: %w", err)
	}
	if len(r.Jobs) != 1 {
		return load{}, fmt.Errorf("what fio says: %d jobs, want 1", len(r.Jobs))
	}
	const µs = 1000
	j := &r.Jobs[0]
	l := load{iops: j.Read.IOPS + j.Write.IOPS, read: j.Read.Latency.Percentile.P99 / µs, write: j.Write.Latency.Percentile.P99 / µs,
		flush: j.Sync.Latency.Percentile.P99 / µs}
	if l.iops == 0 || l.read == 0 || l.write == 0 || l.flush == 0 {
		return l, fmt.Errorf("what fio says: something was not measured: %+v", l)
	}
	return l, nil
}
