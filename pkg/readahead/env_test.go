package readahead

import (
	"bytes"
	"encoding/binary"
	"errors"
	"testing"
	"time"

	"github.com/snapmerge/snapmerge/pkg/blockio"
)

const bs = blockio.BlockSize

// content fills p with what block b of a layer has.
func content(p []byte, b uint64) {
	for i := 0; i < len(p); i += 8 {
		binary.LittleEndian.PutUint64(p[i:], b<<16|uint64(i)/8)
	}
}

// env is a manager whose time stands still and whose pool works when drain is
// called. Who waits for somebody else waits in vain.
type env struct {
	t   *testing.T
	m   *Manager
	h   *Handle
	now time.Time

	loads     []int64 // chunks, as they were loaded
	direct    int     // reads
	committed uint64
	until     uint64
	empty     map[int64]bool // chunks without ops
	err       error          // of loads
	have      uint64
}

func newEnv(t *testing.T, cfg Config) *env {
	t.Helper()
	e := &env{t: t, now: time.Unix(1e9, 0), until: 1, empty: map[int64]bool{}, have: 1<<chunkBlocks - 1}
	e.m = newManager(cfg, clock{
		now: func() time.Time { return e.now },
		after: func(time.Duration) <-chan time.Time {
			late := make(chan time.Time, 1)
			late <- e.now
			return late
		},
	})
	e.h = e.m.Open("", e.load)
	t.Cleanup(func() {
		e.h.Close()
		if e.m.loaded != 0 || len(e.m.chunks) != 0 {
			t.Errorf("%d chunks are left, %d with memory", len(e.m.chunks), e.m.loaded)
		}
		if err := e.m.Close(); err != nil {
			t.Error(err)
		}
	})
	return e
}

func (e *env) load(p []byte, first uint64) (have, until uint64, err error) {
	index := int64(first) / chunkBlocks
	e.loads = append(e.loads, index)
	if e.err != nil || e.empty[index] {
		return 0, 0, e.err
	}
	for i := range uint64(chunkBlocks) {
		if e.have>>i&1 != 0 {
			content(p[i*bs:(i+1)*bs], first+i)
		}
	}
	return e.have, e.until, nil
}

// drain does what is queued.
func (e *env) drain() {
	for len(e.m.queue) > 0 {
		e.m.next()
	}
}

// image is n bytes at off of the layer.
func image(off int64, n int) []byte {
	first, last := off/bs, (off+int64(n)-1)/bs
	p := make([]byte, (last-first+1)*bs)
	for b := first; b <= last; b++ {
		content(p[(b-first)*bs:][:bs], uint64(b))
	}
	return p[off-first*bs:][:n]
}

func (e *env) reader() Reader {
	return Reader{
		Committed: func() uint64 { return e.committed },
		Direct: func(p []byte, off int64) error {
			e.direct++
			copy(p, image(off, len(p)))
			return nil
		},
	}
}

// read reads n bytes at off, checks them, and returns how many reads went past the
// read-ahead.
func (e *env) read(off int64, n int) int {
	e.t.Helper()
	before, p := e.direct, make([]byte, n)
	if _, err := e.h.Read(e.reader(), p, off); err != nil {
		e.t.Fatal(err)
	}
	if !bytes.Equal(p, image(off, n)) {
		e.t.Fatalf("%d bytes at %d are wrong", n, off)
	}
	return e.direct - before
}

// wantLoads compares the chunks loaded since the last call.
func (e *env) wantLoads(want ...int64) {
	e.t.Helper()
	e.drain()
	got := e.loads
	e.loads = nil
	if len(got) != len(want) {
		e.t.Fatalf("loaded %v, want %v", got, want)
	}
	for i := range got {
		if got[i] != want[i] {
			e.t.Fatalf("loaded %v, want %v", got, want)
		}
	}
}

func (e *env) wantDirect(got, want int) {
	e.t.Helper()
	if got != want {
		e.t.Fatalf("%d reads without read-ahead, want %d", got, want)
	}
}

var errLoad = errors.New("this load fails")
