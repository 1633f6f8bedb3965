// Package devmapper makes and changes device-mapper devices by ioctls on
// /dev/mapper/control.
//
// A device has two slots for tables, an active and an inactive one. LoadTable
// fills the inactive one; Resume makes it the active one. Where the device is in
// service Resume suspends it first: it holds new requests back, waits for those in
// flight, changes the tables and lets everything go on. The wait ends early when a
// signal arrives, as the Go runtime sends them to its own threads at any time, so
// Resume tries again.
//
// # Kernel interface
//
// Of linux/dm-ioctl.h, version 4, in the machine's byte order. The request codes
// are _IOWR(0xfd, number, struct dm_ioctl). The argument begins with a struct
// dm_ioctl, 312 bytes, which the kernel fills in; what goes with it follows at
// data_start. Strings end with a NUL.
//
//	  0  12  version          three u32: 4, 0, 0
//	 12   4  data_size        of the whole argument; in an answer without data less than data_start
//	 16   4  data_start       312; in an answer: where its data begins
//	 20   4  target_count     of the table; in an answer too
//	 24   4  open_count
//	 28   4  flags            DM_*_FLAG below
//	 32   4  event_nr
//	 36   4  padding
//	 40   8  dev              major and minor, as in stat(2)
//	 48 128  name
//	176 129  uuid
//	305   7  padding
//
//	number  ioctl            data
//	 0      DM_VERSION
//	 2      DM_LIST_DEVICES  answer: per device dev 0 (u64), next 8 (u32, to the next entry; 0: last),
//	                         name 12; no device: dev 0
//	 3      DM_DEV_CREATE
//	 4      DM_DEV_REMOVE
//	 6      DM_DEV_SUSPEND   with DM_SUSPEND_FLAG; without it it resumes
//	 7      DM_DEV_STATUS
//	 9      DM_TABLE_LOAD    targets
//	10      DM_TABLE_CLEAR
//	12      DM_TABLE_STATUS  answer: targets; with DM_STATUS_TABLE_FLAG their parameters
//	13      DM_LIST_VERSIONS answer: per target next 0 (u32), version 4 (three u32), name 16
//
//	struct dm_target_spec, 40 bytes, then its parameters, padded to 8 bytes
//	  0   8  sector_start
//	  8   8  length           in sectors of 512 bytes
//	 16   4  status
//	 20   4  next             to the next target; in answers counted from data_start
//	 24  16  target_type
//
//	flags: 1 read-only, 2 suspend, 16 parameters instead of status, 256 buffer was too short,
//	1024 do not freeze the file system, 2048 do not flush, 1<<17 remove when closed
package devmapper

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// controlPath is the device that all ioctls go to.
const controlPath = "/dev/mapper/control"

const (
	headerSize = 312
	targetSize = 40
	nameSize   = 128 // with its NUL
	uuidSize   = 129
	typeSize   = 16
)

const (
	cmdVersion      = 0
	cmdListDevices  = 2
	cmdCreate       = 3
	cmdRemove       = 4
	cmdSuspend      = 6
	cmdStatus       = 7
	cmdTableLoad    = 9
	cmdTableClear   = 10
	cmdTableStatus  = 12
	cmdListVersions = 13
)

const (
	flagReadOnly       = 1 << 0
	flagSuspend        = 1 << 1
	flagStatusTable    = 1 << 4
	flagActivePresent  = 1 << 5
	flagInactive       = 1 << 6
	flagBufferFull     = 1 << 8
	flagSkipLockFS     = 1 << 10
	flagNoFlush        = 1 << 11
	flagDeferredRemove = 1 << 17
)

var native = binary.NativeEndian

var (
	// ErrNotFound says that there is no such device.
	ErrNotFound = errors.New("no such device-mapper device")
	// ErrBusy says that the device is open, mounted or under another device.
	ErrBusy = errors.New("device-mapper device is in use")
)

// Target is a line of a table.
type Target struct {
	Start, Sectors uint64 // of 512 bytes
	Type           string // such as "linear"
	Params         string
}

// Info is the state of a device.
type Info struct {
	Major, Minor uint32
	OpenCount    int // openers, mounts and devices above it
	ReadOnly     bool
	Suspended    bool
	Active       bool // it has an active table
	Inactive     bool // a table is loaded and not active yet
}

// Path is the device's node as the kernel calls it, such as /dev/dm-3.
func (i Info) Path() string { return fmt.Sprintf("/dev/dm-%d", i.Minor) }

// request is an ioctl.
type request struct {
	cmd     uintptr
	name    string
	uuid    string
	flags   uint32
	targets int
	data    []byte
}

// answer is what comes back.
type answer struct {
	flags   uint32
	targets int
	open    int
	dev     uint64
	data    []byte
}

// maxAnswer bounds the buffer for an answer, in bytes.
const maxAnswer = 16 << 20

// do carries out an ioctl, with a larger buffer if the answer needs it.
func do(r request) (answer, error) {
	if len(r.name) >= nameSize || len(r.uuid) >= uuidSize {
		return answer{}, fmt.Errorf("name %q or uuid %q is too long", r.name, r.uuid)
	}
	fd, err := unix.Open(controlPath, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return answer{}, &os.PathError{Op: "open", Path: controlPath, Err: err}
	}
	defer unix.Close(fd)
	for size := headerSize + len(r.data) + 16<<10; ; size *= 4 {
		buf := r.encode(size)
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), 3<<30|headerSize<<16|0xfd<<8|r.cmd, uintptr(unsafe.Pointer(&buf[0])))
		runtime.KeepAlive(buf)
		switch errno {
		case 0:
		case unix.ENXIO, unix.ENODEV:
			return answer{}, ErrNotFound
		case unix.EBUSY:
			return answer{}, fmt.Errorf("%w: %w", ErrBusy, errno)
		default:
			return answer{}, errno
		}
		a, err := decode(buf)
		if err != nil || a.flags&flagBufferFull == 0 {
			return a, err
		}
		if size > maxAnswer {
			return answer{}, errors.New("the answer is too long")
		}
	}
}

func (r request) encode(size int) []byte {
	b := make([]byte, size)
	native.PutUint32(b, 4)
	native.PutUint32(b[12:], uint32(size))
	native.PutUint32(b[16:], headerSize)
	native.PutUint32(b[20:], uint32(r.targets))
	native.PutUint32(b[28:], r.flags)
	copy(b[48:48+nameSize-1], r.name)
	copy(b[176:176+uuidSize-1], r.uuid)
	copy(b[headerSize:], r.data)
	return b
}

func decode(b []byte) (answer, error) {
	start, end := native.Uint32(b[16:]), native.Uint32(b[12:])
	a := answer{
		flags: native.Uint32(b[28:]), targets: int(native.Uint32(b[20:])), open: int(int32(native.Uint32(b[24:]))), dev: native.Uint64(b[40:]),
	}
	switch {
	case end > uint32(len(b)):
		return a, fmt.Errorf("answer of %d bytes in %d", end, len(b))
	case start < end: // else it has no data
		a.data = b[start:end]
	}
	return a, nil
}

func (a answer) info() Info {
	return Info{
		Major: unix.Major(a.dev), Minor: unix.Minor(a.dev), OpenCount: a.open,
		ReadOnly: a.flags&flagReadOnly != 0, Suspended: a.flags&flagSuspend != 0,
		Active: a.flags&flagActivePresent != 0, Inactive: a.flags&flagInactive != 0,
	}
}

// text is the string at the beginning of b.
func text(b []byte) string {
	if i := bytes.IndexByte(b, 0); i >= 0 {
		b = b[:i]
	}
	return string(b)
}
