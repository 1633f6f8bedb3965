package bench

import (
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/snapmerge/snapmerge/pkg/blockio"
	"github.com/snapmerge/snapmerge/pkg/offline"
)

// tracer records what is done to files.
type tracer struct {
	blockio.FS
	events *[]event
}

type event struct {
	file, what string
	off, n     int64
}

func (t tracer) Open(name string, flag blockio.Flag) (blockio.File, error) {
	f, err := t.FS.Open(name, flag)
	return tracedFile{f, filepath.Base(name), t.events}, err
}

type tracedFile struct {
	blockio.File
	name   string
	events *[]event
}

func (f tracedFile) add(what string, off, n int64) {
	*f.events = append(*f.events, event{f.name, what, off, n})
}

func (f tracedFile) ReadAt(p []byte, off int64) (int, error) {
	f.add("read", off, int64(len(p)))
	return f.File.ReadAt(p, off)
}

func (f tracedFile) WriteAt(p []byte, off int64) (int, error) {
	f.add("write", off, int64(len(p)))
	return f.File.WriteAt(p, off)
}

func (f tracedFile) Zero(off, n int64) error {
	f.add("zero", off, n)
	return f.File.Zero(off, n)
}

func (f tracedFile) Flush() error {
	f.add("flush", 0, 0)
	return f.File.Flush()
}

// sum adds up the bytes of events of a kind.
func sum(events []event, file, what string) (n uint64) {
	for _, e := range events {
		if e.file == file && e.what == what {
			n += uint64(e.n)
		}
	}
	return n
}

func count(events []event, what string) (n uint64) {
	for _, e := range events {
		if e.what == what {
			n++
		}
	}
	return n
}

// trace runs the floor of a merge of the spec that gave res.
func trace(t *testing.T, spec Spec, window int, res offline.MergeResult) (*images, []event, floorMoved) {
	t.Helper()
	check(t, spec.Complete())
	dir := t.TempDir()
	g := newImages(spec)
	names := floorFiles{filepath.Join(dir, "base"), filepath.Join(dir, "scratch"), filepath.Join(dir, "cow")}
	check(t, g.writeBase(t.Context(), names.base))
	check(t, g.writeCOW(t.Context(), names.cow))
	var events []event
	_, moved, err := runFloor(t.Context(), tracer{g.fs, &events}, names, newFloorSteps(g.plan, window), window, res)
	check(t, err)
	return g, events, moved
}

// TestFloorMoves: the floor moves the bytes that the engine says to have moved.
func TestFloorMoves(t *testing.T) {
	for _, spec := range []Spec{
		{Workload: CopyShift, Ops: 1000},
		{Workload: CopyShiftDown, Ops: 1000, Distance: 300},
		{Workload: Incremental, Size: 64 << 20, Seed: 3},
		{Workload: Incremental, Size: 16 << 20, Format: 2},
		{Workload: Full, Size: 66 << 20, Compression: "none"},
		{Workload: RandCopy, Size: 8 << 20},
	} {
		t.Run(string(spec.Workload), func(t *testing.T) {
			const window = 256
			check(t, spec.Complete())
			results, err := Merge(t.Context(), MergeOptions{Spec: spec, Dir: t.TempDir(), IO: []blockio.Kind{blockio.Sync}, Window: window * bs, Runs: 1})
			check(t, err)
			res := results[0].MergeResult
			g, events, moved := trace(t, spec, window, res)
			if moved.written != res.BytesWritten || moved.scratch != res.ScratchBytes || moved.flushes != res.Flushes {
				t.Errorf("moved %+v, the engine %+v", moved, res)
			}
			if n := sum(events, "base", "write"); n != moved.written {
				t.Errorf("%d bytes written to the base, %d said", n, moved.written)
			}
			if n := sum(events, "base", "write") + sum(events, "base", "zero"); n != uint64(len(g.plan.ordered)+len(g.plan.independent))*bs {
				t.Errorf("%d bytes written or zeroed", n)
			}
			if n := count(events, "flush"); n != moved.flushes {
				t.Errorf("%d flushes, %d said", n, moved.flushes)
			}
			// The engine reads sources once for each op that reads them.
			base, data := sum(events, "base", "read"), sum(events, "cow", "read")
			if total := base + data; total > res.BytesRead*11/10+(4<<20) {
				t.Errorf("%d bytes read, by the engine %d", total, res.BytesRead)
			}
			if len(g.plan.ordered) > 0 && base == 0 || len(g.plan.independent) > 0 && data < uint64(len(g.plan.independent)) {
				t.Errorf("read %d bytes of the base, %d of the COW", base, data)
			}
		})
	}
}

// TestFloorOrder shows the steps of two windows.
func TestFloorOrder(t *testing.T) {
	_, events, _ := trace(t, Spec{Workload: CopyShift, Ops: 6}, 4, offline.MergeResult{ScratchBytes: 5 * bs, Flushes: 6})
	var got []string
	for _, e := range events {
		if e.file != "cow" {
			got = append(got, fmt.Sprintf("%s %s %d+%d", e.what, e.file, e.off/bs, e.n/bs))
		}
	}
	// Sources 5 to 2, then 1 and 0. One flush at the first and the third place,
	// two at the others: 6 at 4 places.
	want := []string{
		"read base 2+4", "write scratch 0+1", "write scratch 1+3", "flush scratch 0+0", "write base 3+4", "flush base 0+0", "flush base 0+0",
		"read base 0+2", "write scratch 5+1", "write scratch 6+2", "flush scratch 0+0", "write base 1+2", "flush base 0+0", "flush base 0+0",
	}
	if !slices.Equal(got, want) {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

func TestJoined(t *testing.T) {
	got := joined([]span{{5 * bs, bs}, {0, bs}, {bs, bs}, {bs, bs}, {2 * bs, bs}, {6 * bs, bs}}, 2*bs)
	want := []span{{0, 2 * bs}, {2 * bs, bs}, {5 * bs, 2 * bs}}
	if !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
