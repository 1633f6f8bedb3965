package nodebench

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/snapmerge/snapmerge/pkg/blockio"
	"github.com/snapmerge/snapmerge/pkg/localnode"
)

// cleanUp ends a node, if there is one, and removes the directory with its files. After
// a failure it returns the end of the node's log.
func cleanUp(node *localnode.Node, dir string, failed error) error {
	var errs []error
	if node != nil {
		errs = append(errs, node.Close())
	}
	if errors.Join(append(errs, failed)...) != nil {
		errs = append(errs, localnode.LogTail(filepath.Join(dir, "node.log")))
	}
	mounted, err := localnode.Mounted(dir)
	errs = append(errs, err)
	if mounted {
		return errors.Join(append(errs, fmt.Errorf("mounts are left below %s", dir))...) // what is mounted is not removed
	}
	return errors.Join(append(errs, os.RemoveAll(dir))...)
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
