package nodebench

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/snapmerge/snapmerge/pkg/blockio"
)

// resident is the memory that a process has at the moment, peak what it had at the
// most since it was started, in bytes.
func resident(pid int) (int64, error) { return statusField(pid, "VmRSS") }
func peak(pid int) (int64, error)     { return statusField(pid, "VmHWM") }

// statusField reads a size from proc_pid_status(5), in bytes.
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

// loadRequest is the length of a read of readAndWrite, in bytes.
const loadRequest = 256 << 10

// readAndWrite reads a device from its beginning, and beside that writes blocks anywhere
// with a flush after each, until ctx ends. Both go past the page cache.
func readAndWrite(ctx context.Context, device string, size int64, seed uint64) (err error) {
	fd, err := unix.Open(device, unix.O_RDWR|unix.O_DIRECT|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: device, Err: err}
	}
	defer func() { err = errors.Join(err, unix.Close(fd)) }()
	mem, err := blockio.NewArena(loadRequest + blockio.BlockSize)
	if err != nil {
		return err
	}
	defer mem.Close()
	in, out := mem.Bytes()[:loadRequest], mem.Bytes()[loadRequest:]
	var g errgroup.Group
	g.Go(func() error {
		for off := int64(0); ctx.Err() == nil; off = (off + loadRequest) % (size - size%loadRequest) {
			if _, err := unix.Pread(fd, in, off); err != nil {
				return fmt.Errorf("%s: read at %d: %w", device, off, err)
			}
		}
		return nil
	})
	g.Go(func() error {
		for r := rand.New(rand.NewPCG(seed, 1)); ctx.Err() == nil; {
			off := r.Int64N(size/blockio.BlockSize) * blockio.BlockSize
			if _, err := unix.Pwrite(fd, out, off); err != nil {
				return fmt.Errorf("%s: write at %d: %w", device, off, err)
			}
			if err := unix.Fdatasync(fd); err != nil {
				return fmt.Errorf("%s: flush: %w", device, err)
			}
		}
		return nil
	})
	return g.Wait()
}
