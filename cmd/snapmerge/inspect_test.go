package main

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"runtime/metrics"
	"strings"
	"testing"
	"time"

	"github.com/snapmerge/snapmerge/pkg/blockio"
	"github.com/snapmerge/snapmerge/pkg/cow"
	"github.com/snapmerge/snapmerge/pkg/offline"
	"github.com/snapmerge/snapmerge/test/fixtures"
)

// TestInspectFixtures compares what inspect finds with what the makers of the
// files say of them.
func TestInspectFixtures(t *testing.T) {
	fixtures.Each(t, func(t *testing.T, c fixtures.Case) {
		file := put(t, t.TempDir(), "cow.img", c.COW)
		r := sm(t, "cow", "inspect", "--json", file).want(t, 0)
		wantKeys(t, r.object(t), "file", "file_bytes", "version", "header_bytes", "compression", "ops", "blocks", "payload", "image", "labels", "sequence", "merge", "scratch")
		var s offline.Inspection
		check(t, json.Unmarshal([]byte(r.stdout), &s))
		i := c.Info
		equal(t, "version", s.Version, fmt.Sprintf("%d.0", i.Header.Major))
		equal(t, "header_bytes", int(s.HeaderBytes), i.Header.HeaderSize)
		equal(t, "merged", s.Merge.NumMergeOps, i.Header.NumMergeOps)
		if i.MergeOps > 0 {
			equal(t, "merge ops", s.Merge.Ops, uint64(i.MergeOps))
			for typ, blocks := range map[string]int{"copy": i.Copy, "xor": i.Xor, "replace": i.Replace, "zero": i.Zero} {
				equal(t, typ, s.Blocks[typ], uint64(blocks))
			}
			equal(t, "bytes written", s.Image.WrittenBytes, uint64(i.Copy+i.Xor+i.Replace+i.Zero)*4096)
		}
		if s.Blocks["replace"] > 0 && c.Name != "c-full-v2-none-4k" {
			equal(t, "compression", s.Compression, i.Compression)
		}
		if s.Image.TargetBytes > uint64(len(c.Base)) || s.Image.SourceBytes > uint64(len(c.Base)) {
			t.Errorf("image %+v is larger than the base of %d bytes", s.Image, len(c.Base))
		}
		switch {
		case s.Merge.NumMergeOps == 0:
			equal(t, "percent", s.Merge.Percent, 0)
		case s.Merge.NumMergeOps == s.Merge.Ops:
			equal(t, "percent", s.Merge.Percent, 100)
		case s.Merge.Percent <= 0 || s.Merge.Percent >= 100:
			t.Errorf("percent %v in the middle", s.Merge.Percent)
		}
		if (s.Scratch == nil) != (i.Header.Major == 1 || i.Header.BufferSize == 0) {
			t.Errorf("scratch %+v, the header has %d bytes", s.Scratch, i.Header.BufferSize)
		}
		if s.Scratch != nil && i.Header.RAState != nil {
			equal(t, "scratch state", s.Scratch.State, []string{"idle", "in progress", "done"}[*i.Header.RAState])
			equal(t, "scratch valid", s.Scratch.Valid, *i.Header.RAState == 2)
		}

		// The list of ops agrees with the counts.
		list := sm(t, "cow", "inspect", "--json", "--ops", file).want(t, 0).objects(t)[1:]
		ops := map[string]uint64{}
		for _, op := range list {
			wantKeys(t, op, "offset", "type", "new_block", "blocks", "source", "data_offset", "data_length", "compression")
			ops[op["type"].(string)]++
		}
		equal(t, "ops listed", fmt.Sprint(ops), fmt.Sprint(s.Ops))

		text := sm(t, "cow", "inspect", "--ops", file).want(t, 0).stdout
		if n := strings.Count(text, "\n"); n != len(list)+15 {
			t.Errorf("%d lines of text for %d ops:\n%.2000s", n, len(list), text)
		}
	})
}

func equal[T comparable](t testing.TB, what string, got, want T) {
	t.Helper()
	if got != want {
		t.Errorf("%s is %v, want %v", what, got, want)
	}
}

// TestInspectUnfinished: a file whose writing was cut off tells where it can be
// opened.
func TestInspectUnfinished(t *testing.T) {
	fixtures.Each(t, func(t *testing.T, c fixtures.Case) {
		if c.Unfinished == nil {
			return
		}
		file := put(t, t.TempDir(), "cow.img", c.Unfinished)
		if c.Info.Header.Major < 3 { // version 3 does not show that it is unfinished
			sm(t, "cow", "inspect", file).want(t, 3, file, "byte ", "--label opens it")
		}
		if r := sm(t, "cow", "inspect", file); r.code != 0 {
			_, hint, _ := strings.Cut(r.stderr, "label is ")
			hint, _, _ = strings.Cut(hint, ";")
			sm(t, "cow", "inspect", "--label", hint, file).want(t, 0)
		}
		label := fmt.Sprint(*c.Label)
		r := sm(t, "cow", "inspect", "--json", "--label", label, file).want(t, 0)
		var s offline.Inspection
		check(t, json.Unmarshal([]byte(r.stdout), &s))
		equal(t, "ops", s.Merge.Ops, uint64(c.Info.OpsAtLabel))
		if n := len(s.Labels); n == 0 || s.Labels[n-1].Label != *c.Label {
			t.Errorf("labels %+v, opened at %s", s.Labels, label)
		}
	})
}

// TestMemory: inspect and verify promise to need no more than 24 bytes an op
// and 64 MiB; 8 MiB make a tighter check.
func TestMemory(t *testing.T) {
	const ops = 1 << 20
	dir := t.TempDir()
	file := filepath.Join(dir, "cow.img")
	f, err := blockio.OS().Open(file, blockio.Create)
	check(t, err)
	w, err := cow.NewWriter(f, cow.WriterOptions{Version: 3, OpCountMax: ops})
	check(t, err)
	for i := range uint64(ops) {
		check(t, w.Copy(2*i, 2*i+1, 1)) // never two in a row
	}
	check(t, w.Finalize())
	check(t, f.Close())
	for _, args := range [][]string{{"cow", "inspect", file}, {"cow", "verify", file}} {
		runtime.GC()
		before := heap()
		peak := watchHeap(func() { sm(t, args...).want(t, 0) })
		used := int64(peak) - int64(before)
		t.Logf("%v: %d MiB, %.1f bytes an op", args[:2], used>>20, float64(used)/ops)
		if limit := int64(24*ops + 8<<20); used > limit {
			t.Errorf("%v takes %d bytes, more than %d", args[:2], used, limit)
		}
	}
	check(t, os.Remove(file))
}

// heap is the size of the heap's objects in bytes.
func heap() uint64 {
	s := []metrics.Sample{{Name: "/memory/classes/heap/objects:bytes"}}
	metrics.Read(s)
	return s[0].Value.Uint64()
}

// watchHeap returns the largest heap seen while fn ran.
func watchHeap(fn func()) (peak uint64) {
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for tick := time.NewTicker(time.Millisecond); ; {
			peak = max(peak, heap())
			select {
			case <-tick.C:
			case <-stop:
				return
			}
		}
	}()
	fn()
	close(stop)
	<-done
	return peak
}
