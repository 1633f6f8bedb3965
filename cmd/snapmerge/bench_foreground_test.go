package main

import (
	"os/exec"
	"testing"
)

func TestBenchForegroundUsage(t *testing.T) {
	for _, c := range []struct{ flag, value string }{
		{"--layers", "0"}, {"--pairs", "101"}, {"--time", "1.5s"}, {"--time", "2h"}, {"--merge-floor", "0"}, {"--workload", "walk"}, {"--size", "4097"}, {"--load", "none"}, {"--peer", "maybe"},
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

// TestBenchPods measures a second of each with a node plugin, with a file and with a
// database, and without the peer, which has many seconds of its own.
func TestBenchPods(t *testing.T) {
	needFUSE(t)
	if testing.Short() {
		t.Skip("takes a minute")
	}
	needs := map[string][]string{"fio": {"fio", "mkfs.ext4"}, "pgbench": {"initdb", "mkfs.ext4"}}
	names := map[string][]string{"fio": {"flush", "read", "write"}, "pgbench": {"transaction"}}
	for load, tools := range needs {
		t.Run(load, func(t *testing.T) {
			for _, tool := range tools {
				if _, err := exec.LookPath(tool); err != nil {
					t.Skipf("needs %s", tool)
				}
			}
			// The merge to the end goes at a rate that does not take long.
			all := start(t, "bench", "foreground", "--load", load, "--fill", "64MiB", "--time", "1s", "--pairs", "1", "--peer", "off", "--merge-floor", "50", "--json", "-q").
				wait().want(t, 0).objects(t)
			if len(all) != 6 {
				t.Fatalf("%d results", len(all))
			}
			for i, o := range all {
				kind := []string{"none", "merge", "none again"}[i%3]
				wantKeys(t, o, "beside", "compared_with", "neighbour", "pairs", "rate", "rate_ratio", "p99_us", "p99_ratio", "moved_mib_s", "ended")
				if o["beside"] != kind || o["neighbour"] != (i >= 3) || o["rate"].(float64) <= 0 || (o["met"] != nil) != (kind == "merge") {
					t.Errorf("result %v", o)
				}
				for _, name := range names[load] {
					if p, _ := o["p99_us"].(map[string]any)[name].(float64); p <= 0 {
						t.Errorf("%s: p99 %v", name, o["p99_us"])
					}
				}
				if moved := o["moved_mib_s"].(float64); (moved > 1) != (kind == "merge") {
					t.Errorf("%s: %v MiB/s", kind, moved)
				}
			}
		})
	}
}
