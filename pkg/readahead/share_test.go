package readahead

import (
	"testing"
	"time"
)

// TestShared: what one of several volumes of a snapshot has loaded serves the
// others, and takes memory once; volumes of other snapshots load for themselves.
func TestShared(t *testing.T) {
	for _, mode := range []Mode{Sync, Async} {
		t.Run(string(mode), func(t *testing.T) {
			list := newEnvs(t, Config{Mode: mode, Window: 8 * chunkLen, Batch: 9 * chunkLen}, "one", "one", "one", "two", nil)
			list[0].read(0, bs)
			list[0].read(bs, bs)
			list[0].wantLoads(0, 1, 2, 3, 4, 5, 6, 7, 8)
			for _, e := range list[1:3] {
				for off := int64(0); off < 7*chunkLen; off += bs {
					e.wantDirect(e.read(off, bs), 0)
				}
				e.wantLoads()
			}
			if s := list[0].m.Stats(); s.Shared != 2*7*chunkBlocks || s.Blocks != 9*chunkBlocks || s.Memory != 9*chunkLen {
				t.Errorf("%+v", s)
			}
			for _, e := range list[3:] {
				e.read(0, bs)
				e.read(bs, bs)
				e.wantLoads(0, 1, 2, 3, 4, 5, 6, 7, 8)
			}
			if s := list[0].m.Stats(); s.Shared != 2*7*chunkBlocks || s.Memory != 3*9*chunkLen {
				t.Errorf("%+v", s)
			}
		})
	}
}

// TestSharedStream: two volumes are read in sequence, one a little behind the
// other or in front of it, and each chunk is loaded once.
func TestSharedStream(t *testing.T) {
	list := newEnvs(t, Config{Mode: Async, Window: 4 * chunkLen, Memory: 24 * chunkLen}, 7, 7)
	seen := map[int64]bool{}
	at := [2]int64{}
	for i := 0; at[0] < 90*chunkLen; i++ {
		k := (i + 50) / 100 % 2 // each overtakes the other by 50 reads
		e := list[k]
		e.read(at[k], 2*bs)
		at[k] += 2 * bs
		e.drain()
	}
	for _, e := range list {
		for _, i := range e.loads {
			if seen[i] {
				t.Errorf("chunk %d was loaded twice", i)
			}
			seen[i] = true
		}
		if len(e.loads) == 0 {
			t.Error("one volume has loaded everything")
		}
	}
	if s := list[0].m.Stats(); s.Shared < 500 || s.Misses > 4 {
		t.Errorf("%+v", s)
	}
}

// TestSharedCommitted: a volume that has merged an op of a chunk does not get the
// chunk any more, nor loads it again; the others do get it, though he had loaded
// it.
func TestSharedCommitted(t *testing.T) {
	list := newEnvs(t, async(), "s", "s")
	a, b := list[0], list[1]
	a.until, b.until = 5, 5
	a.read(0, bs)
	a.read(bs, bs)
	a.wantLoads(0, 1, 2, 3, 4, 5, 6, 7, 8)
	a.committed = 6
	before := a.m.Stats()
	for i := range int64(2 * chunkBlocks) {
		a.wantDirect(a.read(i*bs, bs), 1)
		b.wantDirect(b.read(i*bs, bs), 0)
	}
	b.committed = 5
	b.wantDirect(b.read(2*bs, bs), 0)
	b.committed = 6
	b.wantDirect(b.read(2*bs, bs), 1)
	a.wantLoads()
	b.wantLoads()
	if s := a.m.Stats(); s.Misses != before.Misses+3 || s.Shared != 2*chunkBlocks+1 {
		t.Errorf("%+v", s)
	}
}

// TestSharedNothing: that there is nothing in a chunk for one volume, which has
// merged it, says nothing to the others.
func TestSharedNothing(t *testing.T) {
	list := newEnvs(t, async(), "s", "s")
	a, b := list[0], list[1]
	a.committed = 2
	for off := int64(0); off < 7*chunkLen; off += bs {
		a.wantDirect(a.read(off, bs), 1)
	}
	a.wantLoads(0, 1, 2, 3, 4, 5, 6, 7, 8)
	b.read(0, bs)
	for off := int64(bs); off < 7*chunkLen; off += bs {
		b.wantDirect(b.read(off, bs), 0)
	}
	b.wantLoads(0, 1, 2, 3, 4, 5, 6, 7, 8)
	for off := int64(0); off < 7*chunkLen; off += bs {
		a.wantDirect(a.read(off, bs), 1)
	}
	a.wantLoads()
}

// TestSharedEmpty: that the ops write nothing of a chunk is known of all volumes
// when one of them has looked.
func TestSharedEmpty(t *testing.T) {
	list := newEnvs(t, async(), "s", "s")
	a, b := list[0], list[1]
	for i := range int64(4) {
		a.empty[i], b.empty[i] = true, true
	}
	a.read(0, bs)
	a.read(bs, bs)
	a.wantLoads(0, 1, 2, 3, 4, 5, 6, 7, 8)
	b.wantDirect(b.read(0, 4*chunkLen), 1)
	b.wantDirect(b.read(4*chunkLen, chunkLen), 0)
	b.wantLoads()
	if n := len(a.m.chunks); n != 9 {
		t.Errorf("%d chunks are known, want 9", n)
	}
}

// TestSharedClose: a volume that goes leaves the others what it has loaded, and
// what it had still to load to themselves; nothing is left when all have gone.
func TestSharedClose(t *testing.T) {
	list := newEnvs(t, async(), "s", "s")
	a, b := list[0], list[1]
	a.read(0, bs)
	a.read(bs, bs) // loads chunk 0; 1 to 8 are queued
	a.h.Close()
	if n := len(b.m.chunks); n != 1 || len(b.m.queue) != 0 {
		t.Errorf("%d chunks and %d tasks are left", n, len(b.m.queue))
	}
	b.wantDirect(b.read(0, chunkLen), 0)
	b.wantDirect(b.read(chunkLen, bs), 1)
	b.wantDirect(b.read(chunkLen+bs, bs), 0)
	b.wantLoads(1, 2, 3, 4, 5, 6, 7, 8, 9)
	b.h.Close()
	if s := b.m.Stats(); len(b.m.chunks) != 0 || b.m.loaded != 0 || len(b.m.owners) != 0 || s.Blocks != 10*chunkBlocks {
		t.Errorf("%d chunks are left, %d owners, %+v", len(b.m.chunks), len(b.m.owners), s)
	}
}

// TestSharedCloseLoading: a volume that goes while one of its chunks is being
// loaded waits for it, loads no further ones, and leaves it to the others.
func TestSharedCloseLoading(t *testing.T) {
	m := newManager(async(), clock{time.Now, time.After})
	in, goOn := make(chan struct{}), make(chan struct{})
	a := m.Open("", Source{Share: 1, Load: func(p []byte, first uint64) (Loaded, error) {
		close(in) // or it is loading a second one
		<-goOn
		copy(p, image(int64(first)*bs, len(p)))
		return Loaded{Have: 1<<chunkBlocks - 1, Until: 1}, nil
	}})
	b := &env{t: t, m: m, until: 1, have: 1<<chunkBlocks - 1}
	b.h = m.Open("", Source{Share: 1, Load: b.load})
	m.mu.Lock()
	a.submitLocked(0, 0, 1)
	m.mu.Unlock()
	go m.next(nil)
	<-in
	closed := make(chan struct{})
	go func() { a.Close(); close(closed) }()
	waitClosing(a)
	close(goOn)
	<-closed
	if len(m.chunks) != 1 {
		t.Errorf("%d chunks are left, want the one that was being loaded", len(m.chunks))
	}
	b.wantDirect(b.read(0, chunkLen), 0)
	b.h.Close()
	if len(m.chunks) != 0 || m.loaded != 0 {
		t.Errorf("%d chunks are left", len(m.chunks))
	}
	if err := m.Close(); err != nil {
		t.Error(err)
	}
}

// TestSharedOrder: of a shared layer what was read up does not go first, and what
// a second volume has read goes last.
func TestSharedOrder(t *testing.T) {
	list := newEnvs(t, Config{Mode: Sync, Batch: 4 * chunkLen, Memory: 4 * chunkLen}, "s", "s", "s")
	a, b := list[0], list[1]
	for i := range int64(4) {
		a.read(i*chunkLen, chunkLen)
	}
	b.read(chunkLen, chunkLen)
	a.wantLoads(0, 1, 2, 3)
	a.m.cfg.Batch = chunkLen
	for i := range int64(3) {
		a.read((4+i)*chunkLen, chunkLen)
	}
	a.wantLoads(4, 5, 6)
	list[2].read(chunkLen, chunkLen)
	list[2].read(4*chunkLen, chunkLen)
	list[2].wantLoads()
	a.read(chunkLen, chunkLen)
	a.wantLoads()
}

// TestManyVolumes: fifty volumes that are read at once, of one snapshot or of as
// many, stay within the one limit, and so does what is known of chunks.
func TestManyVolumes(t *testing.T) {
	const volumes, limit = 50, 32
	for name, one := range map[string]bool{"one snapshot": true, "fifty": false} {
		t.Run(name, func(t *testing.T) {
			share := make([]any, volumes)
			for i := range share {
				if share[i] = i; one {
					share[i] = 0
				}
			}
			list := newEnvs(t, Config{Mode: Async, Memory: limit * chunkLen}, share...)
			m := list[0].m
			for _, e := range list {
				for i := range int64(30) {
					e.empty[2*i+1] = true
				}
			}
			for off := int64(0); off < 40*chunkLen; off += 8 * bs {
				for _, e := range list {
					e.read(off, 8*bs)
				}
				list[0].drain()
				if s := m.Stats(); s.Memory > limit*chunkLen {
					t.Fatalf("%d bytes are in use, at most %d may be", s.Memory, limit*chunkLen)
				}
				if n := len(m.chunks); n > (1+emptyChunks)*limit {
					t.Fatalf("%d chunks are known, want at most %d", n, (1+emptyChunks)*limit)
				}
			}
			loads := 0
			for _, e := range list {
				loads += len(e.loads)
			}
			if s := m.Stats(); one && s.Blocks > 3*40*chunkBlocks || s.Blocks == 0 {
				t.Errorf("%d blocks were read ahead, in %d loads", s.Blocks, loads)
			}
		})
	}
}
