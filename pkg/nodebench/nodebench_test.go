package nodebench

import (
	"errors"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestParsePgbench(t *testing.T) {
	log := []byte("0 199 2241 0 1175850568 995598\n1 0 900.5 0 1175850569 608\n")
	for from, want := range map[time.Time][]float64{
		{}: {2241, 900.5}, time.Unix(1175850568, 995_597_999): {2241, 900.5}, time.Unix(1175850568, 995_598_000): {900.5}, time.Unix(1175850570, 0): nil,
	} {
		if got, err := parsePgbench(log, from); err != nil || !slices.Equal(got, want) {
			t.Errorf("from %v: %v, %v", from, got, err)
		}
	}
	for _, bad := range []string{"0 1 2\n", "0 199 failed 0 1175850568 995598\n", "0 199 2241 0 later 995598\n", "0 199 2241 0 1175850568 -\n"} {
		if got, err := parsePgbench([]byte(bad), time.Time{}); err == nil {
			t.Errorf("%q: %v", bad, got)
		}
	}
}

// TestJudge: the limits hold, unless the noise is worse than they are.
func TestJudge(t *testing.T) {
	for _, c := range []struct {
		name                 string
		rate, p99            float64 // ratios beside a merge
		noiseRate, noiseP99  float64
		met                  bool
		otherP99, otherNoise float64
	}{
		{"as without", 1, 1, 1, 1, true, 1, 1},
		{"at the limits", 0.85, 1.5, 1, 1, true, 1, 1},
		{"too slow", 0.84, 1, 1, 1, false, 1, 1},
		{"too late", 1, 1.51, 1, 1, false, 1, 1},
		{"the other one too late", 1, 1, 1, 1, false, 1.51, 1},
		{"late in noise", 1, 2.2, 1, 2, true, 1, 1},
		{"too late for the noise", 1, 2.4, 1, 2, false, 1, 1},
		{"slow in noise", 0.7, 1, 0.8, 1, true, 1, 1},
		{"noise of another kind", 1, 1, 1, 1, false, 2, 1},
	} {
		f := &foreground{o: ForegroundOptions{Pairs: 3}}
		of := func(rate, p99, other float64) []sample {
			s := sample{rate: 1000 * rate, p99: map[string]float64{"read": 100 * p99, "flush": 50 * other}}
			far := sample{rate: 1e6 * rate, p99: map[string]float64{"read": 1e6 * p99, "flush": 1e6 * other}} // of a slow turn
			return []sample{s, far, s}
		}
		all := f.results(map[string][]sample{NoMerge: of(1, 1, 1), Merge: of(c.rate, c.p99, c.otherP99), NoMergeAgain: of(c.noiseRate, c.noiseP99, c.otherNoise)}, true)
		if len(all) != 3 || all[1].Kind != Merge || all[1].Met == nil || all[0].Met != nil {
			t.Fatalf("%s: %+v", c.name, all)
		}
		if *all[1].Met != c.met {
			t.Errorf("%s: met %v", c.name, *all[1].Met)
		}
		if all[0].RateRatio != 1 || all[0].P99["read"] != 100 {
			t.Errorf("%s: %+v", c.name, all[0])
		}
		var text strings.Builder
		if err := WriteForeground(&text, Fio, all, time.Second); err != nil || strings.Contains(text.String(), "not met") == c.met {
			t.Errorf("%s: %v\n%s", c.name, err, text.String())
		}
	}
}

func TestNoQemu(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	if _, err := newQemu(t.TempDir()); !errors.Is(err, ErrNoQemu) {
		t.Error(err)
	}
}
