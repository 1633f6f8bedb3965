package fuseloop

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/snapmerge/snapmerge/pkg/transport"
)

// probeTimeout is long enough for a machine that is busy and short enough for
// one that does not work.
const probeTimeout = 10 * time.Second

// fdsPerVolume is what a volume needs in this process: connection, mount, their
// duplicates for the keeper, an epoll per reader, and as many again for its files.
const fdsPerVolume = 2 * (4 + mostReaders)

// Probe makes a small device, reads it and takes it away again. The error
// names all that is missing.
func (t *Transport) Probe() error {
	var errs []error
	for _, path := range []string{"/dev/fuse", "/dev/loop-control"} {
		fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0)
		if err != nil {
			errs = append(errs, &os.PathError{Op: "open", Path: path, Err: err})
			continue
		}
		unix.Close(fd)
	}
	if err := checkMount("fuse"); err != nil {
		errs = append(errs, err)
	}
	if err := checkMount("fusectl"); err != nil {
		errs = append(errs, err)
	}
	if len(errs) == 0 {
		if err := tryDevice(); err != nil {
			errs = append(errs, err)
		}
	}
	if len(errs) == 0 {
		return nil
	}
	var why []string
	for _, err := range errs {
		why = append(why, err.Error())
	}
	return errors.New("fuse: " + strings.Join(why, "; "))
}

// checkMount finds out whether mounts of the type can be made here.
func checkMount(fstype string) error {
	fs, err := unix.Fsopen(fstype, unix.FSOPEN_CLOEXEC)
	if err != nil {
		return fmt.Errorf("fsopen %s: %w", fstype, err)
	}
	return unix.Close(fs)
}

// tryDevice shows that direct I/O on a FUSE file reaches us.
func tryDevice() error {
	return transport.Try(func(ctx context.Context, b transport.Backend, o transport.Options) (transport.Device, error) {
		return New(nil).create(ctx, "probe "+rand.Text(), b, o)
	})
}

// SurvivesRestart says why devices would not survive a restart of this process,
// or nil.
func (t *Transport) SurvivesRestart() error {
	if t.keeper == nil {
		return errors.New("fuse: no keeper is configured")
	}
	features, err := handshake()
	if err != nil {
		return fmt.Errorf("fuse: %w", err)
	}
	if features&featHasResend == 0 {
		return errors.New("fuse: the kernel cannot send requests again (FUSE_NOTIFY_RESEND needs 6.9)")
	}
	for _, name := range []string{"default_request_timeout", "max_request_timeout"} {
		path := filepath.Join("/proc/sys/fs/fuse", name)
		b, err := os.ReadFile(path)
		if v := strings.TrimSpace(string(b)); err == nil && v != "0" {
			return fmt.Errorf("fuse: %s is %s: the kernel aborts devices whose process is away for as many seconds", path, v)
		}
	}
	return nil
}

// handshake asks the kernel for its protocol features.
func handshake() (uint64, error) {
	s := newServer("none", transport.TryBackend{}, true)
	s.want |= featPassthrough
	d := newDevice(New(nil), "handshake", s)
	var err error
	if d.conn, err = openConn(); err != nil {
		return 0, err
	}
	d.startReaders()
	defer d.giveUp()
	select {
	case <-s.inited:
		return s.features.Load(), s.initErr
	case <-d.readersDone:
		return 0, errConnEnded
	case <-time.After(probeTimeout):
		return 0, errors.New("no INIT from the kernel")
	}
}

// MaxVolumes is how many devices this process could have at a time: bounded by
// the loop driver's minors that nobody else uses, and by descriptors.
func (t *Transport) MaxVolumes() (int64, error) {
	free := int64(1 << 20) // minors of a major
	if b, err := os.ReadFile("/sys/module/loop/parameters/max_part"); err == nil {
		var maxPart int64
		if _, err := fmt.Sscan(string(b), &maxPart); err == nil {
			for p := maxPart; p > 0; p >>= 1 {
				free >>= 1 // each device takes the power of two above max_part
			}
		}
	}
	bound, err := boundLoops()
	if err != nil {
		return 0, err
	}
	for _, index := range bound {
		if name, err := backingFile(index); err == nil && !strings.HasPrefix(name, filePrefix) {
			free--
		}
	}
	files, err := transport.FilesFor(fdsPerVolume)
	return max(0, min(free, files)), err
}
