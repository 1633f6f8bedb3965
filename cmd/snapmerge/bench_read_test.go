package main

import (
	"os"
	"strings"
	"testing"
)

// TestBenchRead: every mode is measured with every length of requests, all bytes
// are right, and nothing is left behind.
func TestBenchRead(t *testing.T) {
	for _, args := range []string{
		"--size 4MiB",
		"--size 4MiB --max-block 4KiB --compression zstd --runs 2 --read-ahead-window 128KiB --read-ahead-max-window 1MiB --read-ahead-memory 256KiB",
		"--workload incremental --size 32MiB --max-block 4KiB",
		"--workload copyshift --size 4MiB --max-block 4KiB --read-ahead-batch 192KiB",
	} {
		t.Run(args, func(t *testing.T) {
			dir := t.TempDir()
			o := sm(t, append([]string{"bench", "read", "--json", "--quiet", "--dir", dir, "--request", "4KiB,128KiB"}, strings.Fields(args)...)...).want(t, 0).objects(t)
			if len(o) != 12 {
				t.Fatalf("%d results, want 6 for each of 2 lengths", len(o))
			}
			for i, r := range o {
				wantKeys(t, r, "workload", "mode", "request", "transport", "verified", "seconds", "mib_s", "p99_us", "versus_none", "versus_sync", "versus_merged", "hits")
				mode := []string{"none", "sync", "async", "merged", "merged-async", "none-again"}[i%6]
				if r["mode"] != mode || r["request"] != []float64{4096, 131072}[i/6] || r["verified"] != true {
					t.Errorf("result %d: %v", i, r)
				}
				// In the background it may come too late for every read, on a busy machine.
				async := mode == "async" || mode == "merged-async"
				if hits := r["hits"].(float64); !async && (hits > 0) != (mode == "sync") {
					t.Errorf("%s: %v hits", mode, hits)
				}
			}
			if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
				t.Errorf("left behind: %v, %v", left, err)
			}
		})
	}
}

// TestBenchReadMixed: every mode is loaded.
func TestBenchReadMixed(t *testing.T) {
	dir := t.TempDir()
	args := []string{"bench", "read", "--json", "--quiet", "--dir", dir, "--request", "4KiB,128KiB", "--size", "4MiB", "--mixed", "20ms"}
	o := sm(t, args...).want(t, 0).objects(t)
	if len(o) != 8 {
		t.Fatalf("%d results, want 4 for each of 2 lengths", len(o))
	}
	for i, r := range o {
		if r["mode"] != []string{"none", "sync", "async", "none-again"}[i%4] || r["request"] != []float64{4096, 131072}[i/4] {
			t.Errorf("result %d: %v", i, r)
		}
		for _, k := range []string{"p99_us", "p99_versus_none", "p99_versus_sync", "sequential_mib_s", "sequential_p50_us", "sequential_p99_us", "sequential_p99_versus_sync", "random_s", "random_p99_us", "random_p99_versus_none"} {
			if n, ok := r[k].(float64); !ok || n <= 0 {
				t.Errorf("result %d: %s is %v", i, k, r[k])
			}
		}
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

func TestBenchReadUsage(t *testing.T) {
	for _, c := range []struct{ args, text string }{
		{"--runs 0", "--runs"},
		{"--mixed 1ms", "--mixed"},
		{"--request 100", "512"},
		{"--request 4KiB,4KiB", "different"},
		{"--size 100", "4096"},
		{"--read-ahead-window 100KiB", "64 KiB"},
		{"--transport usb", "dm-user"},
	} {
		sm(t, append([]string{"bench", "read"}, strings.Fields(c.args)...)...).want(t, 2, c.text)
	}
	dir := t.TempDir()
	put(t, dir, "unmerged", nil)
	sm(t, "bench", "read", "--size", "1MiB", "--dir", dir).want(t, 1, "unmerged", "not overwritten")
}
