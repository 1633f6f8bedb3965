package main

import "testing"

func TestBenchForegroundUsage(t *testing.T) {
	for _, c := range []struct{ flag, value string }{
		{"--layers", "0"}, {"--pairs", "101"}, {"--time", "1.5s"}, {"--time", "2h"}, {"--merge-floor", "0"}, {"--workload", "walk"}, {"--size", "4097"},
	} {
		sm(t, "bench", "foreground", c.flag, c.value).want(t, 2, c.value)
	}
}

// TestBenchForeground measures a second of each on a volume that is small, and beside
// one.
func TestBenchForeground(t *testing.T) {
	needFUSE(t)
	for _, beside := range []string{"--neighbour=false", "--neighbour"} {
		all := sm(t, "bench", "foreground", "--dir", t.TempDir(), "--size", "16MiB", "--layers", "2", "--time", "1s", "--pairs", "1", "--json", "-q", beside).
			want(t, 0).objects(t)
		if len(all) != 4 {
			t.Fatalf("%d results", len(all))
		}
		for i, merge := range []string{"none", "paced", "none again", "unpaced"} {
			o := all[i]
			wantKeys(t, o, "merge", "neighbour", "iops", "iops_ratio", "read_p99_us", "write_p99_us", "flush_p99_us", "merge_mib_s")
			if o["merge"] != merge || o["neighbour"] != (beside == "--neighbour") || o["iops"].(float64) <= 0 || o["flush_p99_us"].(float64) <= 0 {
				t.Errorf("result %v", o)
			}
			// With a merge a second may pass without a commit, on a slow machine.
			if done := o["merge_mib_s"].(float64); done > 0.1 && (i == 0 || i == 2) {
				t.Errorf("%s: %v MiB/s", merge, done)
			}
		}
	}
	if all := sm(t, "bench", "foreground", "--dir", t.TempDir(), "--size", "16MiB", "--layers", "1", "--time", "1s", "--pairs", "1", "-q").want(t, 0); all.stdout == "" {
		t.Error("no table")
	}
}
