package volume

import (
	"bytes"
	"errors"
	"fmt"
	"testing"

	"k8s.io/klog/v2"

	"github.com/snapmerge/snapmerge/pkg/blockio"
	"github.com/snapmerge/snapmerge/pkg/blockio/crashfs"
	"github.com/snapmerge/snapmerge/pkg/readahead"
)

// TestAheadBase: the base is read ahead, and what is kept of it is given up when the
// guest writes to it, when a log is folded into it, and while requests go past the
// volume.
func TestAheadBase(t *testing.T) {
	const blocks = 20 * readahead.ChunkBytes / bs
	fs := crashfs.New("/s")
	want := make([]byte, blocks*bs)
	for b := range int64(blocks) {
		stamp(want[b*bs:(b+1)*bs], b, 1)
	}
	if err := fs.Put("/s/base", want); err != nil {
		t.Fatal(err)
	}
	if err := Create(fs, "/s/v", Spec{ID: "v", Size: blocks * bs, Base: "/s/base"}); err != nil {
		t.Fatal(err)
	}
	m := readahead.NewManager(readahead.Config{Mode: readahead.Async, Window: 4 * readahead.ChunkBytes})
	v, err := Open(Config{FS: fs, Dir: "/s/v", IO: blockio.Sync, ReadAhead: m, Log: klog.Background()})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := errors.Join(v.Close(), m.Close()); err != nil {
			t.Error(err)
		}
	}()
	// read reads all blocks and tells how many came from the read-ahead.
	read := func(when string) int {
		t.Helper()
		before := v.Counters().FromAhead
		p := make([]byte, bs)
		for off := int64(0); off < blocks*bs; off += bs {
			if _, err := v.ReadAt(p, off); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(p, want[off:off+bs]) {
				t.Fatalf("%s: block %d differs", when, off/bs)
			}
		}
		return int(v.Counters().FromAhead-before) / bs
	}
	write := func(b int64, version uint64) {
		t.Helper()
		p := want[b*bs : (b+1)*bs]
		if stamp(p, b, version); version == 0 {
			clear(p)
		}
		var err error
		if version == 0 {
			err = v.Zero(b*bs, bs)
		} else {
			_, err = v.WriteAt(p, b*bs)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	// A reader does not wait for what is late, as on a busy machine something may be.
	if n := read("at first"); n < blocks/2 {
		t.Errorf("%d blocks of %d came from the read-ahead", n, blocks)
	}
	write(33, 2)
	write(77, 0)
	read("after writes")

	if err := v.rotate(&CutRecord{Snapshot: "s"}, nil); err != nil {
		t.Fatal(err)
	}
	write(34, 3)
	if n := read("of a log"); n == 0 || n > blocks-1 {
		t.Errorf("%d blocks came from the read-ahead beside a log", n)
	}
	if err := v.update(func(r *Record) { r.Cut = nil }); err != nil {
		t.Fatal(err)
	}
	for i := 0; !v.Idle(); i++ {
		if _, err := v.Step(t.Context()); err != nil || i > 100 {
			t.Fatal(i, err)
		}
	}
	read("after a fold")

	past := func(s NativeState) {
		t.Helper()
		v.changing.Lock()
		defer v.changing.Unlock()
		if err := v.markNative(s); err != nil {
			t.Fatal(err)
		}
	}
	past(GoneNative)
	for _, s := range []NativeState{GoneNative, Returning, ""} {
		past(s)
		stamp(want[35*bs:36*bs], 35, uint64(4+len(s)))
		if _, err := v.base.WriteAt(want[35*bs:36*bs], 35*bs); err != nil && s != "" {
			t.Fatal(err)
		}
		if n := read(fmt.Sprintf("native %q", s)); (n > 0) != (s == "") {
			t.Errorf("native %q: %d blocks came from the read-ahead", s, n)
		}
	}
}
