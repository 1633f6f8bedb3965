package blockio

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
)

// kinds runs a test with every kind of queue, each also with its transfers cut
// short after some bytes.
func kinds(t *testing.T, depth int, test func(t *testing.T, q Queue)) {
	for _, kind := range []Kind{Sync, URing} {
		for _, clip := range []clip{0, 512, 1000} {
			name := string(kind)
			if clip > 0 {
				name += fmt.Sprintf(" cut short at %d", clip)
			}
			t.Run(name, func(t *testing.T) {
				q := newQueue(t, kind, depth)
				switch q := q.(type) {
				case *syncQueue:
					q.clip = clip
				case *uringQueue:
					q.clip, q.plain.clip = clip, clip
				}
				test(t, q)
			})
		}
	}
}

func newQueue(t testing.TB, kind Kind, depth int) Queue {
	t.Helper()
	if err := ProbeURing(); kind == URing && err != nil {
		t.Skip(err)
	}
	q, err := NewQueue(kind, depth)
	if errors.Is(err, syscall.ENOMEM) { // rings that were closed may count still
		t.Skip(err)
	}
	ok(t, err)
	t.Cleanup(func() { ok(t, q.Close()) })
	if q.Kind() != kind {
		t.Fatalf("asked for %s, got %s", kind, q.Kind())
	}
	return q
}

// TestQueueAgainstMemory runs random batches on all kinds of targets.
func TestQueueAgainstMemory(t *testing.T) {
	const size = 512 << 10
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	defer debug.SetGCPercent(debug.SetGCPercent(10)) // heap buffers must survive it
	kinds(t, 4, func(t *testing.T, q Queue) {
		arena, err := NewArena(size)
		ok(t, err)
		defer arena.Close()
		q.Register(arena)
		u, ring := q.(*uringQueue)
		if ring && len(u.fixed) == 0 && errors.Is(u.ring.RegisterBuffers([][]byte{arena.Bytes()}), syscall.ENOMEM) {
			t.Log("this process may not lock that much memory (ulimit -l): without registered buffers")
		} else if ring && (len(u.fixed) != 1 || u.fixedIndex(arena.Bytes()[size-1:]) != 0 || u.fixedIndex(make([]byte, 1)) != -1) {
			t.Errorf("the arena is not registered: %d buffers", len(u.fixed))
		}
		targets(t, size, func(t *testing.T, f *osFile) {
			rng := rand.New(rand.NewPCG(seed, 0))
			want := make([]byte, size)
			for round := range 12 {
				batch := randomBatch(rng, arena.Bytes(), size)
				if round%2 == 0 {
					for _, r := range batch {
						for i := range r.Buf {
							r.Buf[i] = byte(rng.Uint32())
						}
						copy(want[r.Off:], r.Buf)
					}
					if err := q.Write(f, batch); err != nil {
						t.Fatalf("round %d: %v", round, err)
					}
				}
				for _, r := range batch {
					for i := range r.Buf {
						r.Buf[i] = 0xee
					}
				}
				if err := q.Read(f, batch); err != nil {
					t.Fatalf("round %d: %v", round, err)
				}
				for i, r := range batch {
					if !bytes.Equal(r.Buf, want[r.Off:r.Off+int64(len(r.Buf))]) {
						t.Fatalf("round %d, request %d, %d bytes at %d: wrong data", round, i, len(r.Buf), r.Off)
					}
				}
			}
			got := make([]byte, size)
			if _, err := f.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
				t.Fatalf("wrong data at the end: %v", err)
			}
		})
	})
}

// randomBatch cuts the file into pieces and takes some of them, in random
// order, with memory from the arena (in the file's order or not) or the heap.
func randomBatch(rng *rand.Rand, arena []byte, size int) []Request {
	unit := []int{4096, 512, 1}[rng.IntN(3)]
	heap := rng.IntN(3) == 0
	pieces := 1 + rng.IntN(60)
	var batch []Request
	for off, free := rng.IntN(size/4)/unit*unit, 0; len(batch) < pieces; {
		n := min((rng.IntN(12000)/unit+1)*unit, size-off)
		if n <= 0 {
			break
		}
		buf := arena[free : free+n]
		if rng.IntN(4) == 0 {
			buf = slices.Clip(buf) // does not tell that the next one follows
		}
		free += n
		if heap {
			buf = make([]byte, n)
		}
		batch = append(batch, Request{Buf: buf, Off: int64(off)})
		off += n
		if rng.IntN(3) == 0 {
			off += rng.IntN(9000) / unit * unit
		}
		if rng.IntN(10) == 0 {
			batch = append(batch, Request{Off: int64(min(off, size))}) // nothing to do
		}
	}
	switch rng.IntN(3) {
	case 0:
		rng.Shuffle(len(batch), func(i, j int) { batch[i], batch[j] = batch[j], batch[i] })
	case 1: // descending, memory ascending
		for i, j := 0, len(batch)-1; i < j; i, j = i+1, j-1 {
			batch[i], batch[j] = batch[j], batch[i]
		}
	}
	return batch
}

// TestManyVectors joins more requests than one vector holds.
func TestManyVectors(t *testing.T) {
	const n = 2*maxVectors + 77
	for _, kind := range []Kind{Sync, URing} {
		t.Run(string(kind), func(t *testing.T) {
			q := newQueue(t, kind, 8)
			f := open(t, filepath.Join(t.TempDir(), "f"), Create)
			var batch []Request
			var want []byte
			for i := range n {
				r := Request{Buf: bytes.Repeat([]byte{byte(i), byte(i >> 8)}, 1+i%3), Off: int64(len(want))}
				batch = append(batch, r)
				want = append(want, r.Buf...)
			}
			ok(t, q.Write(f, batch))
			got := make([]byte, len(want))
			if _, err := f.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
				t.Errorf("wrong data: %v", err)
			}
			for _, r := range batch {
				clear(r.Buf)
			}
			ok(t, q.Read(f, batch))
			var again []byte
			for _, r := range batch {
				again = append(again, r.Buf...)
			}
			if !bytes.Equal(again, want) {
				t.Error("wrong data read")
			}
		})
	}
}

func TestQueueErrors(t *testing.T) {
	kinds(t, 2, func(t *testing.T, q Queue) {
		const size = 64 << 10
		targets(t, size, func(t *testing.T, f *osFile) {
			arena, err := NewArena(16 << 10)
			ok(t, err)
			defer arena.Close()
			mem := arena.Bytes()
			past := []Request{
				{Buf: mem[:4096], Off: 0}, {Buf: mem[4096:8192], Off: size - 4096},
				{Buf: mem[8192:12288], Off: size}, {Buf: mem[12288:], Off: size + 8192},
			}
			if err := q.Read(f, past); !errors.Is(err, io.EOF) || !strings.Contains(err.Error(), f.name) {
				t.Errorf("read past the end: %v", err)
			}
			if err := q.Read(f, []Request{{Buf: mem[:4096], Off: size - 2048}}); !errors.Is(err, io.EOF) {
				t.Errorf("read across the end: %v", err)
			}
			if err := q.Read(f, []Request{{Buf: mem[:512], Off: -512}}); !errors.Is(err, syscall.EINVAL) {
				t.Errorf("negative offset: %v", err)
			}
			if f.block {
				if err := q.Write(f, past); !errors.Is(err, syscall.ENOSPC) {
					t.Errorf("write past the end: %v", err)
				}
			}
			ro := open(t, f.name, ReadOnly)
			if err := q.Write(ro, past[:2]); !errors.Is(err, syscall.EBADF) {
				t.Errorf("write to a read-only file: %v", err)
			}
			// The queue is good for more after all that.
			for i := range mem {
				mem[i] = byte(i / 77)
			}
			ok(t, q.Write(f, past[:2]))
			got := make([]byte, 4096)
			if _, err := f.ReadAt(got, size-4096); err != nil || !bytes.Equal(got, mem[4096:8192]) {
				t.Errorf("wrong data: %v", err)
			}
			ok(t, f.Close())
			if err := q.Read(f, past[:1]); !errors.Is(err, syscall.EBADF) && !strings.Contains(err.Error(), "closed") {
				t.Errorf("closed file: %v", err)
			}
		})
	})
}

// TestQueueFullDisk runs into the end of the space in the middle of a batch:
// the kernel's own short write and then ENOSPC.
func TestQueueFullDisk(t *testing.T) {
	for _, kind := range []Kind{Sync, URing} {
		for _, fsKind := range []string{"tmpfs", "ext4"} {
			for _, flag := range []Flag{0, Direct} {
				t.Run(fmt.Sprintf("%s %s flag %d", kind, fsKind, flag), func(t *testing.T) {
					q := newQueue(t, kind, 4)
					f := open(t, filepath.Join(smallFS(t, fsKind, 8<<20), "f"), Create|flag)
					arena, err := NewArena(16 << 20)
					ok(t, err)
					defer arena.Close()
					var batch []Request
					for off := 0; off < 16<<20; off += 300 << 10 {
						buf := arena.Bytes()[off:min(off+300<<10, 16<<20)]
						batch = append(batch, Request{Buf: buf, Off: int64(off)})
					}
					if err := q.Write(f, batch); !errors.Is(err, syscall.ENOSPC) {
						t.Errorf("%v", err)
					}
					ok(t, f.Truncate(0))
					ok(t, q.Write(f, batch[:2]))
					ok(t, f.Close())
				})
			}
		}
	}
}

// plainDevice has no descriptor to work on.
type plainDevice struct {
	Device
	calls atomic.Int64
	fail  error
}

func (d *plainDevice) ReadAt(p []byte, off int64) (int, error) {
	d.calls.Add(1)
	return d.Device.ReadAt(p, off)
}

func (d *plainDevice) WriteAt(p []byte, off int64) (int, error) {
	if d.fail != nil {
		return 0, d.fail
	}
	d.calls.Add(1)
	return d.Device.WriteAt(p, off)
}

func TestPlainDevice(t *testing.T) {
	for _, kind := range []Kind{Sync, URing} {
		t.Run(string(kind), func(t *testing.T) {
			q := newQueue(t, kind, 4)
			d := &plainDevice{Device: open(t, filepath.Join(t.TempDir(), "f"), Create)}
			batch := []Request{{Buf: []byte("world"), Off: 5}, {Off: 3}, {Buf: []byte("hello"), Off: 0}}
			ok(t, q.Write(d, batch))
			got := make([]byte, 10)
			ok(t, q.Read(d, []Request{{Buf: got, Off: 0}}))
			if string(got) != "helloworld" || d.calls.Load() != 3 {
				t.Errorf("%q after %d calls", got, d.calls.Load())
			}
			if err := q.Read(d, []Request{{Buf: got, Off: 5}}); !errors.Is(err, io.EOF) {
				t.Errorf("read past the end: %v", err)
			}
			d.fail = syscall.EIO
			if err := q.Write(d, batch); !errors.Is(err, syscall.EIO) {
				t.Errorf("failing device: %v", err)
			}
		})
	}
}

func TestNewQueue(t *testing.T) {
	for _, test := range []struct {
		kind  Kind
		depth int
	}{{Sync, 0}, {URing, -1}, {"", 1}, {"aio", 1}} {
		if q, err := NewQueue(test.kind, test.depth); err == nil {
			t.Errorf("%q, depth %d: %v", test.kind, test.depth, q)
		}
	}
	q, err := NewQueue(Auto, 8)
	ok(t, err)
	want := URing
	if err := ProbeURing(); err != nil {
		t.Logf("io_uring does not work here: %v", err)
		want = Sync
	}
	if q.Kind() != want {
		t.Errorf("auto is %s, want %s", q.Kind(), want)
	}
	ok(t, q.Close())
}

// TestQueueSteadyState: a queue that has grown to its batches allocates nothing
// more.
func TestQueueSteadyState(t *testing.T) {
	for _, kind := range []Kind{Sync, URing} {
		t.Run(string(kind), func(t *testing.T) {
			q := newQueue(t, kind, 8)
			f := open(t, filepath.Join(t.TempDir(), "f"), Create)
			arena, err := NewArena(1 << 20)
			ok(t, err)
			defer arena.Close()
			var batch []Request
			for i := range 64 {
				buf := arena.Bytes()[i*8192 : i*8192+4096]
				batch = append(batch, Request{Buf: buf, Off: int64((i * 37 % 64) * 8192)})
			}
			if n := testing.AllocsPerRun(20, func() {
				ok(t, q.Write(f, batch))
				ok(t, q.Read(f, batch))
			}); n > 0 {
				t.Errorf("%v allocations per batch", n)
			}
		})
	}
}
