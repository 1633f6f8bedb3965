package bench

import (
	"errors"
	"strings"
	"testing"
)

func TestParseFio(t *testing.T) {
	const good = `fio: this note comes first
{"jobs": [{
	"read":  {"iops": 100.5, "clat_ns": {"mean": 1120, "N": 100, "bins": {"5000": 2, "1000": 97, "9000": 1}}},
	"write": {"iops": 99.5, "clat_ns": {"bins": {}}},
	"sync":  {"lat_ns": {"bins": {"70": 1}}}
}, {"read": {"iops": 7, "clat_ns": {"bins": {"1000": 20, "8000": 80}}}}]}`
	jobs, err := parseFio([]byte(good))
	if err != nil || len(jobs) != 2 {
		t.Fatalf("%+v, %v", jobs, err)
	}
	r := jobs[0].Read
	for _, c := range []struct {
		what      string
		got, want float64
	}{
		{"rate", r.IOPS, 100.5},
		{"mean", r.Latency.Mean, 1120},
		{"requests", r.Latency.N, 100},
		{"half of the reads", fioTime(0.5, r.Latency), 1000e-9},
		{"98 of 100", fioTime(0.98, r.Latency), 5000e-9},
		{"99 of 100", fioTime(0.99, r.Latency), 9000e-9},
		{"nothing", fioTime(0.99, jobs[0].Write.Latency), 0},
		{"flushes", fioTime(0.99, jobs[0].Sync.Latency), 70e-9},
		{"of both", fioTime(0.6, r.Latency, jobs[1].Read.Latency), 8000e-9},
	} {
		if c.got != c.want {
			t.Errorf("%s: %v, want %v", c.what, c.got, c.want)
		}
	}
	for _, bad := range []string{"", "no JSON", `{"jobs": []}`, strings.Replace(good, "100.5", "true", 1)} {
		if jobs, err := parseFio([]byte(bad)); err == nil {
			t.Errorf("%q: %+v", bad, jobs)
		}
	}
}

func TestNoFio(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	if _, err := MeasureForeground(t.Context(), ForegroundOptions{}); !errors.Is(err, ErrNoFio) {
		t.Error(err)
	}
}
