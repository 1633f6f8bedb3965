package fuseloop

import (
	"encoding/json"
	"fmt"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/snapmerge/snapmerge/pkg/transport"
	"github.com/snapmerge/snapmerge/test/devicetest"
)

// fioResult is what we read of fio's JSON output.
type fioResult struct {
	Jobs []struct {
		Error int    `json:"error"`
		Name  string `json:"jobname"`
		Read  fioSide
		Write fioSide
	}
}

type fioSide struct {
	IOBytes int64   `json:"io_bytes"`
	IOPS    float64 `json:"iops"`
	BW      float64 `json:"bw"` // KiB/s
	Lat     struct {
		Max float64 `json:"max"` // ns
	} `json:"lat_ns"`
}

// longest is the longest latency of any request.
func (r *fioResult) longest() time.Duration {
	var ns float64
	for _, j := range r.Jobs {
		ns = max(ns, j.Read.Lat.Max, j.Write.Lat.Max)
	}
	return time.Duration(ns)
}

func needFio(t testing.TB) {
	t.Helper()
	if _, err := exec.LookPath("fio"); err != nil {
		t.Skip("needs fio")
	}
}

// parseFio reads fio's JSON, which warnings may precede.
func parseFio(out []byte) (*fioResult, error) {
	s := string(out)
	if i := strings.Index(s, "{"); i >= 0 {
		s = s[i:]
	}
	var r fioResult
	if err := json.NewDecoder(strings.NewReader(s)).Decode(&r); err != nil {
		return nil, fmt.Errorf("fio's output: %w: %s", err, out)
	}
	if len(r.Jobs) == 0 {
		return nil, fmt.Errorf("fio's output has no job: %s", out)
	}
	return &r, nil
}

// BenchmarkFio compares the device, and one that passes through if the kernel can do
// that, with a plain loop device on the same file. Run it with -benchtime 1x; a round is
// three runs of each, taking turns.
func BenchmarkFio(b *testing.B) {
	needRoot(b)
	needFio(b)
	// As the node plugin has it: see Prepare of package driver.
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(max(16, runtime.GOMAXPROCS(0))))
	path := imageFile(b, 1<<30)
	backend, err := devicetest.OpenFile(path)
	if err != nil {
		b.Fatal(err)
	}
	d, err := New(nil).Create(b.Context(), "bench", backend, transport.Options{})
	if err != nil {
		b.Fatal(err)
	}
	defer closeDevice(b, d)
	through := ""
	if New(nil).Passthrough() == nil {
		d, err := New(nil).Create(b.Context(), "bench through", backend, throughTo(path))
		if err != nil {
			b.Fatal(err)
		}
		defer closeDevice(b, d)
		through = d.Path()
	}
	out, err := exec.Command("losetup", "--direct-io=on", "--sector-size", "4096", "--find", "--show", path).CombinedOutput()
	if err != nil {
		b.Fatalf("losetup: %v: %s", err, out)
	}
	plain := strings.TrimSpace(string(out))
	defer exec.Command("losetup", "-d", plain).Run()

	for _, w := range []struct{ rw, bs, depth string }{
		{"randread", "4k", "1"},
		{"randread", "4k", "32"},
		{"randwrite", "4k", "1"},
		{"randwrite", "4k", "32"},
		{"read", "1m", "8"},
		{"write", "1m", "8"},
	} {
		b.Run(fmt.Sprintf("%s-%s-QD%s", w.rw, w.bs, w.depth), func(b *testing.B) {
			run := func(dev string) float64 {
				out, err := exec.Command("fio", "--name=x", "--filename="+dev, "--direct=1", "--ioengine=io_uring",
					"--rw="+w.rw, "--bs="+w.bs, "--iodepth="+w.depth, "--runtime=3", "--time_based",
					"--norandommap", "--randrepeat=0", "--output-format=json").Output()
				if err != nil {
					b.Fatalf("fio: %v: %s", err, out)
				}
				r, err := parseFio(out)
				if err != nil {
					b.Fatal(err)
				}
				return r.Jobs[0].Read.IOPS + r.Jobs[0].Write.IOPS
			}
			for range b.N {
				var ours, theirs, past []float64
				for range 3 {
					theirs = append(theirs, run(plain))
					ours = append(ours, run(d.Path()))
					if through != "" {
						past = append(past, run(through))
					}
				}
				slices.Sort(ours)
				slices.Sort(theirs)
				b.ReportMetric(ours[1], "iops")
				b.ReportMetric(theirs[1], "plain-iops")
				b.ReportMetric(ours[1]/theirs[1], "ratio")
				if slices.Sort(past); through != "" {
					b.ReportMetric(past[1], "through-iops")
					b.ReportMetric(past[1]/theirs[1], "through-ratio")
				}
			}
			b.ReportMetric(0, "ns/op")
		})
	}
}
