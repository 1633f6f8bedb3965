package main

import (
	"os"
	"strings"
	"testing"
)

// TestBenchPromotion: only with promotion something is promoted, and nothing is left
// behind.
func TestBenchPromotion(t *testing.T) {
	dir := t.TempDir()
	o := sm(t, strings.Fields("bench promotion --json --quiet --size 4MiB --hot 1MiB --warm 200ms --time 50ms --pairs 1 --merge-floor 1000 --dir "+dir)...).want(t, 0).objects(t)
	if len(o) != 3 {
		t.Fatalf("%d results, want 3", len(o))
	}
	for i, r := range o {
		wantKeys(t, r, "promotion", "pairs", "iops", "p50_us", "p99_us", "from_base", "promoted_mib", "merged_mib", "iops_ratio", "p99_ratio")
		if kind := []string{"off", "on", "off again"}[i]; r["promotion"] != kind || kind != "on" && r["promoted_mib"].(float64) > 0 {
			t.Errorf("result %d: %v", i, r)
		}
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
	for _, c := range []struct{ args, text string }{
		{"--pairs 0", "--pairs"},
		{"--time 0s", "--time"},
		{"--hot 4KiB", "--hot"},
		{"--merge-floor 0", "--merge-floor"},
		{"--size 100", "4096"},
	} {
		sm(t, append([]string{"bench", "promotion"}, strings.Fields(c.args)...)...).want(t, 2, c.text)
	}
}
