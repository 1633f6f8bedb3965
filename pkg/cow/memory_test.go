package cow_test

import (
	"bytes"
	"fmt"
	"io"
	"runtime"
	"runtime/metrics"
	"testing"

	"github.com/snapmerge/snapmerge/pkg/cow"
)

// heap is the size of the heap's objects in bytes, dead ones that are not swept
// yet included.
func heap() uint64 {
	s := []metrics.Sample{{Name: "/memory/classes/heap/objects:bytes"}}
	metrics.Read(s)
	return s[0].Value.Uint64()
}

// watched notes the largest heap seen at any read.
type watched struct {
	r    io.ReaderAt
	peak uint64
}

func (w *watched) ReadAt(p []byte, off int64) (int, error) {
	w.peak = max(w.peak, heap())
	return w.r.ReadAt(p, off)
}

// TestMemory loads files of many ops and checks that the heap holds no more than
// 24 bytes an op and a little, at any time. What is promised is 64 MiB more; the
// little that is really needed makes a tighter check.
func TestMemory(t *testing.T) {
	const (
		perOp  = 24
		little = 4 << 20
	)
	n := 2_000_000
	if raceDetector {
		n = 200_000
	}
	// A stride that n does not share a factor with visits all blocks.
	sequence := make([]uint32, n)
	for i := range sequence {
		sequence[i] = uint32(uint64(i) * 1_234_567 % uint64(n))
	}
	for _, tt := range []struct {
		name   string
		o      cow.WriterOptions
		script func(w *cow.Writer) error
	}{
		{"v2", cow.WriterOptions{Version: 2, ClusterOps: 1024}, func(w *cow.Writer) error {
			return steps(w.Copy(uint64(n/2), uint64(n/2+1), n/2), w.Zero(0, n/2))
		}},
		{"v3", cow.WriterOptions{Version: 3, OpCountMax: uint64(n)}, func(w *cow.Writer) error { return w.Copy(0, 1, n) }},
		{"v3-scattered", cow.WriterOptions{Version: 3, OpCountMax: uint64(n), Sequence: sequence}, func(w *cow.Writer) error {
			return w.Copy(0, uint64(n), n)
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m := newMemFile()
			if err := writeTo(m, tt.o, tt.script); err != nil {
				t.Fatal(err)
			}
			m.flushed = nil
			runtime.GC()
			before := heap()
			w := &watched{r: bytes.NewReader(m.b)}
			f, err := cow.Open(w, int64(len(m.b)), cow.OpenOptions{})
			if err != nil {
				t.Fatal(err)
			}
			table, err := f.Load()
			if err != nil {
				t.Fatal(err)
			}
			runtime.GC()
			after := heap()
			t.Log(usage("peak", w.peak, before, n), usage("after", after, before, n))
			for name, used := range map[string]uint64{"peak": w.peak, "after": after} {
				if used > before+perOp*uint64(n)+little {
					t.Error(usage(name, used, before, n))
				}
			}
			runtime.KeepAlive(table)
			runtime.KeepAlive(m)
		})
	}
	runtime.KeepAlive(sequence)
}

func usage(when string, used, before uint64, ops int) string {
	return fmt.Sprintf("%s: %.2f bytes of heap an op", when, float64(int64(used-before))/float64(ops))
}

func BenchmarkLoad(b *testing.B) {
	const n = 1_000_000
	m := newMemFile()
	if err := writeTo(m, cow.WriterOptions{Version: 3, OpCountMax: uint64(n)}, func(w *cow.Writer) error { return w.Copy(0, 1, n) }); err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		if _, err := load(m.b, nil); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/n, "ns/record")
}
