package transport

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// tryTimeout is long enough for a machine that is busy and short enough for one
// that does not work.
const tryTimeout = 10 * time.Second

// Try makes a small read-only device, reads it and takes it away again: what a
// transport's Probe does.
func Try(create func(context.Context, Backend, Options) (Device, error)) error {
	ctx, cancel := context.WithTimeout(context.Background(), tryTimeout)
	defer cancel()
	d, err := create(ctx, TryBackend{}, Options{ReadOnly: true})
	if err != nil {
		return err
	}
	done := make(chan error, 1)
	go func() { done <- tryRead(d.Path()) }()
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

func tryRead(path string) error {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_DIRECT|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: path, Err: err}
	}
	defer unix.Close(fd)
	p, err := unix.Mmap(-1, 0, BlockSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return err
	}
	defer unix.Munmap(p)
	if n, err := unix.Pread(fd, p, 0); err != nil || n != BlockSize {
		return fmt.Errorf("read %d bytes of %s: %w", n, path, err)
	}
	if p[0] != tryByte || p[BlockSize-1] != tryByte {
		return fmt.Errorf("%s: read something else than the backend gave", path)
	}
	return nil
}

// TryBackend is the volume of Try: one block that cannot be written.
type TryBackend struct{}

const tryByte = 0x5a

// ReadAt and the others are those of Backend.
func (TryBackend) ReadAt(p []byte, _ int64) (int, error) {
	for i := range p {
		p[i] = tryByte
	}
	return len(p), nil
}

// WriteAt refuses.
func (TryBackend) WriteAt([]byte, int64) (int, error) { return 0, unix.EROFS }

// Flush has nothing to do.
func (TryBackend) Flush() error { return nil }

// Zero refuses.
func (TryBackend) Zero(_, _ int64) error { return unix.EROFS }

// Size is that of a block.
func (TryBackend) Size() int64 { return BlockSize }

// spareFDs is what a process needs for all else than its volumes.
const spareFDs = 256

// FilesFor is for how many volumes a process may have open files if each needs so
// many.
func FilesFor(perVolume int64) (int64, error) {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return 0, os.NewSyscallError("getrlimit", err)
	}
	return max(0, (int64(min(limit.Max, 1<<30))-spareFDs)/perVolume), nil
}
