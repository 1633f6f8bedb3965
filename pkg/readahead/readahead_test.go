package readahead

import (
	"bytes"
	"runtime"
	"slices"
	"sync"
	"testing"
	"time"
)

const chunkLen = ChunkBytes

// async is a configuration with windows of 8 chunks.
func async() Config { return Config{Mode: Async, Window: 8 * chunkLen} }

// TestTrigger: what is taken for sequential, and what is loaded then.
func TestTrigger(t *testing.T) {
	type read struct {
		off int64
		n   int
	}
	for _, c := range []struct {
		name  string
		reads []read
		wait  time.Duration // before the last one
		loads []int64
	}{
		{"single", []read{{0, bs}}, 0, nil},
		{"random", []read{{40 * chunkLen, bs}, {10 * chunkLen, bs}, {90 * chunkLen, bs}, {10*chunkLen + bs + near + bs, bs}}, 0, nil},
		{"backwards", []read{{8 * bs, bs}, {7 * bs, bs}, {6 * bs, bs}}, 0, nil},
		{"the same again", []read{{8 * bs, bs}, {8 * bs, bs}, {8 * bs, bs}}, 0, nil},
		{"next", []read{{chunkLen, bs}, {chunkLen + bs, bs}}, 0, []int64{1, 2, 3, 4, 5, 6, 7, 8, 9}},
		{"sectors", []read{{chunkLen, 512}, {chunkLen + 512, 512}}, 0, []int64{1, 2, 3, 4, 5, 6, 7, 8, 9}},
		{"a little behind", []read{{chunkLen, bs}, {chunkLen + bs + near, bs}}, 0, []int64{1, 2, 3, 4, 5, 6, 7, 8, 9}},
		{"large", []read{{0, 2 * chunkLen}, {2 * chunkLen, 2 * chunkLen}}, 0, []int64{4, 5, 6, 7, 8, 9, 10, 11}},
		{"larger than the window", []read{{0, 9 * chunkLen}, {9 * chunkLen, 9 * chunkLen}}, 0,
			[]int64{18, 19, 20, 21, 22, 23, 24, 25, 26}},
		{"others between", []read{{0, bs}, {70 * chunkLen, bs}, {30 * chunkLen, bs}, {bs, bs}}, 0, []int64{0, 1, 2, 3, 4, 5, 6, 7, 8}},
		{"long ago", []read{{0, bs}, {bs, bs}}, DefaultExpiry, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			e := newEnv(t, async())
			for i, r := range c.reads {
				if i == len(c.reads)-1 {
					e.now = e.now.Add(c.wait)
				}
				e.read(r.off, r.n)
			}
			e.wantLoads(c.loads...)
		})
	}
}

// TestStream: a sequential reader goes past the read-ahead once, or twice if the
// second read is of whole chunks, then never again, and nothing is loaded twice,
// whatever the size of its reads, and though it leaves out some.
func TestStream(t *testing.T) {
	for _, c := range []struct {
		name    string
		n, step int64
	}{
		{"4 KiB", bs, bs}, {"128 KiB", 2 * chunkLen, 2 * chunkLen}, {"a quarter of the window left out", bs, 2 * chunkLen}, {"1 MiB", 16 * chunkLen, 16 * chunkLen},
		{"unaligned", 3 * 512, 3 * 512},
	} {
		t.Run(c.name, func(t *testing.T) {
			e := newEnv(t, async())
			e.wantDirect(e.read(0, int(c.n)), 1)
			if c.step > c.n { // or the second read were another single one
				e.wantDirect(e.read(c.n, bs), 0)
			}
			whole := int(c.n / chunkLen) // chunks of a read, which it reads itself if they are not loaded
			if whole > 0 {
				e.wantDirect(e.read(c.step, int(c.n)), 1)
				e.drain()
			}
			for off := c.step + int64(min(whole, 1))*c.step; off < 100*chunkLen; off += c.step {
				e.wantDirect(e.read(off, int(c.n)), 0)
				e.drain()
			}
			seen := map[int64]bool{}
			for _, i := range e.loads {
				if seen[i] {
					t.Errorf("chunk %d was loaded twice", i)
				}
				seen[i] = true
			}
			if n := len(e.loads); n < 99-2*whole || n > 100+17+8 {
				t.Errorf("%d chunks were loaded for 100", n)
			}
			s := e.m.Stats()
			if s.Misses != 2 || s.Hits == 0 || s.Bytes != uint64(len(e.loads))*chunkLen || s.Reads[Async].Count != s.Hits+2 {
				t.Errorf("%+v", s)
			}
		})
	}
}

// TestArm: the next window is on its way when the last quarter is touched, not
// before and not twice, even while its own window is being loaded.
func TestArm(t *testing.T) {
	e := newEnv(t, async())
	e.read(0, bs)
	e.read(bs, bs)
	e.wantLoads(0, 1, 2, 3, 4, 5, 6, 7, 8)
	e.read(6*chunkLen, bs)
	e.wantLoads()
	e.read(8*chunkLen, bs) // 7 is left out
	e.wantLoads(9, 10, 11, 12, 13, 14, 15, 16)
	e.read(7*chunkLen, bs)
	e.read(8*chunkLen, bs)
	e.wantLoads()
}

// TestPartial: who reads the first chunk of a window does not wait for the others.
func TestPartial(t *testing.T) {
	inSecond, goOn := make(chan struct{}), make(chan struct{})
	m := NewManager(async())
	h := m.Open("", Source{Load: func(p []byte, first uint64) (Loaded, error) {
		if first == chunkBlocks {
			close(inSecond)
			<-goOn
		}
		copy(p, image(int64(first)*bs, len(p)))
		return Loaded{Have: 1<<chunkBlocks - 1, Until: 1}, nil
	}})
	direct := 0
	r := Reader{Committed: func() uint64 { return 0 }, Direct: func(p []byte, off int64) error { direct++; copy(p, image(off, len(p))); return nil }}
	p := make([]byte, bs)
	for i := range int64(chunkBlocks) {
		if _, err := h.Read(r, p, i*bs); err != nil || !bytes.Equal(p, image(i*bs, bs)) {
			t.Fatalf("block %d: %v", i, err)
		}
	}
	<-inSecond
	var wg sync.WaitGroup
	wg.Go(func() {
		if _, err := h.Read(r, make([]byte, bs), chunkLen); err != nil {
			t.Error(err)
		}
	})
	close(goOn)
	wg.Wait()
	h.Close()
	if direct != 1 {
		t.Errorf("%d reads without read-ahead, want 1", direct)
	}
	if err := m.Close(); err != nil {
		t.Error(err)
	}
}

// TestCloseWaits: when Close has returned nothing is loaded any more.
func TestCloseWaits(t *testing.T) {
	m := newManager(async(), clock{time.Now, time.After})
	in, goOn := make(chan struct{}), make(chan struct{})
	loads := 0
	h := m.Open("", Source{Load: func([]byte, uint64) (Loaded, error) {
		loads++
		close(in)
		<-goOn
		return Loaded{Have: 1, Until: 1}, nil
	}})
	m.mu.Lock()
	h.submitLocked(0, 0, 1)
	h.submitLocked(50, 50, 1)
	m.mu.Unlock()
	go m.next(nil)
	<-in
	closed := make(chan int)
	go func() { h.Close(); closed <- loads }()
	waitClosing(h)
	select {
	case <-closed:
		t.Fatal("closed while a chunk was being loaded")
	default:
	}
	close(goOn)
	if n := <-closed; n != 1 || len(m.queue) != 0 || m.loaded != 0 {
		t.Errorf("%d loads, %d tasks and %d chunks are left", n, len(m.queue), m.loaded)
	}
	if err := m.Close(); err != nil {
		t.Error(err)
	}
}

// waitClosing returns when Close was called.
func waitClosing(h *Handle) {
	for closing := false; !closing; runtime.Gosched() {
		h.m.mu.Lock()
		closing = h.closed
		h.m.mu.Unlock()
	}
}

// TestLate: a read that has waited long enough reads by itself, and keeps nobody
// else from waiting.
func TestLate(t *testing.T) {
	e := newEnv(t, async())
	e.read(0, bs)
	e.read(bs, bs)
	c := e.m.chunks[key{e.h.all, 1}]
	c.taken = e.h
	e.wantDirect(e.read(chunkLen, bs), 1)
	e.wantDirect(e.read(chunkLen, bs), 1) // once is enough
	c.taken = nil
	e.wantDirect(e.read(chunkLen, bs), 0)
	if s := e.m.Stats(); s.Late != 1 || s.Blocked.Count != 1 {
		t.Errorf("%+v", s)
	}
	for i, took := range []time.Duration{0, 1, time.Millisecond, time.Minute} {
		c := e.m.chunks[key{e.h.all, int64(2 + i)}]
		c.taken, e.h.took = e.h, took
		e.read(int64(2+i)*chunkLen, bs)
		c.taken = nil
	}
	if want := []time.Duration{waitMost, waitMost, waitLeast, 4 * time.Millisecond, waitMost}; !slices.Equal(e.waits, want) {
		t.Errorf("waited for %v, want %v", e.waits, want)
	}
}

// TestFailedLoad: readers read by themselves, and meet the error there if there
// is one.
func TestFailedLoad(t *testing.T) {
	e := newEnv(t, async())
	e.err = errLoad
	e.read(0, bs)
	e.wantDirect(e.read(bs, bs), 1)
	e.wantLoads(0, 1, 2, 3, 4, 5, 6, 7, 8)
	e.err = nil
	e.read(2*bs, bs)
	e.wantDirect(e.read(3*bs, bs), 0)
	if s := e.m.Stats(); s.Failed != 9 {
		t.Errorf("%+v", s)
	}
	r := e.reader()
	r.Direct = func([]byte, int64) error { return errLoad }
	if _, err := e.h.Read(r, make([]byte, bs), 80*chunkLen); err != errLoad {
		t.Errorf("error %v", err)
	}
}

// TestHoles: blocks that no op writes are read past the read-ahead, neighbours
// together, and so are chunks without any, for which no memory is kept.
func TestHoles(t *testing.T) {
	e := newEnv(t, async())
	e.have = 0b0110_0000_0011_0001 // of 16
	e.empty[2] = true
	e.read(0, bs)
	e.read(bs, bs)
	e.drain()
	e.wantDirect(e.read(0, 4*chunkLen), 9)
	e.wantDirect(e.read(512, bs), 1)      // the end of block 0, the beginning of 1
	e.wantDirect(e.read(6*bs-512, bs), 1) // the end of block 5, the beginning of 6
	e.wantDirect(e.read(5*bs-512, bs), 0) // the end of block 4, the beginning of 5
	e.wantDirect(e.read(2*chunkLen, chunkLen), 1)
	e.drain()
	if s := e.m.Stats(); s.Memory != 8*chunkLen || s.Blocks != 8*5 {
		t.Errorf("%+v", s)
	}
	// Where there is nothing no next window is loaded.
	for i := range int64(20) {
		e.empty[20+i] = true
	}
	e.read(20*chunkLen, bs)
	e.read(20*chunkLen+bs, bs)
	e.drain()
	e.loads = nil
	e.read(28*chunkLen, bs)
	e.wantLoads()
}

// TestCommitted: what is in the base by now is not served any more.
func TestCommitted(t *testing.T) {
	e := newEnv(t, async())
	e.until = 5
	e.read(0, bs)
	e.read(bs, bs)
	e.committed = 5
	e.wantDirect(e.read(2*bs, bs), 0)
	e.committed = 6
	e.wantDirect(e.read(3*bs, bs), 1)
	e.wantDirect(e.read(chunkLen, bs), 1)
	e.drain()
	if n := len(e.m.chunks); n != 9-2 {
		t.Errorf("%d chunks are left of 9", n)
	}
}

// TestSync: the reader loads a batch whenever something is missing.
func TestSync(t *testing.T) {
	e := newEnv(t, Config{Mode: Sync, Batch: 4 * chunkLen})
	e.wantDirect(e.read(9*chunkLen, bs), 0)
	e.wantLoads(9, 10, 11, 12)
	e.wantDirect(e.read(9*chunkLen, 4*chunkLen), 0)
	e.wantLoads()
	e.wantDirect(e.read(12*chunkLen, 2*chunkLen), 0)
	e.wantLoads(13, 14, 15, 16)
	e.wantDirect(e.read(20*chunkLen, 6*chunkLen), 0)
	e.wantLoads(20, 21, 22, 23, 24, 25)
	if s := e.m.Stats(); s.Hits != 1 || s.Misses != 3 || s.Total.Count != 3 || s.Queued.Count != 0 || s.Reads[Sync].Count != 4 {
		t.Errorf("%+v", s)
	}
}

// TestNone: reads are timed, that is all.
func TestNone(t *testing.T) {
	for _, mode := range []Mode{None, ""} {
		e := newEnv(t, Config{Mode: mode})
		for i := range int64(10) {
			e.wantDirect(e.read(i*bs, bs), 1)
		}
		e.wantLoads()
		if s := e.m.Stats(); s.Reads[None].Count != 10 || s.Hits+s.Misses+s.Blocks != 0 || e.h.notes.Len() != 0 {
			t.Errorf("%+v", s)
		}
	}
}

// TestMemory: what is in use stays within the limit, what was read goes first,
// and what is being read does not go.
func TestMemory(t *testing.T) {
	e := newEnv(t, Config{Mode: Async, Window: 2 * chunkLen, Memory: 4 * chunkLen})
	e.read(0, bs)
	e.read(bs, bs) // 0 to 2
	e.drain()
	held := e.hold(1)
	e.read(2*chunkLen, chunkLen) // 3, 4; 2 is read up
	e.wantLoads(0, 1, 2, 3, 4)
	if e.m.chunks[key{e.h.all, 2}] != nil || e.m.chunks[key{e.h.all, 0}] == nil {
		t.Error("what was read up has to go first")
	}
	for i := range int64(40) {
		e.read((10+i)*chunkLen, bs)
		e.read((10+i)*chunkLen+bs, bs)
		e.drain()
		if s := e.m.Stats(); s.Memory > s.MemoryLimit || s.MemoryLimit != 4*chunkLen {
			t.Fatalf("%d of %d bytes are in use", s.Memory, s.MemoryLimit)
		}
	}
	if !bytes.Equal(held.wants[0].c.mem.Bytes(), image(chunkLen, chunkLen)) {
		t.Error("memory of a chunk that is being read was used for another one")
	}
	held.release()
	if s := e.m.Stats(); s.Wasted == 0 {
		t.Errorf("%+v", s)
	}
}

// TestSpent: one who reads in sequence takes little memory, whatever the limit.
func TestSpent(t *testing.T) {
	e := newEnv(t, async())
	for off := int64(0); off < 100*chunkLen; off += 2 * bs {
		e.read(off, 2*bs)
		e.drain()
	}
	if s := e.m.Stats(); s.Memory > (spentChunks+2*8+2)*chunkLen {
		t.Errorf("%d chunks are in use", s.Memory/chunkLen)
	}
}

// TestAllInUse: where all memory is in use nothing is loaded, and all is read.
func TestAllInUse(t *testing.T) {
	e := newEnv(t, Config{Mode: Sync, Batch: chunkLen, Memory: chunkLen})
	e.read(0, bs)
	held := e.hold(0)
	e.wantDirect(e.read(chunkLen, bs), 1)
	held.release()
	e.wantDirect(e.read(chunkLen, bs), 0)
	if s := e.m.Stats(); s.Failed != 1 {
		t.Errorf("%+v", s)
	}
}

// TestExpiry: what nobody asks for is forgotten, and its memory given back.
func TestExpiry(t *testing.T) {
	e := newEnv(t, async())
	e.read(0, bs)
	e.read(bs, bs)
	e.drain()
	e.now = e.now.Add(DefaultExpiry - 1)
	e.read(2*bs, bs)
	e.m.expire()
	if n := len(e.m.chunks); n != 9 {
		t.Fatalf("%d chunks before their time", n)
	}
	e.now = e.now.Add(1)
	e.m.expire()
	if n := len(e.m.chunks); n != 1 || e.m.Stats().Memory != chunkLen {
		t.Errorf("%d chunks are left, %d bytes", n, e.m.Stats().Memory)
	}
	if s := e.m.Stats(); s.Wasted != 8*chunkLen {
		t.Errorf("%+v", s)
	}
}

// TestNotes: few ends of reads are remembered, the latest ones.
func TestNotes(t *testing.T) {
	e := newEnv(t, async())
	for i := range int64(3 * maxNotes) {
		e.read(i*10*chunkLen, bs)
	}
	if n := e.h.notes.Len(); n != maxNotes {
		t.Errorf("%d notes", n)
	}
	e.read(bs, bs)
	e.wantLoads()
	e.wantDirect(e.read((3*maxNotes-1)*10*chunkLen+bs, bs), 0)
}

// TestAdaptive: the window gets wider as readers get on, and narrower if what was
// loaded is not read.
func TestAdaptive(t *testing.T) {
	e := newEnv(t, Config{Mode: Async, Window: 2 * chunkLen, MaxWindow: 8 * chunkLen})
	for off := int64(0); off < 40*chunkLen; off += bs {
		e.read(off, bs)
	}
	if e.h.window != 8 {
		t.Fatalf("window of %d chunks after a long read, want 8", e.h.window)
	}
	e.drain()
	e.now = e.now.Add(DefaultExpiry)
	e.m.expire()
	if e.h.window != 1 {
		t.Errorf("window of %d chunks after waste, want 1", e.h.window)
	}
	f := newEnv(t, Config{Mode: Async, Window: 2 * chunkLen})
	for off := int64(0); off < 40*chunkLen; off += bs {
		f.read(off, bs)
	}
	f.now = f.now.Add(DefaultExpiry)
	f.m.expire()
	if f.h.window != 2 {
		t.Errorf("fixed window of %d chunks, want 2", f.h.window)
	}
}

// TestTimes: queueing is from submitting to the start, execution from there on.
func TestTimes(t *testing.T) {
	e := newEnv(t, async())
	e.m.mu.Lock()
	e.h.submitLocked(0, 0, 1)
	e.m.mu.Unlock()
	e.now = e.now.Add(3 * time.Second)
	load := e.h.load
	e.h.load = func(p []byte, first uint64) (Loaded, error) {
		e.now = e.now.Add(time.Second)
		return load(p, first)
	}
	e.drain()
	s := e.m.Stats()
	if s.Queued.Seconds != 3 || s.Execution.Seconds != 8 || s.Total.Seconds != 11 || s.Total.Count != 1 || s.Queued.Buckets[5] != 1 || s.Queued.Buckets[1] != 0 {
		t.Errorf("queued %+v, execution %+v, total %+v", s.Queued, s.Execution, s.Total)
	}
}

// TestQueueBound: tasks that nobody gets to are not queued without end.
func TestQueueBound(t *testing.T) {
	e := newEnv(t, async())
	e.m.mu.Lock()
	for i := range int64(2 * maxQueue) {
		e.h.submitLocked(i*100, i*100, 1)
	}
	n := len(e.m.queue)
	e.m.mu.Unlock()
	if n != maxQueue {
		t.Errorf("%d tasks are queued", n)
	}
}

func TestParseMode(t *testing.T) {
	for _, m := range Modes {
		if got, err := ParseMode(string(m)); err != nil || got != m {
			t.Errorf("%s: %v, %v", m, got, err)
		}
	}
	for _, s := range []string{"", "on", "ASYNC"} {
		if _, err := ParseMode(s); err == nil {
			t.Errorf("%q is a mode", s)
		}
	}
}
