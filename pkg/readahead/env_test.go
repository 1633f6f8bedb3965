package readahead

import (
	"bytes"
	"encoding/binary"
	"errors"
	"math"
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
	apart     map[int64]bool // those that are different in each volume
	err       error          // of loads
	waits     []time.Duration
	have      uint64
}

func newEnv(t *testing.T, cfg Config) *env {
	t.Helper()
	return newEnvs(t, cfg, nil)[0]
}

// newEnvs are layers of one manager, opened with what is given; the time is that
// of the first.
func newEnvs(t *testing.T, cfg Config, share ...any) (list []*env) {
	t.Helper()
	for range share {
		list = append(list, &env{t: t, now: time.Unix(1e9, 0), until: 1, empty: map[int64]bool{}, apart: map[int64]bool{}, have: 1<<chunkBlocks - 1})
	}
	e := list[0]
	m := newManager(cfg, clock{
		now: func() time.Time { return e.now },
		after: func(d time.Duration) <-chan time.Time {
			e.waits = append(e.waits, d)
			late := make(chan time.Time, 1)
			late <- e.now
			return late
		},
	})
	for i, e := range list {
		e.m, e.h = m, m.Open("", Source{Share: share[i], Load: e.load})
	}
	t.Cleanup(func() {
		for _, e := range list {
			if !e.h.closed {
				e.h.Close()
			}
		}
		if m.loaded != 0 || len(m.chunks) != 0 || len(m.owners) != 0 || m.old.Len()+m.spent.Len()+m.empty.Len() != 0 {
			t.Errorf("%d chunks are left, %d with memory, %d owners", len(m.chunks), m.loaded, len(m.owners))
		}
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	})
	return list
}

func (e *env) load(p []byte, first uint64) (Loaded, error) {
	index := int64(first) / chunkBlocks
	e.loads = append(e.loads, index)
	apart := e.apart[index]
	switch {
	case e.err != nil || e.h.own != e.h.all && !apart && e.committed > e.until:
		return Loaded{}, e.err
	case e.empty[index]:
		return Loaded{Until: math.MaxUint64, Apart: apart}, nil
	}
	for i := range uint64(chunkBlocks) {
		if e.have>>i&1 != 0 {
			content(p[i*bs:(i+1)*bs], first+i)
		}
	}
	return Loaded{e.have, e.until, apart}, nil
}

// drain does what is queued.
func (e *env) drain() {
	for len(e.m.queue) > 0 {
		e.m.next(nil)
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

// hold holds a chunk as a read of it does until the end.
func (e *env) hold(index int64) *request {
	q := &request{h: e.h, r: e.reader(), p: make([]byte, bs), off: index * ChunkBytes, first: index}
	if q.begin() {
		q.load()
	}
	if !q.wants[0].held {
		e.t.Fatalf("chunk %d is not there", index)
	}
	return q
}
