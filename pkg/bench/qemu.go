package bench

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"time"

	"github.com/snapmerge/snapmerge/pkg/blockio"
)

// ErrNoQemu says that qemu-img is not installed.
var ErrNoQemu = errors.New("qemu-img is not installed (Debian, Ubuntu: qemu-utils); --compare needs it")

// findQemu tells whether there is a qemu-img, ErrNoQemu if not.
func findQemu() error {
	if _, err := exec.LookPath("qemu-img"); err != nil {
		return ErrNoQemu
	}
	return nil
}

// defaultQemuCluster is 64 KiB, as qemu-img has it, where the blocks that change
// lie together, and a block where they are scattered, because larger clusters
// would take others along.
func defaultQemuCluster(w Workload) int64 {
	if w == Incremental || w == RandCopy {
		return 4 << 10
	}
	return 64 << 10
}

// qemu measures qemu-img commit: a qcow2 overlay over a raw base holds every
// cluster in which base and expected image differ, uncompressed.
type qemu struct{ base, overlay string }

// newQemu makes the overlay. The base has its first content; later, what it has
// in the blocks of the overlay does not matter. All names are absolute.
func newQemu(ctx context.Context, base, overlay, expected string, cluster int64) (*qemu, error) {
	q := &qemu{base: base, overlay: overlay}
	// An empty overlay over the expected image looks like it; changing what it
	// lies over, with its look kept, puts the difference into it.
	if err := qemuImg(ctx, "create", "-q", "-f", "qcow2", "-o", fmt.Sprintf("cluster_size=%d", cluster), "-b", expected, "-F", "raw", overlay); err != nil {
		return nil, err
	}
	return q, qemuImg(ctx, "rebase", "-f", "qcow2", "-b", base, "-F", "raw", overlay)
}

// run measures one commit and the flush of the base that follows it, from the
// start of the program on. -d leaves the overlay as it is; emptying it would
// take longer.
func (q *qemu) run(ctx context.Context, fsys blockio.FS) (_ time.Duration, err error) {
	begin := time.Now()
	if err := qemuImg(ctx, "commit", "-q", "-t", "writeback", "-f", "qcow2", "-d", q.overlay); err != nil {
		return 0, err
	}
	f, err := fsys.Open(q.base, 0)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if err := f.Flush(); err != nil {
		return 0, err
	}
	return time.Since(begin), nil
}

func qemuImg(ctx context.Context, args ...string) error {
	var stderr bytes.Buffer
	c := exec.CommandContext(ctx, "qemu-img", args...)
	c.Stderr = &stderr
	if err := c.Run(); err != nil {
		return fmt.Errorf("qemu-img %s: %w: %s", args[0], err, bytes.TrimSpace(stderr.Bytes()))
	}
	return ctx.Err()
}
