package bench

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/snapmerge/snapmerge/pkg/offline"
)

// TestTable: results go through JSON into lines, one for each workload and back
// end.
func TestTable(t *testing.T) {
	spec := Spec{Workload: Full, Size: 1 << 30}
	check(t, spec.Complete())
	r := Result{
		MergeResult: offline.MergeResult{Done: true, Seconds: 1.5, Blocks: 1 << 17, Flushes: 35, Windows: 16, IO: "uring"}, Spec: spec, Verified: true, ReadAhead: true,
		Runs: 3, SecondsMin: 1.25, SecondsMax: 2, CPUSeconds: 0.5, ContextSwitches: 100, PeakRSS: 50 << 20,
		FloorSeconds: 1, FloorSecondsMin: 1, FloorSecondsMax: 1, FloorRatio: 1.5,
	}
	slow, other, shift := r, r, r
	slow.FlushDelayMS, slow.Seconds, slow.FloorRatio = 5, 3, 2
	other.IO, other.FloorSeconds, other.FloorRatio, other.Syscalls = "sync", 0, 0, 7
	shift.Spec = Spec{Workload: CopyShift, Ops: 1000, Distance: 4}
	check(t, shift.Complete())
	shift.OneProcessorSeconds, shift.Scaling, shift.BareScaling, shift.ScalingRatio = 3, 2, 1.9, 1.05
	shift.InPlace, shift.ReadAhead, shift.QemuSeconds, shift.QemuRatio = true, false, 2, 0.75

	var text strings.Builder
	for _, r := range []Result{r, other, slow, shift} {
		b, err := json.Marshal(r)
		check(t, err)
		text.WriteString(string(b) + "\n")
	}
	results, err := ReadResults(strings.NewReader(text.String()))
	check(t, err)
	var got strings.Builder
	check(t, WriteMarkdown(&got, results))
	lines := strings.Split(strings.TrimSpace(got.String()), "\n")
	want := []string{
		"| full, 262144 ops, of up to 4.0 KiB, lz4, in 1.0 GiB | uring | 1.50 (1.25–2.00) | 1.00 (1.00–1.00) | 1.50 |  |  | 16 | 35 | 3.00 (1.25–2.00) | 1.00 (1.00–1.00) | 2.00 | 1.00 | 200 |  | 50 |",
		"| full, 262144 ops, of up to 4.0 KiB, lz4, in 1.0 GiB | sync | 1.50 (1.25–2.00) |  |  |  |  | 16 | 35 |  |  |  | 1.00 | 200 | 14 | 50 |",
		"| copyshift, 1000 ops, distance 4, in place, read-ahead off | uring | 1.50 (1.25–2.00) | 1.00 (1.00–1.00) | 1.50 | 2.00 (0.00–0.00) | 0.75 | 16 | 35 |  |  |  | 1.00 | 200 |  | 50 |",
	}
	if k := len(lines) - 1; !strings.HasPrefix(lines[k], "Scaling of copyshift, ") || !strings.HasSuffix(lines[k], "ratio 1.05.") {
		t.Errorf("scaling: %s", lines[k])
	}
	if lines = lines[:len(lines)-2]; len(lines) != 2+len(want) {
		t.Fatalf("%d lines:\n%s", len(lines), got.String())
	}
	for i, line := range lines {
		if n := strings.Count(line, " | "); n != 15 {
			t.Errorf("line %d has %d columns", i, n+1)
		}
		if i >= 2 && line != want[i-2] {
			t.Errorf("got  %s\nwant %s", line, want[i-2])
		}
	}
}

func TestReadResults(t *testing.T) {
	for _, text := range []string{"{", "[]", "{}", `{"workload":"full"}`, "nonsense"} {
		if _, err := ReadResults(strings.NewReader(text)); err == nil || !strings.Contains(err.Error(), "result 1, byte ") {
			t.Errorf("%q: %v", text, err)
		}
	}
}
