package bench

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/dustin/go-humanize"
)

// ReadResults reads results as they are printed: one JSON object after the
// other.
func ReadResults(r io.Reader) ([]Result, error) {
	var all []Result
	for d := json.NewDecoder(r); ; {
		var res Result
		err := d.Decode(&res)
		if errors.Is(err, io.EOF) {
			return all, nil
		}
		if err == nil && (res.Workload == "" || res.Blocks == 0) {
			err = errors.New("not the result of a benchmark")
		}
		if err != nil {
			return nil, fmt.Errorf("result %d, byte %d: %w", len(all)+1, d.InputOffset(), err)
		}
		all = append(all, res)
	}
}

// subject is what a line of the table is about.
type subject struct {
	Spec
	inPlace, readAhead, reflink bool
	window                      int64
	io                          string
}

// WriteMarkdown writes a table with a line for each workload and back end.
// Results with slower flushes stand in the line of those without.
func WriteMarkdown(w io.Writer, results []Result) error {
	var order []subject
	plain, slow := map[subject]Result{}, map[subject]Result{}
	for _, r := range results {
		s := subject{r.Spec, r.InPlace, r.ReadAhead, r.Reflink, r.WindowBytes, r.IO}
		if r.FlushDelayMS > 0 {
			slow[s] = r
			continue
		}
		if _, again := plain[s]; !again {
			order = append(order, s)
		}
		plain[s] = r
	}
	head := []string{"workload", "I/O", "snapmerge, s", "floor, s", "ratio", "qemu-img, s", "ratio", "windows", "flushes",
		"slow flushes: s", "floor, s", "ratio", "CPU, s/GiB", "switches/GiB", "system calls/GiB", "peak RSS, MiB"}
	line := func(cells []string) error {
		_, err := fmt.Fprintf(w, "| %s |\n", strings.Join(cells, " | "))
		return err
	}
	rule := strings.Split(strings.Repeat("--- ", 2)+strings.Repeat("---: ", len(head)-2), " ")
	if err := errors.Join(line(head), line(rule[:len(head)])); err != nil {
		return err
	}
	for _, s := range order {
		r := plain[s]
		gib := float64(r.Blocks*bs) / (1 << 30)
		cells := []string{s.label(), r.IO, seconds(r.Seconds, r.SecondsMin, r.SecondsMax)}
		cells = append(cells, seconds(r.FloorSeconds, r.FloorSecondsMin, r.FloorSecondsMax), ratio(r.FloorRatio))
		cells = append(cells, seconds(r.QemuSeconds, r.QemuSecondsMin, r.QemuSecondsMax), ratio(r.QemuRatio))
		cells = append(cells, fmt.Sprint(r.Windows), fmt.Sprint(r.Flushes))
		d := slow[s]
		cells = append(cells, seconds(d.Seconds, d.SecondsMin, d.SecondsMax),
			seconds(d.FloorSeconds, d.FloorSecondsMin, d.FloorSecondsMax), ratio(d.FloorRatio))
		cells = append(cells, fmt.Sprintf("%.2f", r.CPUSeconds/gib), perGiB(r.ContextSwitches, gib), perGiB(r.Syscalls, gib), fmt.Sprint(r.PeakRSS/mib))
		if err := line(cells); err != nil {
			return err
		}
	}
	for _, s := range order {
		r := plain[s]
		if r.Scaling == 0 {
			continue
		}
		_, err := fmt.Fprintf(w, "\nScaling of %s, %s: %.2f s on one processor, all are %.2f times as fast; bare unpacking of the same data %.2f times: ratio %.2f.\n",
			s.label(), r.IO, r.OneProcessorSeconds, r.Scaling, r.BareScaling, r.ScalingRatio)
		if err != nil {
			return err
		}
	}
	return nil
}

func (s subject) label() string {
	parts := []string{string(s.Workload), fmt.Sprintf("%d ops", s.Ops)}
	switch s.Workload {
	case CopyShift, CopyShiftDown:
		if s.Distance > 1 {
			parts = append(parts, fmt.Sprintf("distance %d", s.Distance))
		}
	case Incremental, Full:
		parts = append(parts, "of up to "+humanize.IBytes(uint64(s.MaxBlock)), s.Compression, "in "+humanize.IBytes(uint64(s.Size)))
	case RandCopy:
		parts = append(parts, "in "+humanize.IBytes(uint64(s.Size)))
	}
	if s.inPlace {
		parts = append(parts, "in place")
	}
	if s.reflink {
		parts = append(parts, "reflink")
	}
	if !s.readAhead {
		parts = append(parts, "read-ahead off")
	}
	return strings.Join(parts, ", ")
}

func seconds(mid, low, high float64) string {
	if mid == 0 {
		return ""
	}
	return fmt.Sprintf("%.2f (%.2f–%.2f)", mid, low, high)
}

func ratio(r float64) string {
	if r == 0 {
		return ""
	}
	return fmt.Sprintf("%.2f", r)
}

func perGiB(n int64, gib float64) string {
	if n == 0 {
		return ""
	}
	return fmt.Sprintf("%.0f", float64(n)/gib)
}
