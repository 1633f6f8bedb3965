package keeper

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/snapmerge/snapmerge/pkg/unixsocket"
)

func TestFull(t *testing.T) {
	s := &server{entries: make(map[string]entry)}
	for i := range maxEntries {
		s.entries[fmt.Sprint(i)] = entry{}
	}
	r, w := pipeFDs(t)
	resp, _ := s.handle(&request{Op: opPut, Key: "one more"}, []int{w})
	if resp.Code != codeFull {
		t.Errorf("answer %+v", resp)
	}
	isClosed(t, r)
	_, w = pipeFDs(t)
	if resp, _ := s.handle(&request{Op: opPut, Key: "7"}, []int{w}); resp.Code != "" {
		t.Errorf("replacing in a full keeper: %+v", resp)
	}
	s.closeEntries()
}

// TestHostile sends what no client of ours would: each time one error, the end
// of the connection, nothing leaked, and the keeper goes on.
func TestHostile(t *testing.T) {
	ctx := t.Context()
	path := socketPath(t)
	start(t, path)
	c := connect(t, path)
	_, w := pipeFDs(t)
	defer unix.Close(w)
	many := make([]int, 200)
	for i := range many {
		many[i] = w
	}
	put := `{"v":1,"op":"put","key":"a","meta":{}}`
	tests := []struct {
		name, msg string
		fds       []int
		want      string
	}{
		{"garbage", "\x00\xff", nil, "not a message"},
		{"garbage with descriptors", "\x00\xff", []int{w, w}, "not a message"},
		{"too long", `{"v":1,"op":"` + strings.Repeat("x", maxMessage) + `"}`, []int{w}, "more than 32768 bytes"},
		{"nine descriptors", put, many[:9], "more than 8 descriptors"},
		{"200 descriptors", put, many, "more than 8 descriptors"},
		{"thaw of nothing", `{"v":1,"op":"thaw"}`, nil, "nothing is frozen"},
	}
	before := openFDs(t)
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			raw, err := net.Dial(network, path)
			if err != nil {
				t.Fatal(err)
			}
			conn := raw.(*net.UnixConn)
			defer conn.Close()
			conn.SetDeadline(time.Now().Add(patience))
			if _, _, err := conn.WriteMsgUnix([]byte(tt.msg), unix.UnixRights(tt.fds...), nil); err != nil {
				t.Fatal(err)
			}
			msg, _, err := receive(conn)
			if err != nil {
				t.Fatal(err)
			}
			var resp response
			if err := json.Unmarshal(msg, &resp); err != nil || resp.Code != codeBadRequest || !strings.Contains(resp.Error, tt.want) {
				t.Errorf("answer %s", msg)
			}
			if _, _, err := receive(conn); !errors.Is(err, io.EOF) {
				t.Errorf("connection goes on: %v", err)
			}
		})
	}
	eventually(t, "descriptors closed", func() bool { return openFDs(t) <= before })
	if keys, err := c.List(ctx); err != nil || len(keys) != 0 {
		t.Errorf("keeper does not go on: %v, %v", keys, err)
	}
}

// TestEmptyMessage: one that is empty ends the connection, and what came with it is closed.
func TestEmptyMessage(t *testing.T) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pair[0])
	f := os.NewFile(uintptr(pair[1]), "peer")
	defer f.Close()
	conn, err := net.FileConn(f)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	r, w := pipeFDs(t)
	// unix.Sendmsg would add a byte.
	oob := unix.UnixRights(w, w)
	msg := unix.Msghdr{Control: &oob[0]}
	msg.SetControllen(len(oob))
	if _, _, errno := unix.Syscall(unix.SYS_SENDMSG, uintptr(pair[0]), uintptr(unsafe.Pointer(&msg)), 0); errno != 0 {
		t.Fatal(errno)
	}
	unix.Close(w)
	if _, _, err := receive(conn.(*net.UnixConn)); !errors.Is(err, io.EOF) {
		t.Errorf("receive: %v", err)
	}
	isClosed(t, r)
}

func TestSocketFile(t *testing.T) {
	path := socketPath(t)
	// The socket of a keeper that died.
	l, err := net.ListenUnix(network, &net.UnixAddr{Name: path, Net: network})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()

	stop := start(t, path)
	connect(t, path)
	st, err := os.Stat(path)
	if err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", st.Mode(), err)
	}
	if err := Serve(t.Context(), path, nil); err == nil || !strings.Contains(err.Error(), "another keeper") {
		t.Errorf("second keeper: %v", err)
	}
	connect(t, path) // the first one still serves
	stop()
	start(t, path)
	connect(t, path)
}

func TestDialGivesUp(t *testing.T) {
	path := socketPath(t)
	for limit := 20 * time.Millisecond; ; limit *= 2 {
		ctx, cancel := context.WithTimeout(t.Context(), limit)
		_, err := Dial(ctx, path)
		cancel()
		if errors.Is(err, os.ErrNotExist) {
			return
		}
		// So slow a machine that not a single try is made within the limit.
		if !errors.Is(err, context.DeadlineExceeded) || limit > patience {
			t.Fatalf("no keeper: %v", err)
		}
	}
}

// TestReconnectPace: a keeper that hangs up at once is not asked all the time.
func TestReconnectPace(t *testing.T) {
	path := socketPath(t)
	l, err := unixsocket.Listen(t.Context(), network, path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	begin := time.Now()
	c, err := Dial(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	var least time.Duration
	for wait := redialMin; wait < redialMax/2; wait *= 2 {
		conn, err := l.AcceptUnix()
		if err != nil {
			t.Fatal(err)
		}
		conn.Close()
		least += wait
	}
	conn, err := l.AcceptUnix()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if took := time.Since(begin); took < least {
		t.Errorf("connected again after %v, want %v", took, least)
	}
}

func TestOtherUserRefused(t *testing.T) {
	needRoot(t)
	dir, err := os.MkdirTemp("/tmp", "keeper") // others may not enter TMPDIR, nor t.TempDir's parent
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, "keeper.sock")
	start(t, path)
	connect(t, path)
	for _, p := range []string{dir, path} {
		if err := os.Chmod(p, 0o777); err != nil {
			t.Fatal(err)
		}
	}
	// The directory of the test binary may be closed to other users, too.
	cred := &syscall.Credential{Uid: 65534, Gid: 65534}
	_, out := helper(t, "/proc/self/exe", "connect", cred, path)
	if got, err := io.ReadAll(out); err != nil || string(got) != "EOF" {
		t.Errorf("another user got %q, %v", got, err)
	}
}

// helperConnect says what a client at args[1] gets.
func helperConnect() {
	conn, err := net.Dial(network, os.Args[1])
	if err != nil {
		fmt.Print(err)
		return
	}
	conn.SetDeadline(time.Now().Add(patience))
	send(conn.(*net.UnixConn), request{Version: 1, Op: opList}, nil)
	msg, _, err := receive(conn.(*net.UnixConn))
	if errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) || errors.Is(err, io.EOF) {
		err = io.EOF
	}
	if err != nil {
		fmt.Print(err)
		return
	}
	fmt.Printf("%s", msg)
}
