package driver

import (
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// flusherEnv marks the program that Prepare has started again.
const flusherEnv = "SNAPMERGE_IO_FLUSHER"

const (
	// defaultMemory is the soft limit of the heap where no cgroup has any, in
	// bytes.
	defaultMemory = 2 << 30
	// memoryShare of a cgroup's limit is for the heap.
	memoryShare = 0.8
	// minProcs is the least GOMAXPROCS. Readers of /dev/fuse sit in system calls
	// most of the time, and each holds on to its place for a while: with no more
	// places than CPUs the others wait for one (random reads with 32 in flight are
	// 10 to 30 % faster with 8 than with 2 on 2 CPUs, and random writes a fifth faster
	// with 16 than with 8). A device has no more readers than that.
	minProcs = 16
)

// Prepare readies the process for serving block devices. It must be the first
// thing that a program does.
//
// The kernel may need memory, and to get it write out pages of a file system on
// one of our devices, which waits for us; if we then need memory, everybody waits
// for ever. As an I/O flusher (PR_SET_IO_FLUSHER of prctl(2)) we never wait for
// such writes. The mark is a thread's and is inherited, so the program is executed
// again with it before Go has its threads: Prepare does not return then. It
// returns an error if that is not allowed (CAP_SYS_RESOURCE); the program can go
// on without.
//
// It also sets a soft limit of the heap unless GOMEMLIMIT is set, and a least
// GOMAXPROCS unless that is set.
func Prepare() error {
	if os.Getenv("GOMAXPROCS") == "" && runtime.GOMAXPROCS(0) < minProcs {
		runtime.GOMAXPROCS(minProcs)
	}
	if os.Getenv("GOMEMLIMIT") == "" {
		debug.SetMemoryLimit(memoryLimit("/proc/self/cgroup", "/sys/fs/cgroup"))
	}
	if err := becomeFlusher(); err != nil {
		return fmt.Errorf("devices could deadlock when memory is short: PR_SET_IO_FLUSHER: %w", err)
	}
	return nil
}

func becomeFlusher() error {
	is, err := unix.PrctlRetInt(unix.PR_GET_IO_FLUSHER, 0, 0, 0, 0)
	if errors.Is(err, unix.EPERM) {
		return fmt.Errorf("%w (it needs CAP_SYS_RESOURCE)", err)
	}
	if err != nil || is == 1 {
		return err
	}
	if os.Getenv(flusherEnv) != "" {
		return errors.New("the kernel has not kept it")
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := unix.Prctl(unix.PR_SET_IO_FLUSHER, 1, 0, 0, 0); err != nil {
		return err
	}
	return unix.Exec("/proc/self/exe", os.Args, append(os.Environ(), flusherEnv+"=1"))
}

// memoryLimit is a share of what the process's cgroup (version 2) allows.
func memoryLimit(self, root string) int64 {
	b, err := os.ReadFile(self)
	if err != nil {
		return defaultMemory
	}
	limit := int64(math.MaxInt64)
	for line := range strings.Lines(string(b)) {
		group, ok := strings.CutPrefix(strings.TrimSpace(line), "0::")
		if !ok {
			continue
		}
		// Every group above bounds it as well.
		for dir := filepath.Clean("/" + group); ; dir = filepath.Dir(dir) {
			if n, ok := readLimit(filepath.Join(root, dir, "memory.max")); ok {
				limit = min(limit, n)
			}
			if dir == "/" {
				break
			}
		}
	}
	if limit == math.MaxInt64 {
		return defaultMemory
	}
	return int64(float64(limit) * memoryShare)
}

func readLimit(file string) (int64, bool) {
	b, err := os.ReadFile(file)
	if err != nil {
		return 0, false
	}
	n, err := strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64) // or "max"
	return n, err == nil
}
