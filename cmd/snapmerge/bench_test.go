package main

import (
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/snapmerge/snapmerge/pkg/bench"
)

var mergeKeys = []string{"done", "seconds", "ops", "blocks", "bytes_read", "bytes_written", "scratch_bytes", "flushes", "windows", "io", "resumes"}

// TestBenchMerge: every workload, small, in all its forms, is merged to the byte
// and leaves nothing behind.
func TestBenchMerge(t *testing.T) {
	for _, c := range []struct {
		args string
		ops  float64
		// scratch tells whether there must be any (1), none (-1), or either.
		scratch int
	}{
		{"--workload copyshift --ops 3000", 3000, 1},
		{"--workload copyshift --ops 3000 --io sync", 3000, 1},
		{"--workload copyshift --ops 3000 --in-place", 3000, 1},
		{"--workload copyshift --ops 300 --read-ahead off", 300, -1},
		{"--workload copyshift --ops 3000 --window 1MiB --distance 256", 3000, -1},
		{"--workload copyshift --ops 3000 --window 1MiB --distance 128", 3000, -1},
		{"--workload copyshift --ops 3000 --window 1MiB --distance 127", 3000, 1},
		{"--workload copyshift --ops 3000 --window 1MiB --distance 300 --reflink", 3000, -1},
		{"--workload copyshift --size 1MiB", 255, 1},
		{"--workload copyshift --size 4MiB --ops 5", 5, 1},
		{"--workload copyshift --ops 1", 1, -1},
		{"--workload copyshift-down --ops 3000", 3000, 1},
		{"--workload copyshift-down --ops 3000 --format 2", 3000, 1},
		{"--workload copyshift-down --ops 1000 --distance 7 --window 64KiB", 1000, 1},
		{"--workload incremental --size 32MiB", 1200, 1},
		{"--workload incremental --size 32MiB --ops 4096 --compression zstd,1 --seed 7", 4096, 1},
		{"--workload incremental --size 32MiB --format 2 --compression gz", 1200, 1},
		{"--workload incremental --size 32MiB --in-place --io sync", 1200, 1},
		{"--workload incremental --size 32MiB --read-ahead off --seed 18446744073709551615", 1200, -1},
		{"--workload full --size 4MiB", 1024, -1},
		{"--workload full --ops 33 --max-block 64KiB --compression zstd", 33, -1},
		{"--workload full --size 4MiB --max-block 256KiB --compression gz,1 --rate 1000", 16, -1},
		{"--workload full --size 4MiB --compression none --in-place", 1024, -1},
		{"--workload randcopy --size 8MiB", 512, -1},
		{"--workload randcopy --size 8MiB --ops 1024 --flush-delay 1ms", 1024, -1},
	} {
		t.Run(c.args, func(t *testing.T) {
			dir := t.TempDir()
			args := append([]string{"bench", "merge", "--json", "--quiet", "--dir", dir}, strings.Fields(c.args)...)
			o := sm(t, args...).want(t, 0).object(t)
			wantKeys(t, o, append(mergeKeys, "workload", "verified", "runs", "seconds_min", "seconds_max")...)
			if o["done"] != true || o["verified"] != true {
				t.Errorf("result %v", o)
			}
			if o["ops"] != c.ops {
				t.Errorf("%v ops, want %v", o["ops"], c.ops)
			}
			if s := o["scratch_bytes"].(float64); c.scratch > 0 && s == 0 || c.scratch < 0 && s > 0 {
				t.Errorf("%v bytes of scratch", s)
			}
			if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
				t.Errorf("left behind: %v, %v", left, err)
			}
		})
	}
}

// TestBenchSeed: a seed fixes every byte, and another one changes them.
func TestBenchSeed(t *testing.T) {
	make := func(seed string) [3]string {
		dir := t.TempDir()
		sm(t, "bench", "merge", "--workload", "incremental", "--size", "8MiB", "--seed", seed, "--dir", dir, "--generate-only", "-q").want(t, 0)
		var all [3]string
		for i, name := range []string{"base.img", "cow.img", "expected.img"} {
			all[i] = string(get(t, filepath.Join(dir, name)))
		}
		return all
	}
	one, again, two := make("1"), make("1"), make("2")
	for i := range one {
		if one[i] != again[i] || one[i] == two[i] {
			t.Errorf("file %d: same with the same seed %v, with another one %v", i, one[i] == again[i], one[i] == two[i])
		}
	}
}

// TestBenchFiles: what is kept is what the other commands take, and can be used
// again, but is never overwritten.
func TestBenchFiles(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "new")
	args := []string{"bench", "merge", "--workload", "incremental", "--size", "8MiB", "--dir", dir, "--json", "--quiet"}
	o := sm(t, append(args, "--generate-only")...).want(t, 0).object(t)
	wantKeys(t, o, "workload", "size", "seed", "base", "cow", "expected")
	base, cow, expected := o["base"].(string), o["cow"].(string), o["expected"].(string)
	sm(t, "cow", "verify", cow, "--base", base, "--target", expected).want(t, 0)
	pristine := get(t, base)

	sm(t, args...).want(t, 1, base, "not overwritten")
	sm(t, append(args, "--generate-only")...).want(t, 1, base, "not overwritten")
	wantSame(t, "the base", get(t, base), pristine)

	r := sm(t, append(args, "--reuse", "--runs", "2", "--io", "sync,auto")...).want(t, 0).objects(t)
	if len(r) != 2 || r[0]["io"] != "sync" || r[0]["runs"] != 2.0 || r[1]["verified"] != true {
		t.Errorf("results %v", r)
	}
	wantSame(t, "the base", get(t, base), get(t, expected))
	sm(t, append(args, "--reuse", "--seed", "2")...).want(t, 2, "bench.json", "reused")
	sm(t, append(args, "--dir", t.TempDir(), "--reuse")...).want(t, 2, "bench.json", "reused")
	put(t, dir, "bench.json", []byte("{"))
	sm(t, append(args, "--reuse")...).want(t, 2, "bench.json", "reused")
}

func TestBenchDifference(t *testing.T) {
	for _, damage := range []struct {
		name string
		do   func(t *testing.T, dir string)
		text []string
	}{
		{"expected", func(t *testing.T, dir string) {
			flip(t, filepath.Join(dir, "expected.img"), 300*4096+17)
		}, []string{"byte 1228800 (block 300)", "base.img", "expected.img"}},
		{"last byte", func(t *testing.T, dir string) {
			flip(t, filepath.Join(dir, "expected.img"), 8<<20-1)
		}, []string{"block 2047"}},
		{"length", func(t *testing.T, dir string) {
			check(t, os.Truncate(filepath.Join(dir, "expected.img"), 8<<20-4096))
		}, []string{"bytes"}},
	} {
		t.Run(damage.name, func(t *testing.T) {
			dir := t.TempDir()
			args := []string{"bench", "merge", "--workload", "incremental", "--size", "8MiB", "--dir", dir, "--json", "--quiet"}
			sm(t, append(args, "--generate-only")...).want(t, 0)
			damage.do(t, dir)
			if r := sm(t, append(args, "--reuse")...).want(t, 4, damage.text...); r.stdout != "" {
				t.Errorf("stdout %q", r.stdout)
			}
		})
	}
}

func flip(t testing.TB, path string, at int) {
	t.Helper()
	b := get(t, path)
	b[at] ^= 1
	check(t, os.WriteFile(path, b, 0o600))
}

func TestBenchUsage(t *testing.T) {
	for _, c := range []struct{ args, text string }{
		{"", "workload"},
		{"--workload", "workload"},
		{"--workload copyshift_up", "copyshift-down"},
		{"--workload full --size 5000", "size of 5000"},
		{"--workload full --size 1MiB --ops 7", "do not fill"},
		{"--workload full --size 1028KiB --max-block 64KiB", "do not fill"},
		{"--workload full --max-block 12KiB", "12288"},
		{"--workload full --max-block 512KiB", "524288"},
		{"--workload full --max-block 64KiB --format 2", "format 2"},
		{"--workload full --format 1", "format 1"},
		{"--workload full --compression brotli", "brotli"},
		{"--workload full --compression lzma", "lzma"},
		{"--workload full --compression gz,10", "1 to 9"},
		{"--workload full --distance 2", "distance"},
		{"--workload copyshift --distance 0", "distance"},
		{"--workload copyshift --ops 0", "ops"},
		{"--workload full --size 2TiB", "1 TiB"},
		{"--workload copyshift --size 1MiB --ops 256", "room for 1 to 255"},
		{"--workload copyshift --size 1MiB --distance 256", "room for 1 to 0"},
		{"--workload copyshift --ops -1", "-1 ops"},
		{"--workload copyshift --distance -1", "distance of -1"},
		{"--workload copyshift --seed -1", "seed"},
		{"--workload randcopy --size 1MiB --ops 129", "room for 1 to 128"},
		{"--workload incremental --size 1MiB --ops 129", "room for 1 to 128"},
		{"--workload incremental --size 4KiB", "room for 1 to 0"},
		{"--workload randcopy --io aio", "uring"},
		{"--workload randcopy --io sync,sync", "uring"},
		{"--workload randcopy --window 5000", "5000"},
		{"--workload randcopy --window 1MiB --in-place", "in-place window"},
		{"--workload randcopy --read-ahead off --in-place", "in-place read-ahead"},
		{"--workload randcopy --read-ahead maybe", "on, off"},
		{"--workload randcopy --runs 0", "--runs 0"},
		{"--workload randcopy --runs 101", "--runs 101"},
		{"--workload randcopy --flush-delay 5", "flush-delay"},
		{"--workload randcopy --flush-delay -5ms", "--flush-delay -5ms"},
		{"--workload randcopy --compare dm-snapshot", "qemu-img"},
		{"--workload randcopy --reuse", "--dir"},
		{"--workload randcopy --floor --read-ahead off", "--floor"},
		{"--workload randcopy --scaling", "--scaling"},
		{"--workload randcopy --compare qemu-img --qemu-cluster 12KiB", "12288"},
		{"--workload randcopy --compare qemu-img --qemu-cluster 512", "--qemu-cluster 512"},
		{"--workload randcopy --reuse --generate-only --dir x", "generate-only reuse"},
		{"--workload randcopy more", "more"},
	} {
		t.Run(c.args, func(t *testing.T) {
			t.Setenv("TMPDIR", "/nonexistent") // nothing is made
			if r := sm(t, append([]string{"bench", "merge"}, strings.Fields(c.args)...)...).want(t, 2, c.text, "--help)"); r.stdout != "" {
				t.Errorf("stdout %q", r.stdout)
			}
		})
	}
	sm(t, "bench").want(t, 2, "command is missing")
}

// TestBenchBeside: what is measured beside ours, and said of it.
func TestBenchBeside(t *testing.T) {
	if _, err := exec.LookPath("qemu-img"); err != nil {
		t.Skipf("needs qemu-img: %v", err)
	}
	for _, w := range bench.Workloads {
		dir := t.TempDir()
		args := []string{"bench", "merge", "--workload", string(w), "--size", "8MiB", "--dir", dir, "--quiet", "--floor", "--compare", "qemu-img", "--runs", "2"}
		o := sm(t, append(args, "--json")...).want(t, 0).object(t)
		wantKeys(t, o, append(mergeKeys, "workload", "verified")...)
		for _, other := range []string{"floor", "qemu_img"} {
			s, ok := o[other+"_seconds"].(float64)
			ratio, _ := o[other+"_ratio"].(float64)
			if !ok || s <= 0 || math.Abs(ratio-o["seconds"].(float64)/s) > 1e-9 {
				t.Errorf("%s: %s: %v", w, other, o)
			}
			if o[other+"_seconds_min"].(float64) > s || o[other+"_seconds_max"].(float64) < s {
				t.Errorf("%s: %s: %v", w, other, o)
			}
		}
		if r := sm(t, args...).want(t, 0); !strings.Contains(r.stdout, "qemu-img") || !strings.Contains(r.stdout, "floor") {
			t.Errorf("%s: %q", w, r.stdout)
		}
		if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
			t.Errorf("%s: left behind: %v, %v", w, left, err)
		}
	}
}

// TestBenchScaling: what one processor takes, and what unpacking alone.
func TestBenchScaling(t *testing.T) {
	args := []string{"bench", "merge", "--workload", "full", "--size", "8MiB", "--compression", "gz", "--scaling", "--dir", t.TempDir(), "-q"}
	o := sm(t, append(args, "--json")...).want(t, 0).object(t)
	for _, key := range []string{"one_processor_seconds", "scaling", "bare_scaling", "scaling_ratio"} {
		if v, _ := o[key].(float64); v <= 0 {
			t.Errorf("%s: %v", key, o[key])
		}
	}
	if r := sm(t, args...).want(t, 0); !strings.Contains(r.stdout, "on one processor") {
		t.Errorf("%q", r.stdout)
	}
}

func TestBenchWithoutQemu(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	dir := t.TempDir()
	sm(t, "bench", "merge", "--workload", "full", "--size", "1MiB", "--compare", "qemu-img", "--dir", dir, "-q").want(t, 1, "qemu-img", "qemu-utils")
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("made all the same: %v, %v", left, err)
	}
}

// TestBenchQemuFails: what qemu-img says is passed on.
func TestBenchQemuFails(t *testing.T) {
	bin := t.TempDir()
	check(t, os.WriteFile(filepath.Join(bin, "qemu-img"), []byte("#!/bin/sh\necho no such luck >&2\nexit 1\n"), 0o700))
	t.Setenv("PATH", bin)
	sm(t, "bench", "merge", "--workload", "full", "--size", "1MiB", "--compare", "qemu-img", "-q").want(t, 1, "qemu-img create", "no such luck")
	// One that makes its files and does nothing else is found out by its base.
	check(t, os.WriteFile(filepath.Join(bin, "qemu-img"), []byte("#!/bin/sh\nfor last; do :; done\n: >>\"$last\"\n"), 0o700))
	sm(t, "bench", "merge", "--workload", "full", "--size", "1MiB", "--compare", "qemu-img", "-q").want(t, 4, "spare.img")
}
