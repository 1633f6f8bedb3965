package dmuser

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/snapmerge/snapmerge/pkg/devmapper"
	"github.com/snapmerge/snapmerge/pkg/transport"
)

// mapping is the device-mapper side of devices, by their names. Tests have one
// without a kernel.
type mapping interface {
	// make makes a device with a table that is not active yet.
	make(name string, size int64, readOnly bool) error
	// activate lets requests come, and returns the path of the block device.
	activate(name string) (path string, err error)
	// find returns the path of the block device and its size in bytes, or
	// transport.ErrNotFound if there is none in service.
	find(name string) (path string, size int64, err error)
	// list returns the names of all devices.
	list() ([]string, error)
	// open opens a control node.
	open(name string) (control, error)
	// remove takes a device away that nobody uses; busy: somebody does.
	remove(name string) (busy bool, err error)
	// destroy takes a device away at once for those who serve it; its users get
	// errors.
	destroy(name string) error
}

// kernel is the mapping of this machine. The control node of a device has the
// device's name.
type kernel struct{}

func (kernel) make(name string, size int64, readOnly bool) error {
	if _, err := devmapper.Create(name, ""); err != nil {
		return err
	}
	sectors := uint64(size) >> sectorShift
	err := devmapper.LoadTable(name, readOnly, devmapper.Target{Sectors: sectors, Type: "user", Params: fmt.Sprintf("0 %d %s", sectors, name)})
	if err == nil {
		return nil
	}
	if _, e := devmapper.TargetVersion("user"); errors.Is(e, devmapper.ErrNotFound) {
		err = fmt.Errorf("%w: the kernel has no device-mapper target \"user\" (dm-user, of Android's kernels)", err)
	}
	return errors.Join(err, devmapper.Remove(name))
}

func (k kernel) activate(name string) (string, error) {
	if err := devmapper.Resume(name, 0); err != nil {
		return "", err
	}
	path, _, err := k.find(name)
	if err != nil {
		return "", err
	}
	return path, transport.MakeNode(path, blockDir(path), unix.S_IFBLK)
}

func blockDir(path string) string { return "/sys/block/" + filepath.Base(path) }

func (kernel) find(name string) (string, int64, error) {
	info, err := devmapper.Status(name)
	if errors.Is(err, devmapper.ErrNotFound) || err == nil && !info.Active {
		return "", 0, transport.ErrNotFound
	}
	if err != nil {
		return "", 0, err
	}
	table, err := devmapper.Table(name)
	if err != nil {
		return "", 0, err
	}
	if len(table) != 1 || table[0].Type != "user" {
		return "", 0, fmt.Errorf("%w: its table is %v", transport.ErrNotFound, table)
	}
	return info.Path(), int64(table[0].Sectors) << sectorShift, nil
}

func (kernel) list() ([]string, error) { return devmapper.List() }

func (kernel) open(name string) (control, error) {
	path := "/dev/dm-user/" + name
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, err
	}
	if err := transport.MakeNode(path, "/sys/class/misc/"+strings.ReplaceAll("dm-user/"+name, "/", "!"), unix.S_IFCHR); err != nil {
		return nil, err
	}
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	return node(fd), nil
}

func (kernel) remove(name string) (bool, error) {
	err := devmapper.Remove(name)
	switch {
	case errors.Is(err, devmapper.ErrBusy):
		return true, nil
	case errors.Is(err, devmapper.ErrNotFound):
		return false, nil
	}
	return false, err
}

// destroy ends the channels, too: the new table has none.
func (kernel) destroy(name string) error { return devmapper.Destroy(name) }

// tryMapping finds out whether devices can be made at all.
func tryMapping(create func(context.Context, transport.Backend, transport.Options) (transport.Device, error)) error {
	if err := devmapper.Available(); err != nil {
		return err
	}
	return transport.Try(create)
}
