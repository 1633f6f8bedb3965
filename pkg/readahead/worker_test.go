package readahead

import (
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestWorkerPriority: a worker gives way to others, but not while a read waits for
// it.
func TestWorkerPriority(t *testing.T) {
	if !mayRaise() {
		t.Skip("a thread may not get its priority back here (no CAP_SYS_NICE): workers are like other threads")
	}
	normal, low := niceness(), min(niceness()+nicer, niceMax)
	if normal == low {
		t.Skip("this process cannot get any nicer")
	}
	m := newManager(Config{Mode: Async, Window: 3 * ChunkBytes}, clock{time.Now, func(time.Duration) <-chan time.Time { return nil }}) // nobody is late
	tids, goOn := make(chan int), make(chan struct{})
	h := m.Open("", Source{Load: func([]byte, uint64) (Loaded, error) {
		tids <- unix.Gettid()
		<-goOn
		return Loaded{Have: 1, Until: 1}, nil
	}})
	m.wg.Go(m.worker)
	m.mu.Lock()
	h.submitLocked(0, 0, 1)
	m.mu.Unlock()

	wantNice(t, <-tids, low)
	goOn <- struct{}{}
	tid := <-tids
	wantNice(t, tid, low)
	read := make(chan error)
	go func() {
		_, err := h.Read(Reader{Committed: func() uint64 { return 0 }}, make([]byte, bs), ChunkBytes)
		read <- err
	}()
	wantNice(t, tid, normal)
	goOn <- struct{}{}
	if err := <-read; err != nil {
		t.Error(err)
	}
	wantNice(t, <-tids, low)
	goOn <- struct{}{}
	h.Close()
	if err := m.Close(); err != nil {
		t.Error(err)
	}
}

// wantNice waits until the nice value of a thread is what it should be.
func wantNice(t *testing.T, tid, want int) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); ; runtime.Gosched() {
		got, err := unix.Getpriority(unix.PRIO_PROCESS, tid)
		if got = 20 - got; err == nil && got == want {
			return
		}
		if err != nil || time.Now().After(end) {
			t.Fatalf("the worker's nice value is %d (%v), want %d", got, err, want)
		}
	}
}
