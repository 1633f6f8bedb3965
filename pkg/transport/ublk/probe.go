package ublk

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/snapmerge/snapmerge/pkg/transport"
)

// probeTimeout is long enough for a machine that is busy and short enough for
// one that does not work.
const probeTimeout = 10 * time.Second

const (
	// spareFDs is what a process needs for all else.
	spareFDs = 256
	// volumeFDs is what a volume needs for its files.
	volumeFDs = 8
)

// Probe makes a small device, reads it and takes it away again.
func (t *Transport) Probe() error {
	if err := probe(); err != nil {
		return fmt.Errorf("ublk: %w", err)
	}
	return nil
}

func probe() error {
	dir, err := os.MkdirTemp("", "snapmerge-ublk-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	ctx, cancel := context.WithTimeout(context.Background(), probeTimeout)
	defer cancel()
	d, err := New(dir).create(ctx, "probe", probeBackend{}, transport.Options{ReadOnly: true})
	if errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("%w: the module ublk_drv is not loaded", err)
	}
	if err != nil {
		return err
	}
	done := make(chan error, 1)
	go func() { done <- probeRead(d.Path()) }()
	select {
	case err = <-done:
	case <-ctx.Done():
		err = errors.New("reading the device hangs")
	}
	if err != nil {
		return errors.Join(err, d.Abort())
	}
	return d.Close(ctx)
}

func probeRead(path string) error {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_DIRECT|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: path, Err: err}
	}
	defer unix.Close(fd)
	p, err := unix.Mmap(-1, 0, blockSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return err
	}
	defer unix.Munmap(p)
	if n, err := unix.Pread(fd, p, 0); err != nil || n != blockSize {
		return fmt.Errorf("read %d bytes of %s: %w", n, path, err)
	}
	if p[0] != probeByte || p[blockSize-1] != probeByte {
		return fmt.Errorf("%s: read something else than the backend gave", path)
	}
	return nil
}

// probeBackend is a block of probeByte.
type probeBackend struct{}

const probeByte = 0x5a

func (probeBackend) ReadAt(p []byte, _ int64) (int, error) {
	for i := range p {
		p[i] = probeByte
	}
	return len(p), nil
}
func (probeBackend) WriteAt([]byte, int64) (int, error) { return 0, unix.EROFS }
func (probeBackend) Flush() error                       { return nil }
func (probeBackend) Zero(_, _ int64) error              { return unix.EROFS }
func (probeBackend) Size() int64                        { return blockSize }

// SurvivesRestart says why devices would not survive a restart of this process,
// or nil.
//
// The driver of kernel 6.12 can complete a fetch twice, once with a request and
// once as cancelled, when its server is killed at the moment in which the request
// arrives; what io_uring then frees twice takes the whole machine down. In tests
// that happened about once in 60 kills under load. There is no flag for the
// correction; kernels that can change the size of a device are younger than it.
func (t *Transport) SurvivesRestart() error {
	c, err := t.control()
	if err != nil {
		return fmt.Errorf("ublk: %w", err)
	}
	c.close()
	if t.knows(flagUpdateSize) {
		return nil
	}
	return errors.New("ublk: a driver as old as this one (before kernel 6.16) can crash the machine when the serving process is killed under load")
}

// maxDevicesPath is the driver's parameter, which can be written.
const maxDevicesPath = "/sys/module/ublk_drv/parameters/ublks_max"

// MaxVolumes is how many devices this process could have at a time: bounded by
// the driver's parameter ublks_max less what others have, and by descriptors.
func (t *Transport) MaxVolumes() (int64, error) {
	b, err := os.ReadFile(maxDevicesPath)
	if err != nil {
		return 0, err
	}
	var free int64
	if _, err := fmt.Sscan(strings.TrimSpace(string(b)), &free); err != nil {
		return 0, fmt.Errorf("%s: %w", maxDevicesPath, err)
	}
	all, err := filepath.Glob(charClass + "/ublkc*")
	if err != nil {
		return 0, err
	}
	t.mu.Lock()
	free -= int64(len(all) - len(t.devices))
	t.mu.Unlock()
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return 0, os.NewSyscallError("getrlimit", err)
	}
	perVolume := int64(volumeFDs + 1 + 2*min(runtime.NumCPU(), maxQueues)) // a ring and an eventfd a queue
	files := (int64(min(limit.Max, 1<<30)) - spareFDs) / perVolume
	return max(0, min(free, files)), nil
}
