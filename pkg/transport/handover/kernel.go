package handover

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/snapmerge/snapmerge/pkg/devmapper"
	"github.com/snapmerge/snapmerge/pkg/transport"
)

var (
	errNoDevice = devmapper.ErrNotFound
	errInUse    = devmapper.ErrBusy
)

// target is a linear table of one line, from the beginning of a device.
type target struct {
	number  string // MAJOR:MINOR
	sectors int64  // of 512 bytes
}

// state is that of a device-mapper device.
type state struct {
	path      string
	active    bool // it has a table
	target         // that
	inactive  bool // another one is loaded
	suspended bool
}

// mapper is device-mapper and the loop devices of a machine. Tests have one without a
// kernel.
type mapper interface {
	create(name string) error
	load(name string, t target) error
	clear(name string) error // what was loaded
	suspend(name string) error
	resume(name string) error
	state(name string) (state, error) // errNoDevice
	remove(name string) error         // errInUse, errNoDevice
	// destroy takes a device away that may be in use: its users get errors.
	destroy(name string) error
	// number is MAJOR:MINOR of a block device.
	number(path string) (string, error)
	// loop puts a file in a loop device with the tag and with blocks as those of a
	// device; it goes when release was called and no table has it.
	loop(file, tag, like string) (number string, release func(), err error)
	// isLoop tells whether the device of that number is a loop device with the tag.
	isLoop(number, tag string) (bool, error)
}

// kernel is the mapper of this machine.
type kernel struct{}

// Available says why no device can be handed over on this machine, or nil.
func Available() error {
	if err := devmapper.Available(); err != nil {
		return err
	}
	if _, err := devmapper.TargetVersion("linear"); err != nil {
		return err
	}
	if err := unix.Access(loopControl, unix.R_OK|unix.W_OK); err != nil {
		return &os.PathError{Op: "access", Path: loopControl, Err: err}
	}
	return nil
}

func (kernel) create(name string) error { _, err := devmapper.Create(name, ""); return err }

func (kernel) load(name string, t target) error {
	return devmapper.LoadTable(name, false, devmapper.Target{Sectors: uint64(t.sectors), Type: "linear", Params: t.number + " 0"})
}

func (kernel) clear(name string) error { return devmapper.ClearTable(name) }

// suspend does not freeze a file system: it is not to be still, only its requests are.
func (kernel) suspend(name string) error { return devmapper.Suspend(name, devmapper.NoFreeze) }

func (kernel) resume(name string) error { return devmapper.Resume(name, devmapper.NoFreeze) }

func (kernel) state(name string) (state, error) {
	info, err := devmapper.Status(name)
	if (errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV)) && !inSysfs(name) {
		return state{}, errNoDevice // there is no device-mapper at all
	}
	if err != nil {
		return state{}, err
	}
	s := state{path: info.Path(), active: info.Active, inactive: info.Inactive, suspended: info.Suspended}
	if !s.active {
		return s, nil
	}
	table, err := devmapper.Table(name)
	if err != nil {
		return s, err
	}
	number, start := "", ""
	if len(table) == 1 && table[0].Type == "linear" {
		number, start, _ = strings.Cut(table[0].Params, " ")
	}
	if start != "0" {
		return s, fmt.Errorf("table of %s is not ours: %v", name, table)
	}
	s.number, s.sectors = number, int64(table[0].Sectors)
	return s, transport.MakeNode(s.path, "/sys/block/"+filepath.Base(s.path), unix.S_IFBLK)
}

// inSysfs tells whether there is a device of that name, if its control node is not;
// true also if that cannot be told.
func inSysfs(name string) bool {
	devices, err := os.ReadDir("/sys/block")
	for _, d := range devices {
		if !strings.HasPrefix(d.Name(), "dm-") {
			continue
		}
		b, err := os.ReadFile("/sys/block/" + d.Name() + "/dm/name")
		switch {
		case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ENODEV): // it is gone meanwhile
		case err != nil, strings.TrimSpace(string(b)) == name:
			return true
		}
	}
	return err != nil && !errors.Is(err, fs.ErrNotExist)
}

func (kernel) remove(name string) error { return devmapper.Remove(name) }

func (kernel) destroy(name string) error { return devmapper.Destroy(name) }

func (kernel) number(path string) (string, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return "", &os.PathError{Op: "stat", Path: path, Err: err}
	}
	return numberOf(st.Rdev), nil
}

func numberOf(rdev uint64) string { return fmt.Sprintf("%d:%d", unix.Major(rdev), unix.Minor(rdev)) }
