package driver

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"
	utilexec "k8s.io/utils/exec"

	"github.com/snapmerge/snapmerge/pkg/volume"
)

// Exit codes of the tools.
const (
	blkidNothing    = 2 // nothing recognised
	blkidAmbiguous  = 8 // several signatures
	fsckUncorrected = 4 // bit 2 and above: errors are left, or it could not work
)

// run runs a tool to its end, or kills it when ctx ends, and returns what it
// printed and its exit code. err is nil if it ran and ended by itself.
func (p *plugin) run(ctx context.Context, name string, args ...string) (out string, exit int, err error) {
	b, err := p.exec.CommandContext(ctx, name, args...).CombinedOutput()
	out = strings.TrimSpace(string(b))
	klog.V(4).InfoS("Tool", "name", name, "args", args, "output", out, "err", err)
	var e utilexec.ExitError
	if errors.As(err, &e) && ctx.Err() == nil && e.Exited() {
		return out, e.ExitStatus(), nil
	}
	if err != nil {
		return out, -1, fmt.Errorf("%s: %w: %s", name, errors.Join(err, ctx.Err()), out)
	}
	return out, 0, nil
}

// must is run for a tool that fails with any exit code but 0.
func (p *plugin) must(ctx context.Context, name string, args ...string) error {
	out, exit, err := p.run(ctx, name, args...)
	if err == nil && exit != 0 {
		err = fmt.Errorf("%s: exit code %d: %s", name, exit, out)
	}
	return err
}

// signature is the type of what lies on the device as blkid tells it; "" if
// there is nothing that it recognises.
func (p *plugin) signature(ctx context.Context, dev string) (string, error) {
	out, exit, err := p.run(ctx, "blkid", "-p", "-s", "TYPE", "-s", "PTTYPE", "-o", "export", dev)
	switch {
	case err != nil:
		return "", err
	case exit == blkidNothing:
		return "", nil
	case exit == blkidAmbiguous:
		return "", fmt.Errorf("%s: %w: it has the signatures of several file systems", dev, errContent)
	case exit != 0:
		return "", fmt.Errorf("blkid %s: exit code %d: %s", dev, exit, out)
	}
	for line := range strings.Lines(out) {
		if fsType, ok := strings.CutPrefix(strings.TrimSpace(line), "TYPE="); ok {
			return fsType, nil
		}
	}
	return "something without a file system", nil // a partition table
}

// prepareFS sees to it that the device has the file system that is asked for, in
// good order, and returns its type. Nothing that may hold data is ever
// formatted (design, rule 10).
func (p *plugin) prepareFS(ctx context.Context, rec *volume.Record, dev string, want string) (string, error) {
	if rec.Blank {
		fsType := fsTypeOr(want, defaultFS)
		return fsType, p.format(ctx, dev, fsType)
	}
	have, err := p.signature(ctx, dev)
	switch {
	case err != nil:
		return "", err
	case have == "":
		return "", fmt.Errorf("volume %s: %w: it is in use already and nothing on it is recognised; it is not formatted", rec.ID, errContent)
	case want != "" && have != want, minSize[have] == 0:
		return "", fmt.Errorf("volume %s: %w: it has %s, wanted is %s; it is not formatted", rec.ID, errContent, have, fsTypeOr(want, "a file system"))
	}
	return have, p.check(ctx, dev, have)
}

// format makes a file system on a blank device. What an interrupted attempt left
// is no reason to stop; both tools discard the whole device first, which here
// means that it is zeros.
func (p *plugin) format(ctx context.Context, dev, fsType string) error {
	args := []string{"-q", "-F", "-m", "0", dev}
	if fsType == xfs {
		args = []string{"-q", "-f", dev}
	}
	return p.must(ctx, "mkfs."+fsType, args...)
}

// check repairs what can be repaired without a question. For xfs that is the
// replay of its log, which mounting does; xfs_repair would read all its metadata,
// and wants the log replayed anyway.
func (p *plugin) check(ctx context.Context, dev, fsType string) error {
	if fsType != ext4 {
		return nil
	}
	out, exit, err := p.run(ctx, "e2fsck", "-p", dev)
	if err != nil {
		return err
	}
	if exit >= fsckUncorrected {
		return fmt.Errorf("%w: e2fsck -p %s: exit code %d: %s", errContent, dev, exit, out)
	}
	if exit != 0 {
		klog.InfoS("File system repaired", "device", dev, "output", out)
	}
	return nil
}

// mountOptions are those asked for and those that our volumes need.
func mountOptions(fsType string, asked []string, readOnly bool) []string {
	o := slices.Clone(asked)
	if readOnly {
		o = append(o, "ro")
	}
	if fsType == xfs && !slices.Contains(o, "nouuid") {
		// A restored volume has the UUID of its source, which may be mounted.
		o = append(o, "nouuid")
	}
	return o
}

// grow makes the mounted file system as large as its device. For ext4 that takes
// growsMounted.
func (p *plugin) grow(ctx context.Context, dev, path, fsType string) error {
	if fsType == xfs {
		return p.must(ctx, "xfs_growfs", "-d", path)
	}
	if !p.growsMounted {
		return fmt.Errorf("%w: growing a mounted ext4 needs CAP_SYS_RESOURCE; it will grow when the volume is staged next", errState)
	}
	return p.must(ctx, "resize2fs", dev)
}

// growUnmounted is grow for an ext4 that is not mounted. It is second best:
// resize2fs wants the whole file system checked first, and what it does is not
// journaled. If it is interrupted the next check mends that.
func (p *plugin) growUnmounted(ctx context.Context, dev string) error {
	out, exit, err := p.run(ctx, "e2fsck", "-f", "-p", dev)
	if err != nil {
		return err
	}
	if exit >= fsckUncorrected {
		return fmt.Errorf("%w: e2fsck -f -p %s: exit code %d: %s", errContent, dev, exit, out)
	}
	return p.must(ctx, "resize2fs", dev)
}

// mayResize tells whether the kernel lets this process grow a mounted ext4.
func mayResize() bool {
	h := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var d [2]unix.CapUserData
	err := unix.Capget(&h, &d[0])
	return err == nil && d[0].Effective&(1<<unix.CAP_SYS_RESOURCE) != 0
}
