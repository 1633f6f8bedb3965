package nodebench

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/snapmerge/snapmerge/pkg/localnode"
)

// ErrNoQemu says that QEMU's programs are not installed.
var ErrNoQemu = errors.New("qemu-img or qemu-storage-daemon is not installed, which is measured beside (Debian, Ubuntu: qemu-utils, qemu-system-common)")

// qemu makes disks like restored volumes, the way QEMU has them: an empty qcow2
// overlay over the image of the source, which block-stream fills from it while the
// disk is used. A second qemu-storage-daemon, which has it from the first by NBD,
// exports it as a file by FUSE, and a loop device with direct I/O is laid over that, as
// over ours: no FUSE export can be of a disk that is being streamed, since the one
// wants to be able to resize it and the other forbids that.
type qemu struct {
	dir, backing string
	disks        []*qemuDisk // in service
}

func newQemu(dir string) (*qemu, error) {
	for _, name := range []string{"qemu-img", "qemu-storage-daemon"} {
		if _, err := exec.LookPath(name); err != nil {
			return nil, ErrNoQemu
		}
	}
	q := &qemu{dir: filepath.Join(dir, "qemu")}
	q.backing = q.path("backing.qcow2")
	return q, os.Mkdir(q.dir, 0o711)
}

func (q *qemu) path(name string) string { return filepath.Join(q.dir, name) }

// prepare takes a copy of a raw image.
func (q *qemu) prepare(ctx context.Context, image string) error {
	return run(ctx, "qemu-img", "convert", "-q", "-f", "raw", "-O", "qcow2", image, q.backing)
}

// run runs a program.
func run(ctx context.Context, name string, args ...string) error {
	out, err := exec.CommandContext(ctx, name, args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s: %w: %s", name, err, bytes.TrimSpace(out))
	}
	return nil
}

// qemuDisk is one disk and what it takes.
type qemuDisk struct {
	q        *qemu
	name     string
	daemon   *localnode.Process // has the images
	front    *localnode.Process // has the export, when it is mounted
	qmp      net.Conn
	replies  *bufio.Scanner
	loop     string // device; "": none
	mounted  bool
	streamed int64 // bytes, when last asked
}

// slice measures the load once on a new disk, with block-stream on that one, on another
// one, or none.
func (q *qemu) slice(ctx context.Context, l load, d time.Duration, stream, neighbour bool) (s sample, err error) {
	defer func() { err = errors.Join(err, q.close()) }()
	used, err := q.open(ctx, "disk")
	if err != nil {
		return s, err
	}
	streaming := used
	if neighbour {
		if streaming, err = q.open(ctx, "neighbour"); err != nil {
			return s, err
		}
	}
	if err := used.mount(ctx); err != nil {
		return s, err
	}
	var begun time.Time
	s, err = l.run(ctx, used.path("mnt"), d, func() error {
		begun = time.Now()
		if !stream {
			return nil
		}
		return streaming.command("block-stream", map[string]any{"job-id": "stream", "device": "overlay"}, nil)
	})
	if err != nil || !stream {
		return s, err
	}
	s.ended, err = streaming.progress()
	s.moved = float64(streaming.streamed) / mib / time.Since(begun).Seconds()
	return s, err
}

// close takes all disks away.
func (q *qemu) close() error {
	var errs []error
	for _, d := range q.disks {
		errs = append(errs, d.close())
	}
	q.disks = nil
	return errors.Join(errs...)
}

func (d *qemuDisk) path(name string) string { return filepath.Join(d.q.dir, d.name, name) }

// open puts a disk into service.
func (q *qemu) open(ctx context.Context, name string) (*qemuDisk, error) {
	d := &qemuDisk{q: q, name: name}
	q.disks = append(q.disks, d)
	if err := os.MkdirAll(d.path("mnt"), 0o711); err != nil {
		return nil, err
	}
	if err := run(ctx, "qemu-img", "create", "-q", "-f", "qcow2", "-b", q.backing, "-F", "qcow2", d.path("overlay.qcow2")); err != nil {
		return nil, err
	}
	file := func(node, path string, readOnly bool) string {
		b, err := json.Marshal(map[string]any{"driver": "qcow2", "node-name": node, "read-only": readOnly,
			"file": map[string]any{"driver": "file", "filename": path, "cache": map[string]any{"direct": true}}})
		if err != nil {
			panic(err) // strings and booleans
		}
		return string(b)
	}
	overlay := strings.TrimSuffix(file("overlay", d.path("overlay.qcow2"), false), "}") + `,"backing":"backing"}`
	var err error
	d.daemon, err = localnode.Start("qemu-storage-daemon", d.path("log"), "--blockdev", file("backing", q.backing, true), "--blockdev", overlay,
		"--nbd-server", "addr.type=unix,addr.path="+d.path("nbd"), "--export", "type=nbd,id=export,node-name=overlay,writable=on",
		"--chardev", "socket,id=qmp,server=on,wait=off,path="+d.path("qmp"), "--monitor", "chardev=qmp")
	if err != nil {
		return nil, err
	}
	return d, d.connect(ctx)
}

// qemuLimit is how long a disk may take to be there, or a command to be answered.
const qemuLimit = 30 * time.Second

// connect waits until the daemon answers (QEMU's machine protocol).
func (d *qemuDisk) connect(ctx context.Context) error {
	for start := time.Now(); ; {
		conn, err := net.Dial("unix", d.path("qmp"))
		if err == nil {
			d.qmp, d.replies = conn, bufio.NewScanner(conn)
			return d.command("qmp_capabilities", nil, nil)
		}
		select {
		case <-d.daemon.Done():
			return errors.Join(errors.New("qemu-storage-daemon has ended"), localnode.LogTail(d.path("log")))
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(20 * time.Millisecond):
		}
		if time.Since(start) > qemuLimit {
			return err
		}
	}
}

// command gives the daemon a command and waits for its answer, which goes into
// result unless that is nil.
func (d *qemuDisk) command(name string, args map[string]any, result any) error {
	c := map[string]any{"execute": name}
	if args != nil {
		c["arguments"] = args
	}
	b, err := json.Marshal(c)
	if err != nil {
		return err
	}
	if err := d.qmp.SetDeadline(time.Now().Add(qemuLimit)); err != nil {
		return err
	}
	if _, err := d.qmp.Write(append(b, '\n')); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	for d.replies.Scan() {
		var r struct {
			Return json.RawMessage
			Error  *struct{ Desc string }
		}
		if err := json.Unmarshal(d.replies.Bytes(), &r); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		switch {
		case r.Error != nil:
			return fmt.Errorf("%s: %s", name, r.Error.Desc)
		case r.Return != nil && result != nil:
			return json.Unmarshal(r.Return, result)
		case r.Return != nil:
			return nil
		} // else a greeting or an event
	}
	return fmt.Errorf("%s: no answer: %w", name, d.replies.Err())
}

// progress notes how much is streamed and tells whether that is all.
func (d *qemuDisk) progress() (ended bool, err error) {
	var jobs []struct {
		Current int64 `json:"current-progress"`
		Status  string
		Error   string
	}
	if err := d.command("query-jobs", nil, &jobs); err != nil {
		return false, err
	}
	if len(jobs) > 0 && jobs[0].Error == "" {
		d.streamed = jobs[0].Current
		return jobs[0].Status != "running", nil
	}
	if len(jobs) > 0 {
		return false, fmt.Errorf("block-stream: %s", jobs[0].Error)
	}
	// A job that is over is not listed any more; the overlay has it all.
	st, err := os.Stat(d.path("overlay.qcow2"))
	if err != nil {
		return false, err
	}
	d.streamed = st.Size()
	return true, nil
}

// mount mounts the disk, by a loop device.
func (d *qemuDisk) mount(ctx context.Context) (err error) {
	if err := os.WriteFile(d.path("export"), nil, 0o600); err != nil {
		return err
	}
	d.front, err = localnode.Start("qemu-storage-daemon", d.path("log"),
		"--blockdev", "driver=nbd,node-name=disk,export=overlay,server.type=unix,server.path="+d.path("nbd"),
		"--export", "type=fuse,id=export,node-name=disk,mountpoint="+d.path("export")+",writable=on")
	if err != nil {
		return err
	}
	for start := time.Now(); ; {
		// The export hides the empty file.
		if st, err := os.Stat(d.path("export")); err == nil && st.Size() > 0 {
			break
		}
		select {
		case <-d.front.Done():
			return errors.Join(errors.New("qemu-storage-daemon has ended"), localnode.LogTail(d.path("log")))
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(20 * time.Millisecond):
		}
		if time.Since(start) > qemuLimit {
			return errors.New("qemu-storage-daemon exports nothing")
		}
	}
	out, err := exec.CommandContext(ctx, "losetup", "--find", "--show", "--direct-io=on", d.path("export")).Output()
	if err != nil {
		return fmt.Errorf("losetup: %w", err)
	}
	d.loop = strings.TrimSpace(string(out))
	if err := unix.Mount(d.loop, d.path("mnt"), "ext4", 0, ""); err != nil {
		return fmt.Errorf("mount of %s: %w", d.loop, err)
	}
	d.mounted = true
	return nil
}

// close takes away what there is of the disk.
func (d *qemuDisk) close() error {
	var errs []error
	if d.mounted {
		if err := unix.Unmount(d.path("mnt"), 0); err != nil {
			return fmt.Errorf("unmount of %s: %w", d.path("mnt"), err)
		}
	}
	if d.loop != "" {
		errs = append(errs, run(context.Background(), "losetup", "--detach", d.loop))
	}
	if d.qmp != nil {
		errs = append(errs, d.qmp.Close())
	}
	errs = append(errs, d.front.Stop(), d.daemon.Stop()) // they unmount the export and end the job
	return errors.Join(append(errs, os.RemoveAll(filepath.Join(d.q.dir, d.name)))...)
}
