package bench

import (
	"errors"
	"fmt"
	"os"
	"runtime/debug"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/snapmerge/snapmerge/pkg/blockio"
)

// slowFlushFS adds a delay to every flush of a file. Queues go past it, as to
// any blockio.Wrapper.
type slowFlushFS struct {
	blockio.FS
	delay time.Duration
}

func (s slowFlushFS) Open(name string, flag blockio.Flag) (blockio.File, error) {
	f, err := s.FS.Open(name, flag)
	if err != nil {
		return nil, err
	}
	return slowFlushFile{f, s.delay}, nil
}

type slowFlushFile struct {
	blockio.File
	delay time.Duration
}

func (f slowFlushFile) Flush() error {
	err := f.File.Flush()
	time.Sleep(f.delay)
	return err
}

// Unwrap implements blockio.Wrapper.
func (f slowFlushFile) Unwrap() blockio.Device { return f.File }

// dropCaches writes out the file system, others are nobody's business here, and
// empties the page cache: all of it as root, else that of the files.
func (b *bench) dropCaches(files ...string) error {
	if err := syncFS(b.o.Dir); err != nil {
		return err
	}
	err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0)
	if err == nil {
		return nil
	}
	b.warn.Do(func() {
		b.o.Note("caches cannot be dropped (%v): only pages of the files are, so the file system's own data stay in memory", err)
	})
	for _, name := range files {
		if err := dropFile(name); err != nil {
			return err
		}
	}
	return nil
}

// syncFS writes out the file system that the directory is on.
func syncFS(dir string) (err error) {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if err := unix.Syncfs(int(f.Fd())); err != nil {
		return fmt.Errorf("%s: sync of the file system: %w", dir, err)
	}
	return nil
}

func dropFile(name string) (err error) {
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
		return fmt.Errorf("%s: drop cached pages: %w", name, err)
	}
	return nil
}

// usage is what the process used up.
type usage struct {
	cpu      time.Duration
	switches int64 // of threads, voluntary or not
	syscalls int64 // 0: unknown
	peakRSS  int64 // bytes; 0: unknown

	counter *syscallCounter
}

// startUsage begins to count.
func startUsage() usage {
	debug.FreeOSMemory()
	// Starts the peak anew (Documentation/filesystems/proc.rst, clear_refs); where
	// that is not possible the peak is that of the process's whole life.
	_ = os.WriteFile("/proc/self/clear_refs", []byte("5"), 0)
	u := readUsage()
	u.counter = startSyscalls()
	return u
}

// end is what was used since.
func (u usage) end() usage {
	calls, now := u.counter.end(), readUsage()
	peak, err := PeakRSS(os.Getpid())
	if err != nil {
		peak = 0
	}
	return usage{cpu: now.cpu - u.cpu, switches: now.switches - u.switches, syscalls: calls, peakRSS: peak}
}

func readUsage() usage {
	var r unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &r); err != nil {
		return usage{}
	}
	return usage{
		cpu:      time.Duration(r.Utime.Nano() + r.Stime.Nano()),
		switches: r.Nvcsw + r.Nivcsw,
	}
}

// PeakRSS is what a process had in memory at the most, CurrentRSS what it has, in bytes
// (proc_pid_status(5), VmHWM and VmRSS).
func PeakRSS(pid int) (int64, error)    { return statusField(pid, "VmHWM") }
func CurrentRSS(pid int) (int64, error) { return statusField(pid, "VmRSS") }

func statusField(pid int, name string) (int64, error) {
	path := fmt.Sprintf("/proc/%d/status", pid)
	b, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(b)) {
		if rest, ok := strings.CutPrefix(line, name+":"); ok {
			kib, err := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(rest), " kB"), 10, 64)
			return kib << 10, err
		}
	}
	return 0, fmt.Errorf("%s has no %s", path, name)
}
