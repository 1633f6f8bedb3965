package devmapper

import (
	"errors"
	"fmt"
	"strconv"

	"golang.org/x/sys/unix"
)

// Create makes a device without a table. uuid may be empty; a name or uuid that
// there is already is an error.
func Create(name, uuid string) (Info, error) {
	if name == "" {
		return Info{}, errors.New("devmapper: create: empty name")
	}
	a, err := do(request{cmd: cmdCreate, name: name, uuid: uuid})
	return a.info(), failed("create", name, err)
}

// LoadTable fills the device's inactive slot. The device's length is that of its
// targets once the table is active.
func LoadTable(name string, readOnly bool, targets ...Target) error {
	data, err := encodeTargets(targets)
	if err != nil {
		return failed("load table", name, err)
	}
	r := request{cmd: cmdTableLoad, name: name, targets: len(targets), data: data}
	if readOnly {
		r.flags = flagReadOnly
	}
	_, err = do(r)
	return failed("load table", name, err)
}

// ClearTable empties the inactive slot.
func ClearTable(name string) error {
	_, err := do(request{cmd: cmdTableClear, name: name})
	return failed("clear table", name, err)
}

// SuspendFlags say what a suspension leaves out.
type SuspendFlags uint32

const (
	// NoFreeze leaves a mounted file system as it is.
	NoFreeze SuspendFlags = flagSkipLockFS
	// NoFlush leaves requests that a target has queued where they are.
	NoFlush SuspendFlags = flagNoFlush
)

// Suspend holds new requests back and waits for those in flight, however long
// they take; it must not be called by who has to answer them.
func Suspend(name string, flags SuspendFlags) error {
	return failed("suspend", name, uninterrupted(request{cmd: cmdSuspend, name: name, flags: flagSuspend | uint32(flags)}))
}

// Resume makes a loaded table the active one, and lets requests go on. A device
// in service is suspended for it, as by Suspend.
func Resume(name string, flags SuspendFlags) error {
	return failed("resume", name, uninterrupted(request{cmd: cmdSuspend, name: name, flags: uint32(flags)}))
}

// uninterrupted tries again when a signal ends a wait. A resume that was
// interrupted keeps the loaded table.
func uninterrupted(r request) error {
	for {
		if _, err := do(r); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// Remove takes a device away that nobody uses, else ErrBusy.
func Remove(name string) error {
	_, err := do(request{cmd: cmdRemove, name: name})
	return failed("remove", name, err)
}

// RemoveWhenUnused takes the device away now or, if it is in use, when its last
// user has closed it.
func RemoveWhenUnused(name string) error {
	_, err := do(request{cmd: cmdRemove, name: name, flags: flagDeferredRemove})
	return failed("remove", name, err)
}

// Destroy takes a device away that may be in use: a table that fails everything is
// swapped in, so its users get errors, and it goes when the last of them has closed
// it. It does not freeze a file system or wait for a flush, both of which would need
// the device. That there is no such device is no error.
func Destroy(name string) error {
	info, err := Status(name)
	if err == nil && info.Active {
		var table []Target
		if table, err = Table(name); err == nil && len(table) > 0 {
			last := table[len(table)-1]
			err = LoadTable(name, false, Target{Sectors: last.Start + last.Sectors, Type: "error"})
		}
		if err == nil {
			err = Resume(name, NoFreeze|NoFlush)
		}
	}
	if err == nil {
		err = RemoveWhenUnused(name)
	}
	if errors.Is(err, ErrNotFound) {
		return nil
	}
	return err
}

// Status returns the device's state, or ErrNotFound.
func Status(name string) (Info, error) {
	a, err := do(request{cmd: cmdStatus, name: name})
	return a.info(), failed("status", name, err)
}

// Table returns the active table.
func Table(name string) ([]Target, error) {
	a, err := do(request{cmd: cmdTableStatus, name: name, flags: flagStatusTable})
	if err != nil {
		return nil, failed("table", name, err)
	}
	targets, err := decodeTargets(a.data, a.targets)
	return targets, failed("table", name, err)
}

// List returns the names of all devices.
func List() ([]string, error) {
	a, err := do(request{cmd: cmdListDevices})
	if err != nil {
		return nil, failed("list", "devices", err)
	}
	names, err := decodeNames(a.data)
	return names, failed("list", "devices", err)
}

// TargetVersion returns the version of a target type that is loaded, such as
// "1.0.0", or ErrNotFound.
func TargetVersion(target string) (string, error) {
	a, err := do(request{cmd: cmdListVersions})
	if err != nil {
		return "", failed("list", "target versions", err)
	}
	versions, err := decodeVersions(a.data)
	if err != nil {
		return "", failed("list", "target versions", err)
	}
	v, ok := versions[target]
	if !ok {
		return "", fmt.Errorf("devmapper: target %q: %w", target, ErrNotFound)
	}
	return v, nil
}

func failed(what, name string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("devmapper: %s %s: %w", what, name, err)
}

func encodeTargets(targets []Target) ([]byte, error) {
	var data []byte
	for _, t := range targets {
		if len(t.Type) >= typeSize {
			return nil, fmt.Errorf("target type %q is too long", t.Type)
		}
		n := (targetSize + len(t.Params) + 1 + 7) &^ 7
		b := make([]byte, n)
		native.PutUint64(b, t.Start)
		native.PutUint64(b[8:], t.Sectors)
		native.PutUint32(b[20:], uint32(n))
		copy(b[24:], t.Type)
		copy(b[targetSize:], t.Params)
		data = append(data, b...)
	}
	return data, nil
}

var errAnswer = errors.New("the kernel's answer is not understood")

// decodeTargets: here next counts from the beginning of the data.
func decodeTargets(data []byte, n int) ([]Target, error) {
	var targets []Target
	for at := uint32(0); len(targets) < n; {
		if uint64(at)+targetSize > uint64(len(data)) {
			return nil, errAnswer
		}
		b := data[at:]
		targets = append(targets, Target{native.Uint64(b), native.Uint64(b[8:]), text(b[24:targetSize]), text(b[targetSize:])})
		next := native.Uint32(b[20:])
		if next <= at && len(targets) < n {
			return nil, errAnswer
		}
		at = next
	}
	return targets, nil
}

// entries calls f with each entry of a list whose entries have the distance to
// the next one at offset next, 0 in the last.
func entries(data []byte, next, least int, f func(b []byte)) error {
	for {
		if len(data) < least {
			return errAnswer
		}
		f(data)
		n := native.Uint32(data[next:])
		if n == 0 {
			return nil
		}
		if uint64(n) > uint64(len(data)) {
			return errAnswer
		}
		data = data[n:]
	}
}

func decodeNames(data []byte) (names []string, err error) {
	if len(data) == 0 {
		return nil, nil // no devices
	}
	err = entries(data, 8, 12, func(b []byte) {
		if native.Uint64(b) != 0 {
			names = append(names, text(b[12:]))
		}
	})
	return names, err
}

func decodeVersions(data []byte) (map[string]string, error) {
	versions := map[string]string{}
	err := entries(data, 0, 16, func(b []byte) {
		v := ""
		for i := range 3 {
			v += "." + strconv.FormatUint(uint64(native.Uint32(b[4+4*i:])), 10)
		}
		versions[text(b[16:])] = v[1:]
	})
	return versions, err
}

// Available says why device-mapper cannot be used here, or nil.
func Available() error {
	_, err := do(request{cmd: cmdVersion})
	return failed("version", "of the interface", err)
}
