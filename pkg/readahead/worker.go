package readahead

import (
	"runtime"
	"sync"

	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"
)

const (
	// nicer is by how much the nice value of workers is above that of the process:
	// where processors are scarce requests go first, each of which is a thread, too. A
	// worker still gets a tenth of what another thread does.
	nicer = 10
	// niceMax is the most that there is (sched(7)).
	niceMax = 19
)

// poolSize is how many workers there are: one for each processor that is left by a
// reader. With more of them no more is unpacked, but when requests take the processors
// there are as many chunks half done. A disk is kept busy by the readers, too, which
// load what no worker has come to.
func poolSize() int { return min(max(runtime.NumCPU()-1, 1), 8) }

// worker is one of the pool.
type worker struct {
	tid    int // 0: its thread is like others
	nice   int // of others
	raised bool
}

// worker does tasks until there will be none.
func (m *Manager) worker() {
	w := &worker{}
	if mayRaise() {
		runtime.LockOSThread() // for ever: the thread ends with the worker
		w.tid, w.nice = unix.Gettid(), niceness()
		w.set(w.nice + nicer)
	}
	for m.next(w) {
	}
}

// raiseLocked: a request waits for what the worker loads, so that it is no less
// urgent than other requests. w may be nil: no worker loads it. Manager.mu must be
// held.
func (w *worker) raiseLocked() {
	if w != nil && w.tid != 0 && !w.raised {
		w.raised = true
		w.set(w.nice)
	}
}

// lowerLocked: nobody waits for it any more. Manager.mu must be held.
func (w *worker) lowerLocked() {
	if w != nil && w.raised {
		w.raised = false
		w.set(w.nice + nicer)
	}
}

func (w *worker) set(nice int) {
	if err := unix.Setpriority(unix.PRIO_PROCESS, w.tid, min(nice, niceMax)); err != nil {
		klog.ErrorS(err, "The priority of a thread that reads ahead stays as it is", "nice", nice)
	}
}

// niceness is that of the calling thread.
func niceness() int {
	const zero = 20 // what the system call says of 0 (getpriority(2))
	n, err := unix.Getpriority(unix.PRIO_PROCESS, 0)
	if err != nil {
		return 0
	}
	return zero - n
}

// mayRaise tells whether a thread may get its priority back (CAP_SYS_NICE, or
// RLIMIT_NICE): a worker without one that a request waits for would be worse than
// one with.
var mayRaise = sync.OnceValue(func() bool {
	may := make(chan bool)
	go func() {
		runtime.LockOSThread() // for ever: the thread, which may be left with its priority, ends
		w := worker{tid: unix.Gettid(), nice: niceness()}
		may <- unix.Setpriority(unix.PRIO_PROCESS, w.tid, min(w.nice+1, niceMax)) == nil &&
			unix.Setpriority(unix.PRIO_PROCESS, w.tid, w.nice) == nil
	}()
	return <-may
})
