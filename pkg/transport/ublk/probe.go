package ublk

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/snapmerge/snapmerge/pkg/transport"
)

// volumeFDs is what a volume needs for its files.
const volumeFDs = 8

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
	err = transport.Try(func(ctx context.Context, b transport.Backend, o transport.Options) (transport.Device, error) {
		return New(dir).create(ctx, "probe", b, o)
	})
	if errors.Is(err, unix.ENOENT) {
		err = fmt.Errorf("%w: the module ublk_drv is not loaded", err)
	}
	return err
}

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
	free -= int64(len(all) - t.devices.Len())
	files, err := transport.FilesFor(int64(volumeFDs + 1 + 2*min(runtime.NumCPU(), maxQueues))) // a ring and an eventfd a queue
	return max(0, min(free, files)), err
}
