package uring

import (
	"fmt"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestSubmitUninterrupted: a signal that comes during the wait stays pending, and the
// wait ends with the completion.
func TestSubmitUninterrupted(t *testing.T) {
	if _, err := os.ReadFile("/proc/self/syscall"); err != nil {
		t.Skip(err)
	}
	r := newRing(t, 4, 0)
	from, to := newPipe(t)
	mem := memory(t, 4096)

	type result struct {
		err       error
		completed bool
	}
	thread, done := make(chan int, 1), make(chan result, 1)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		thread <- unix.Gettid()
		e := r.SQE()
		e.Read(from, mem, 0)
		_, err := r.SubmitUninterrupted(1)
		_, ok := r.CQE()
		done <- result{err, ok}
	}()
	tid := <-thread
	waits := fmt.Sprintf("%d ", unix.SYS_IO_URING_ENTER)
	until(t, "waits in the kernel", func() bool { return strings.HasPrefix(taskFile(tid, "syscall"), waits) })
	if err := unix.Tgkill(unix.Getpid(), tid, unix.SIGURG); err != nil {
		t.Error(err)
	}
	until(t, "has a signal pending", func() bool {
		select {
		case res := <-done:
			t.Fatalf("the wait has ended, with a completion: %v, %v", res.completed, res.err)
		default:
		}
		_, rest, _ := strings.Cut(taskFile(tid, "status"), "SigPnd:")
		var pending uint64
		_, err := fmt.Sscanf(rest, "%x", &pending)
		return err == nil && pending>>(unix.SIGURG-1)&1 == 1
	})
	if _, err := unix.Write(to, []byte{1}); err != nil {
		t.Error(err)
	}
	if res := <-done; res.err != nil || !res.completed {
		t.Errorf("completion: %v, %v", res.completed, res.err)
	}
}

func taskFile(tid int, name string) string {
	b, err := os.ReadFile(fmt.Sprintf("/proc/self/task/%d/%s", tid, name))
	if err != nil {
		return err.Error()
	}
	return string(b)
}

func until(t *testing.T, what string, done func() bool) {
	t.Helper()
	for end := time.Now().Add(time.Minute); !done(); runtime.Gosched() {
		if time.Now().After(end) {
			t.Fatalf("it never %s", what)
		}
	}
}
