package keeper

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// network is SOCK_SEQPACKET: message borders are kept and an end is noticed.
const network = "unixpacket"

// errMessage says that the peer sent something that is no message of ours; the
// connection cannot be trusted any further.
var errMessage = errors.New("bad message")

// checkPeer refuses a peer that runs as another user.
func checkPeer(conn *net.UnixConn) error {
	raw, err := conn.SyscallConn()
	if err != nil {
		return err
	}
	var cred *unix.Ucred
	if cerr := raw.Control(func(fd uintptr) {
		cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); cerr != nil {
		return cerr
	}
	if err != nil {
		return fmt.Errorf("SO_PEERCRED: %w", err)
	}
	if int(cred.Uid) != os.Geteuid() {
		return fmt.Errorf("peer %d runs as user %d, want %d", cred.Pid, cred.Uid, os.Geteuid())
	}
	return nil
}

// peerGone tells whether the other end is closed, though messages of it may
// still be here.
func peerGone(conn *net.UnixConn) bool {
	raw, err := conn.SyscallConn()
	if err != nil {
		return true
	}
	gone := false
	if err := raw.Control(func(fd uintptr) { gone = hungUp(int(fd)) }); err != nil {
		return true
	}
	return gone
}

// untilGone makes a context that ends when the other end is closed. stop must be
// called before anything else is read.
func untilGone(ctx context.Context, conn *net.UnixConn) (until context.Context, stop func()) {
	until, cancel := context.WithCancel(ctx)
	raw, err := conn.SyscallConn()
	if err != nil {
		cancel()
		return until, cancel
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		err := raw.Read(func(fd uintptr) bool { return hungUp(int(fd)) })
		if err == nil {
			cancel()
		}
	}()
	return until, func() {
		conn.SetReadDeadline(time.Now()) // fails only on a closed connection, as reading does
		<-ended
		conn.SetReadDeadline(time.Time{})
		cancel()
	}
}

// hungUp tells whether the other end of the socket is closed.
func hungUp(fd int) bool {
	p := []unix.PollFd{{Fd: int32(fd)}}
	n, err := unix.Poll(p, 0)
	return err == nil && n > 0 && p[0].Revents&unix.POLLHUP != 0
}

// marshal is json.Marshal without the escapes for HTML, which would make meta
// up to six times longer.
func marshal(v any) ([]byte, error) {
	var msg bytes.Buffer
	enc := json.NewEncoder(&msg)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(v); err != nil {
		return nil, err
	}
	return bytes.TrimSpace(msg.Bytes()), nil
}

// send writes one message. The descriptors stay the caller's.
func send(conn *net.UnixConn, v any, fds []int) error {
	msg, err := marshal(v)
	if err != nil {
		return err
	}
	if len(msg) > maxMessage {
		return fmt.Errorf("message of %d bytes, at most %d", len(msg), maxMessage)
	}
	var rights []byte
	if len(fds) > 0 {
		rights = unix.UnixRights(fds...)
	}
	_, _, err = conn.WriteMsgUnix(msg, rights, nil)
	return err
}

// receive reads one message. The descriptors that came with it are the
// caller's and close on exec. At the peer's end the error is io.EOF; an error
// that wraps errMessage is the peer's fault.
func receive(conn *net.UnixConn) (msg []byte, fds []int, err error) {
	buf := make([]byte, maxMessage)
	oob := make([]byte, unix.CmsgSpace(maxFDs*4))
	n, oobn, flags, _, err := conn.ReadMsgUnix(buf, oob)
	if err != nil {
		// An empty message is io.EOF, too, and descriptors may have come with it.
		fds, _ = rights(oob[:oobn])
		closeAll(fds)
		return nil, nil, err
	}
	fds, err = rights(oob[:oobn])
	switch {
	case err != nil:
	case flags&unix.MSG_TRUNC != 0:
		err = fmt.Errorf("%w: more than %d bytes", errMessage, maxMessage)
	case flags&unix.MSG_CTRUNC != 0:
		err = fmt.Errorf("%w: more than %d descriptors", errMessage, maxFDs)
	}
	if err != nil {
		closeAll(fds)
		return nil, nil, err
	}
	return buf[:n], fds, nil
}

// rights takes the descriptors out of control messages; on an error it returns
// those it had found.
func rights(oob []byte) ([]int, error) {
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errMessage, err)
	}
	var fds []int
	for i := range msgs {
		if msgs[i].Header.Level != unix.SOL_SOCKET || msgs[i].Header.Type != unix.SCM_RIGHTS {
			continue // credentials and the like give us nothing to close
		}
		got, err := unix.ParseUnixRights(&msgs[i])
		fds = append(fds, got...)
		if err != nil {
			return fds, fmt.Errorf("%w: %w", errMessage, err)
		}
	}
	return fds, nil
}

func closeAll(fds []int) {
	for _, fd := range fds {
		unix.Close(fd)
	}
}

// dupAll duplicates all descriptors, with close-on-exec, or none.
func dupAll(fds []int) ([]int, error) {
	dups := make([]int, 0, len(fds))
	for _, fd := range fds {
		d, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			closeAll(dups)
			return nil, fmt.Errorf("dup of descriptor %d: %w", fd, err)
		}
		dups = append(dups, d)
	}
	return dups, nil
}
