package blockio

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"sync"
	"testing"
)

// TestReadQueues: batches of several goroutines at a time are read right, with queues
// of either kind, which are used again.
func TestReadQueues(t *testing.T) {
	const size, rounds = 512 << 10, 8
	for _, kind := range []Kind{Sync, Auto} {
		t.Run(string(kind), func(t *testing.T) {
			targets(t, size, func(t *testing.T, f *osFile) {
				want := make([]byte, size)
				rng := rand.New(rand.NewPCG(7, 7))
				for i := range want {
					want[i] = byte(rng.Uint32())
				}
				if _, err := f.WriteAt(want, 0); err != nil {
					t.Fatal(err)
				}
				r := NewReadQueues(kind)
				check := func(seed uint64) {
					rng := rand.New(rand.NewPCG(seed, 8))
					arena := make([]byte, 2*size)
					for range rounds {
						// Mostly the one has odd offsets and the other not.
						batch := append(randomBatch(rng, arena[:size], size), randomBatch(rng, arena[size:], size)...)
						if err := r.ReadBatch(f, batch); err != nil {
							t.Error(err)
							return
						}
						for _, q := range batch {
							if !bytes.Equal(q.Buf, want[q.Off:q.Off+int64(len(q.Buf))]) {
								t.Errorf("%d bytes at %d: wrong data", len(q.Buf), q.Off)
							}
						}
					}
				}
				var wg sync.WaitGroup
				for seed := range uint64(maxQueues + 4) {
					wg.Go(func() { check(seed) })
				}
				wg.Wait()
				made := r.made
				if made > maxQueues || (made == 0) != (kind == Sync || ProbeURing() != nil) {
					t.Errorf("%d queues were made", made)
				}
				check(1000)
				if r.made != made || len(r.idle) != made || len(r.threads) > 0 {
					t.Errorf("%d queues are there and %d idle, want the same %d; %d threads are at work", r.made, len(r.idle), made, len(r.threads))
				}
				past := []Request{{Buf: make([]byte, 4096)}, {Buf: make([]byte, 4096), Off: size}, {Buf: make([]byte, 10), Off: 1}}
				if err := r.ReadBatch(f, past); !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
					t.Errorf("past the end: %v", err)
				}
				late := r.take()
				if err := r.Close(); err != nil {
					t.Error(err)
				}
				if late != nil {
					r.put(late)
				}
				if len(r.idle) > 0 || r.made > 0 || r.take() != nil {
					t.Errorf("%d queues are idle after the end and %d there", len(r.idle), r.made)
				}
				if check(1001); r.made > 0 {
					t.Error("a queue was made after the end")
				}
			})
		})
	}
}

// TestReadBatch: what has no way of its own to read several places is read place by place.
func TestReadBatch(t *testing.T) {
	r := bytes.NewReader([]byte("abcdefgh"))
	batch := []Request{{Buf: make([]byte, 2), Off: 6}, {Buf: make([]byte, 3), Off: 0}}
	if err := ReadBatch(r, batch); err != nil || string(batch[0].Buf) != "gh" || string(batch[1].Buf) != "abc" {
		t.Errorf("%q, %q, %v", batch[0].Buf, batch[1].Buf, err)
	}
	batch[1].Off = 6
	if err := ReadBatch(r, batch); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("past the end: %v", err)
	}
}
