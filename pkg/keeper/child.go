package keeper

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"
)

// What may wait for a device is done by a child: the same program, run again for
// that one thing. It has nothing open but its standard error, its end of a
// socket pair and what the thing needs; above all no /dev/fuse. So, if all who
// serve the device die, the kernel ends the connection, and with it what the
// child waits for. Had the parent waited itself, its own /dev/fuse would have kept
// the connection, and the connection the parent, for ever.
//
// On the socket pair the child reads messages of the package's protocol, which
// its parent has checked, and answers them:
//
//	freeze, 1 descriptor       then thaw, which it ends after
//	thaw, 1 descriptor         of what a child that is dead had frozen
//	run, 0 to 8 descriptors
//
// The end of the socket pair, which is that of its parent at the latest, makes the
// child thaw. No signal that can be ignored ends it.

// childEnv marks a child.
const childEnv = "SNAPMERGE_KEEPER_CHILD"

// childFD is its end of the socket pair.
const childFD = 3

// maxChildren bounds the children of a process at a time.
const maxChildren = 256

// hooked says that the program calls Child.
var hooked atomic.Bool

// Child lets the program be a child of itself (see Serve, FreezeHere); the call
// does not return then. It must be the first thing that a program does, before it
// looks at its arguments. tasks are all those that any of its keepers has.
func Child(tasks map[string]Task) {
	hooked.Store(true)
	if os.Getenv(childEnv) == "" {
		return
	}
	// A signal to everybody, as the end of a container is, must not leave a file
	// system frozen. The end of the parent will end us. Nor must a log that nobody reads.
	signal.Ignore(unix.SIGHUP, unix.SIGINT, unix.SIGPIPE, unix.SIGQUIT, unix.SIGTERM)
	conn, err := unixConn(childFD)
	if err == nil {
		err = closeInherited()
	}
	if err == nil {
		err = serveParent(conn, tasks)
	}
	if err != nil && !errors.Is(err, io.EOF) { // which is our parent's end
		klog.ErrorS(err, "Child of the keeper")
		os.Exit(1)
	}
	os.Exit(0)
}

// closeInherited closes what somebody has forgotten to mark as close-on-exec. All
// that this process has opened itself is marked.
func closeInherited() error {
	names, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return err
	}
	for _, n := range names {
		fd, err := strconv.Atoi(n.Name())
		if err != nil || fd < childFD {
			continue
		}
		if flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err == nil && flags&unix.FD_CLOEXEC == 0 {
			unix.Close(fd)
		}
	}
	return nil
}

// serveParent does what the parent wants.
func serveParent(conn *net.UnixConn, tasks map[string]Task) error {
	req, fds, err := receiveRequest(conn)
	if err != nil {
		return err
	}
	if len(fds) == 0 && req.Op != opRun {
		return fmt.Errorf("%s without a descriptor", req.Op)
	}
	switch req.Op {
	case opFreeze:
		return freezeForParent(conn, req, fds[0])
	case opThaw:
		err := thawFS(fds[0])
		closeAll(fds)
		return reply(conn, failed(err))
	case opRun:
		return reply(conn, runTask(tasks, req, fds))
	default:
		return fmt.Errorf("%s is not for a child", req.Op)
	}
}

// freezeForParent freezes, and returns when the file system is thawed.
func freezeForParent(conn *net.UnixConn, req request, dir int) error {
	// It says why not if it may not; its parent has said so already.
	_ = LockMemory()
	f, err := newFreeze(req.Key, dir, time.Duration(req.TimeoutMS)*time.Millisecond, func() bool { return peerGone(conn) })
	if err != nil {
		return reply(conn, failed(err))
	}
	err = reply(conn, response{})
	for err == nil {
		var fds []int
		if req, fds, err = receiveRequest(conn); err != nil {
			break
		}
		closeAll(fds)
		if req.Op != opThaw {
			err = fmt.Errorf("%s after a freeze", req.Op)
			break
		}
		resp := failed(f.thaw())
		err = reply(conn, resp)
		if resp.Code != codeFailed {
			return err
		}
	}
	f.thawForGood()
	return err
}

// runTask runs a task. It owns fds, which are closed when it answers.
func runTask(tasks map[string]Task, req request, fds []int) (resp response) {
	defer closeAll(fds)
	task := tasks[req.Key]
	if task == nil {
		return response{Code: codeFailed, Error: "the program has not given Child such a task"}
	}
	defer func() {
		if p := recover(); p != nil {
			resp = response{Code: codeFailed, Error: fmt.Sprintf("task %s panicked: %v", req.Key, p)}
		}
	}()
	result, err := task(req.Meta, fds)
	if err == nil {
		resp.Meta, err = marshal(result)
	}
	if err == nil {
		err = checkMeta(resp.Meta)
	}
	if err != nil {
		return response{Code: codeFailed, Error: err.Error()}
	}
	return resp
}

func receiveRequest(conn *net.UnixConn) (req request, fds []int, err error) {
	msg, fds, err := receive(conn)
	if err != nil {
		return req, nil, err
	}
	if err := decodeStrict(msg, &req); err != nil {
		closeAll(fds)
		return req, nil, err
	}
	return req, fds, nil
}

// reply answers the parent, or returns io.EOF if it is gone.
func reply(conn *net.UnixConn, resp response) error {
	resp.Version = protocolVersion
	err := send(conn, resp, nil)
	if errors.Is(err, unix.EPIPE) || errors.Is(err, unix.ECONNRESET) {
		return io.EOF
	}
	return err
}

// unixConn makes a connection of the socket, which it owns.
func unixConn(fd int) (*net.UnixConn, error) {
	unix.CloseOnExec(fd)
	f := os.NewFile(uintptr(fd), "socket pair")
	defer f.Close()
	conn, err := net.FileConn(f)
	if err != nil {
		return nil, err
	}
	u, ok := conn.(*net.UnixConn)
	if !ok {
		conn.Close()
		return nil, fmt.Errorf("descriptor %d is no unix socket", fd)
	}
	return u, nil
}

// child is a child as its parent has it.
type child struct {
	conn  *net.UnixConn
	ended chan struct{} // closed when the process is gone
}

// children are those of a keeper, or of a process without one. The zero value is
// ready.
type children struct {
	mu       sync.Mutex
	n        int
	freezing map[uint64]chan struct{} // by the number of the file system; closed when the child is gone
}

// settle is how long a freeze waits for the child of an earlier one, whose client
// is gone, to thaw. If the client was the node plugin, and was killed, the child
// waits for requests that the next one answers late: those of NBD come again after
// five seconds. Tests set it.
var settle = 10 * time.Second

// reserve makes sure that there is one child per file system. A second could only
// wait for what the first waits for, and every try would leave one behind.
func (cs *children) reserve(ctx context.Context, dir int) (release func(), err error) {
	var st unix.Stat_t
	if err := unix.Fstat(dir, &st); err != nil {
		return nil, fmt.Errorf("fstat: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, settle)
	defer cancel()
	for {
		cs.mu.Lock()
		other := cs.freezing[st.Dev]
		if other == nil {
			break
		}
		cs.mu.Unlock()
		select {
		case <-other:
		case <-ctx.Done():
			return nil, errFreezing
		}
	}
	defer cs.mu.Unlock()
	if cs.freezing == nil {
		cs.freezing = make(map[uint64]chan struct{})
	}
	ended := make(chan struct{})
	cs.freezing[st.Dev] = ended
	return func() {
		cs.mu.Lock()
		defer cs.mu.Unlock()
		delete(cs.freezing, st.Dev)
		close(ended)
	}, nil
}

var errFreezing = errors.New("an earlier freeze has not ended: the file system is still frozen, or its device does not answer")

// start starts a child, and calls release when it is gone or not started.
func (cs *children) start(release func()) (*child, error) {
	cs.mu.Lock()
	full := cs.n >= maxChildren
	cs.n++
	cs.mu.Unlock()
	gone := func() {
		cs.mu.Lock()
		cs.n--
		cs.mu.Unlock()
		release()
	}
	if full {
		gone()
		return nil, fmt.Errorf("%d processes wait for devices already", maxChildren)
	}
	c, err := startChild(gone)
	if err != nil {
		gone()
		return nil, fmt.Errorf("start of a process: %w", err)
	}
	return c, nil
}

// startChild runs the program as a child; gone is called when that has ended.
func startChild(gone func()) (*child, error) {
	if !hooked.Load() {
		return nil, errors.New("the program does not begin with keeper.Child")
	}
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("socketpair", err)
	}
	theirs := os.NewFile(uintptr(pair[1]), "socket pair")
	defer theirs.Close()
	conn, err := unixConn(pair[0])
	if err != nil {
		return nil, err
	}
	cmd := &exec.Cmd{
		Path: "/proc/self/exe", Args: []string{os.Args[0], "waits-for-device"}, Env: append(os.Environ(), childEnv+"=1"), Stderr: os.Stderr,
		ExtraFiles: []*os.File{theirs}, SysProcAttr: &syscall.SysProcAttr{Setsid: true},
	}
	if err := cmd.Start(); err != nil {
		conn.Close()
		return nil, err
	}
	c := &child{conn: conn, ended: make(chan struct{})}
	go func() {
		if err := cmd.Wait(); err != nil {
			klog.ErrorS(err, "Child has failed", "pid", cmd.Process.Pid)
		}
		gone()
		close(c.ended)
	}()
	return c, nil
}

// freeze has a child freeze the file system of dir, as req says. If ctx ends
// before, or the connection of the returned child, the child sees to the rest
// itself.
func (cs *children) freeze(ctx context.Context, req request, dir int) (*child, error) {
	release, err := cs.reserve(ctx, dir)
	if err != nil {
		return nil, err
	}
	c, err := cs.start(release)
	if err != nil {
		return nil, err
	}
	resp, err := c.ask(ctx, req, dir)
	if err == nil {
		err = resp.err()
	}
	if err != nil {
		c.end(ctx)
		return nil, err
	}
	return c, nil
}

// thaw has a child thaw what it has frozen. If that fails it is not the end of the
// child.
func (c *child) thaw(ctx context.Context) (response, error) {
	resp, err := c.ask(ctx, request{Version: protocolVersion, Op: opThaw})
	if err == nil && resp.Code != codeFailed {
		c.end(ctx)
	}
	return resp, err
}

// once has a child carry out a request that is all it has to do.
func (cs *children) once(ctx context.Context, req request, fds ...int) (response, error) {
	c, err := cs.start(func() {})
	if err != nil {
		return response{}, err
	}
	defer c.end(ctx)
	return c.ask(ctx, req, fds...)
}

// thawDir has a child thaw the file system of dir.
func (cs *children) thawDir(ctx context.Context, dir int) error {
	resp, err := cs.once(ctx, request{Version: protocolVersion, Op: opThaw}, dir)
	if err != nil {
		return err
	}
	return resp.err()
}

// end lets go of a child and waits for its end, but not longer than ctx allows:
// it may have to wait for a device.
func (c *child) end(ctx context.Context) {
	c.conn.Close()
	select {
	case <-c.ended:
	case <-ctx.Done():
	}
}

func (c *child) ask(ctx context.Context, req request, fds ...int) (response, error) {
	resp, err := ask(ctx, c.conn, req, fds...)
	switch {
	case err == nil:
	case ctx.Err() != nil:
		err = fmt.Errorf("it goes on without us: %w", ctx.Err())
	case errors.Is(err, io.EOF):
		err = errors.New("the process that was to do it has died")
	}
	return resp, err
}
