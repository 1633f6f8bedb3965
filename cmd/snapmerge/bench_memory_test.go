package main

import "testing"

func TestBenchMemoryUsage(t *testing.T) {
	for _, c := range []struct{ flag, value string }{
		{"--volumes", "0"}, {"--volumes", "1001"}, {"--time", "500ms"}, {"--size", "4097"}, {"--snapshots", "some"}, {"--workload", "walk"}, {"--limit", "none"},
	} {
		sm(t, "bench", "memory", c.flag, c.value).want(t, 2, c.value)
	}
}

// TestBenchMemory measures a few volumes that are small, and refuses what is above a
// limit.
func TestBenchMemory(t *testing.T) {
	needFUSE(t)
	if testing.Short() {
		t.Skip("takes 10 s")
	}
	args := []string{"bench", "memory", "--volumes", "3", "--size", "64MiB", "--ops", "3000", "--time", "1s", "--json", "-q", "--dir", t.TempDir()}
	all := start(t, args...).wait().want(t, 0).objects(t)
	if len(all) != 2 {
		t.Fatalf("%d results", len(all))
	}
	for i, snapshots := range []float64{1, 3} {
		o := all[i]
		// Whether a merge has got to a commit depends on who else uses the disk.
		wantKeys(t, o, "volumes", "snapshots", "ops", "staged_bytes", "loaded_bytes", "merged_bytes", "node_bytes", "keeper_bytes", "total_bytes", "merges_begun")
		if o["snapshots"] != snapshots || o["volumes"] != 3.0 || o["node_bytes"].(float64) < 5<<20 || o["keeper_bytes"].(float64) < 5<<20 {
			t.Errorf("result %v", o)
		}
		for _, k := range []string{"staged_bytes", "loaded_bytes", "merged_bytes"} {
			if v := o[k].(float64); v <= 0 || v > o["total_bytes"].(float64)+(1<<20) {
				t.Errorf("%s: %v of %v", k, v, o["total_bytes"])
			}
		}
	}
	start(t, append(args, "--snapshots", "one", "--limit", "1MiB")...).wait().want(t, 1, "more than 1.0 MiB")
}
