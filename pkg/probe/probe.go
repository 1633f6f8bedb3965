// Package probe finds out what this machine can do for snapmerge, by trying it
// wherever that does no harm.
package probe

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/snapmerge/snapmerge/pkg/blockio"
	"github.com/snapmerge/snapmerge/pkg/keeper"
	"github.com/snapmerge/snapmerge/pkg/transport/dmuser"
	"github.com/snapmerge/snapmerge/pkg/transport/fuseloop"
	"github.com/snapmerge/snapmerge/pkg/transport/handover"
	"github.com/snapmerge/snapmerge/pkg/transport/nbd"
	"github.com/snapmerge/snapmerge/pkg/transport/ublk"
	"github.com/snapmerge/snapmerge/pkg/uring"
)

// Answer says whether something works, and if not why.
type Answer struct {
	OK  bool   `json:"ok"`
	Why string `json:"why,omitempty"`
}

func answer(err error) Answer {
	if err != nil {
		return Answer{Why: oneLine(err)}
	}
	return Answer{OK: true}
}

// Report is what was found. The JSON keys are those of the command.
type Report struct {
	Kernel     string               `json:"kernel"` // release
	Transports map[string]Transport `json:"transports"`
	URing      URing                `json:"io_uring"`
	// Reflink: files of the state directory can share blocks.
	Reflink      Answer `json:"reflink"`
	DeviceMapper Answer `json:"device_mapper"`
	// HandOver: a merged volume's device can be swapped to its base by device-mapper.
	HandOver Answer `json:"hand_over"`
	Loop     Loop   `json:"loop"`
	// SysResource: the capability CAP_SYS_RESOURCE, without which a process that
	// serves devices can deadlock when memory is short.
	SysResource Answer `json:"cap_sys_resource"`
}

// Transport tells whether devices of a kind can be made.
type Transport struct {
	Answer
	// SurvivesRestart: a device outlives its process if there is a keeper. Nil
	// where there are no devices.
	SurvivesRestart *Answer `json:"survives_restart,omitempty"`
	// Passthrough: reads and writes can go to a volume's base past the process. Nil
	// where that is not a matter of the transport.
	Passthrough *Answer `json:"passthrough,omitempty"`
}

// URing tells whether io_uring works and what it knows.
type URing struct {
	Answer
	Opcodes map[string]bool `json:"opcodes,omitempty"`
}

// Loop tells how many devices could be made.
type Loop struct {
	Answer
	Free int64 `json:"free"`
}

// Run looks at the machine. Reflinks are tried in stateDir, if that is given.
func Run(stateDir string) Report {
	root := os.DirFS("/")
	release := kernelRelease()
	r := Report{
		Kernel:       release,
		Transports:   map[string]Transport{"fuse": fuse()},
		URing:        ioURing(),
		Reflink:      reflink(stateDir),
		DeviceMapper: answer(openable("/dev/mapper/control")),
		HandOver:     answer(handover.Available()),
		Loop:         loop(),
		SysResource:  answer(hasSysResource()),
	}
	// A probe leaves nothing that a transport would have to remember.
	for d, open := range map[*driver]func(*keeper.Client) device{
		&dmUserDriver: func(k *keeper.Client) device { return dmuser.New(k) },
		&ublkDriver:   func(*keeper.Client) device { return ublk.New("") },
		&nbdDriver:    func(*keeper.Client) device { return nbd.New("") },
	} {
		if d.present(root, release) {
			r.Transports[d.transport] = devices(open)
		} else {
			r.Transports[d.transport] = Transport{Answer: d.absent()}
		}
	}
	return r
}

func kernelRelease() string {
	var u unix.Utsname
	if unix.Uname(&u) != nil {
		return "unknown"
	}
	return unix.ByteSliceToString(u.Release[:])
}

// device is what is asked of a transport.
type device interface {
	Probe() error
	SurvivesRestart() error
}

func fuse() Transport {
	t := devices(func(k *keeper.Client) device { return fuseloop.New(k) })
	if t.OK {
		a := answer(fuseloop.New(nil).Passthrough())
		t.Passthrough = &a
	}
	return t
}

// devices makes a device and takes it away again.
func devices(open func(*keeper.Client) device) Transport {
	if err := open(nil).Probe(); err != nil {
		return Transport{Answer: answer(err)}
	}
	survives := answer(withKeeper(func(k *keeper.Client) error { return open(k).SurvivesRestart() }))
	return Transport{Answer: Answer{OK: true}, SurvivesRestart: &survives}
}

// keeperTime bounds what the keeper of a probe may take.
const keeperTime = 10 * time.Second

// withKeeper calls fn with a keeper that lives as long: what is asked is what
// the kernel can do, not what runs on the machine.
func withKeeper(fn func(*keeper.Client) error) (err error) {
	dir, err := os.MkdirTemp("", "snapmerge-probe-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	socket := filepath.Join(dir, "keeper.sock")
	ctx, cancel := context.WithTimeout(context.Background(), keeperTime)
	ended := make(chan error, 1)
	go func() { ended <- keeper.Serve(ctx, socket, fuseloop.Tasks()) }()
	defer func() {
		cancel()
		if e := <-ended; err == nil {
			err = e
		}
	}()
	k, err := keeper.Dial(ctx, socket)
	if err != nil {
		return err
	}
	defer k.Close()
	return fn(k)
}

// opcodes are those of io_uring that snapmerge uses or will use.
var opcodes = map[string]uint8{
	"read": uring.OpRead, "write": uring.OpWrite, "readv": uring.OpReadv, "writev": uring.OpWritev,
	"read_fixed": uring.OpReadFixed, "write_fixed": uring.OpWriteFixed,
	"fsync": uring.OpFsync, "fallocate": uring.OpFallocate, "uring_cmd": uring.OpUringCmd,
}

func ioURing() URing {
	u := URing{Answer: answer(blockio.ProbeURing())}
	ring, err := uring.New(1, 0)
	if err != nil {
		return u
	}
	defer ring.Close()
	p, err := ring.Probe()
	if err != nil {
		return u
	}
	u.Opcodes = map[string]bool{}
	for name, op := range opcodes {
		u.Opcodes[name] = p.Supports(op)
	}
	return u
}

// reflink makes one file share a block with another.
func reflink(dir string) Answer {
	if dir == "" {
		return Answer{Why: "no state directory was given to try it in"}
	}
	src, err := os.CreateTemp(dir, ".snapmerge-probe-")
	if err != nil {
		return answer(err)
	}
	defer os.Remove(src.Name())
	defer src.Close()
	dst, err := os.CreateTemp(dir, ".snapmerge-probe-")
	if err != nil {
		return answer(err)
	}
	defer os.Remove(dst.Name())
	defer dst.Close()
	if _, err := src.Write(make([]byte, blockio.BlockSize)); err != nil {
		return answer(err)
	}
	if err := unix.IoctlFileClone(int(dst.Fd()), int(src.Fd())); err != nil {
		return answer(fmt.Errorf("FICLONE in %s: %w", dir, err))
	}
	return Answer{OK: true}
}

func openable(path string) error {
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return &fs.PathError{Op: "open", Path: path, Err: err}
	}
	return unix.Close(fd)
}

func loop() Loop {
	if err := openable("/dev/loop-control"); err != nil {
		return Loop{Answer: answer(err)}
	}
	free, err := fuseloop.New(nil).MaxVolumes()
	if err == nil && free == 0 {
		err = fmt.Errorf("all loop devices, or all descriptors that this process may have, are in use")
	}
	return Loop{Answer: answer(err), Free: free}
}

func hasSysResource() error {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil {
		return os.NewSyscallError("capget", err)
	}
	if data[unix.CAP_SYS_RESOURCE/32].Effective&(1<<(unix.CAP_SYS_RESOURCE%32)) == 0 {
		return fmt.Errorf("this process does not have the capability")
	}
	return nil
}
