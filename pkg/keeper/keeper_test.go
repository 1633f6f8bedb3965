package keeper

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/snapmerge/snapmerge/pkg/unixsocket"
	"github.com/snapmerge/snapmerge/test/machine"
)

// patience is how long a test waits for what must come.
const patience = 3 * time.Minute

// helpers are what the test binary does when it is run again with
// KEEPER_TEST_HELPER set.
var helpers = map[string]func(){
	"connect": helperConnect,
	"freeze":  helperFreeze,
	"serve":   helperServe,
}

func TestMain(m *testing.M) {
	Child(testTasks)
	if h := os.Getenv("KEEPER_TEST_HELPER"); h != "" {
		helpers[h]()
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// start runs a keeper in this process until the returned function or the end
// of the test stops it.
func start(t *testing.T, path string) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- Serve(ctx, path, testTasks) }()
	stop = func() {
		t.Helper()
		cancel()
		if err, open := <-ended; open {
			close(ended)
			if err != nil {
				t.Errorf("Serve: %v", err)
			}
		}
	}
	t.Cleanup(stop)
	return stop
}

// testTasks are the tasks of the keepers in this process.
var testTasks = map[string]Task{
	"echo": func(args json.RawMessage, fds []int) (any, error) {
		for _, fd := range fds {
			if _, err := unix.Write(fd, []byte("x")); err != nil {
				return nil, err
			}
		}
		return args, nil
	},
	"fail":  func(json.RawMessage, []int) (any, error) { return nil, errors.New("on purpose") },
	"panic": func(json.RawMessage, []int) (any, error) { panic("on purpose") },
	"pid":   func(json.RawMessage, []int) (any, error) { return testMeta{N: os.Getpid()}, nil },
	"wait": func(_ json.RawMessage, fds []int) (any, error) { // until there is something to read
		_, err := unix.Poll([]unix.PollFd{{Fd: int32(fds[0]), Events: unix.POLLIN}}, -1)
		return testMeta{}, err
	},
	"odd": func(json.RawMessage, []int) (any, error) { return 7, nil },
}

func connect(t *testing.T, path string) *Client {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	c, err := Dial(ctx, path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	if _, err := c.List(ctx); err != nil { // so the keeper has accepted the connection
		t.Fatal(err)
	}
	return c
}

func socketPath(t *testing.T) string { return machine.SocketPath(t, "keeper.sock") }

// pipeFDs returns both ends of a pipe. Once the last duplicate of w is closed,
// reading r gives the end.
func pipeFDs(t *testing.T) (r *os.File, w int) {
	t.Helper()
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	unix.SetNonblock(p[0], true)
	r = os.NewFile(uintptr(p[0]), "pipe")
	t.Cleanup(func() { r.Close() })
	return r, p[1]
}

func isClosed(t *testing.T, r *os.File) {
	t.Helper()
	r.SetReadDeadline(time.Now().Add(patience))
	if n, err := r.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("descriptor still open somewhere: read gives %d, %v", n, err)
	}
}

func inode(t *testing.T, fd int) uint64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		t.Fatal(err)
	}
	return st.Ino
}

// openFDs counts the descriptors of this process.
func openFDs(t *testing.T) int {
	t.Helper()
	names, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(names)
}

// eventually waits for something that has no event to wait for.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !ok(); {
		if time.Now().After(end) {
			t.Fatalf("never happened: %s", what)
		}
		runtime.Gosched()
		time.Sleep(time.Millisecond)
	}
}

type testMeta struct {
	N    int
	Text string
}

func TestPutGetListDrop(t *testing.T) {
	ctx := t.Context()
	path := socketPath(t)
	start(t, path)
	c := connect(t, path)

	r1, w1 := pipeFDs(t)
	r2, w2 := pipeFDs(t)
	want := []uint64{inode(t, w1), inode(t, w2)}
	meta := testMeta{7, "<ü>" + strings.Repeat("<", 5000)}
	if err := c.Put(ctx, "fuse/a", meta, w1, w2); err != nil {
		t.Fatal(err)
	}
	unix.Close(w1)
	unix.Close(w2)

	got, fds, err := connect(t, path).Get(ctx, "fuse/a") // any client may fetch it
	if err != nil {
		t.Fatal(err)
	}
	var m testMeta
	if err := json.Unmarshal(got, &m); err != nil || m != meta {
		t.Errorf("meta %s, %v", got, err)
	}
	if len(fds) != 2 || inode(t, fds[0]) != want[0] || inode(t, fds[1]) != want[1] {
		t.Errorf("wrong descriptors %v", fds)
	}
	for _, fd := range fds {
		if flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err != nil || flags&unix.FD_CLOEXEC == 0 {
			t.Errorf("descriptor %d would be inherited: %#x, %v", fd, flags, err)
		}
	}
	closeAll(fds)

	if _, _, err := c.Get(ctx, "fuse/b"); !errors.Is(err, ErrNotFound) {
		t.Errorf("get of an absent key: %v", err)
	}
	// Putting again replaces, and closes what was there.
	r3, w3 := pipeFDs(t)
	if err := c.Put(ctx, "fuse/a", testMeta{N: 8}, w3); err != nil {
		t.Fatal(err)
	}
	unix.Close(w3)
	isClosed(t, r1)
	isClosed(t, r2)
	if err := c.Drop(ctx, "fuse/a"); err != nil {
		t.Fatal(err)
	}
	isClosed(t, r3)
	if err := c.Drop(ctx, "fuse/a"); err != nil {
		t.Errorf("second drop: %v", err)
	}
	if keys, err := c.List(ctx); err != nil || len(keys) != 0 {
		t.Errorf("list %v, %v", keys, err)
	}
}

func TestRun(t *testing.T) {
	ctx := t.Context()
	path := socketPath(t)
	start(t, path)
	c := connect(t, path)
	r, w := pipeFDs(t)
	var got testMeta
	if err := c.Run(ctx, "echo", testMeta{7, "<x>"}, &got, w, w); err != nil || got != (testMeta{7, "<x>"}) {
		t.Errorf("echo gives %+v, %v", got, err)
	}
	unix.Close(w)
	if b, err := io.ReadAll(r); err != nil || string(b) != "xx" { // so the keeper has closed them, too
		t.Errorf("the task wrote %q, %v", b, err)
	}
	for task, want := range map[string]string{
		"fail":   "on purpose",
		"panic":  "panicked: on purpose",
		"odd":    "not a JSON object",
		"absent": "no such task",
	} {
		if err := c.Run(ctx, task, testMeta{}, &got); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", task, err)
		}
	}
	if err := c.Run(ctx, "echo", 7, &got); err == nil {
		t.Error("arguments that are no object: accepted")
	}
	over, cancel := context.WithCancel(ctx)
	cancel()
	if err := c.Run(over, "echo", testMeta{}, &got); err == nil {
		t.Error("ended context: no error")
	}
	if _, err := c.List(ctx); err != nil {
		t.Error(err)
	}
}

// TestTaskWaits: a task that waits for a device is done by another process, and
// the keeper has nothing of it once its client has given up.
func TestTaskWaits(t *testing.T) {
	ctx := t.Context()
	path := socketPath(t)
	start(t, path)
	c := connect(t, path)
	var got testMeta
	if err := c.Run(ctx, "pid", testMeta{}, &got); err != nil || got.N == os.Getpid() {
		t.Errorf("the keeper has done it itself: %v", err)
	}
	r, w := pipeFDs(t)
	before := openFDs(t)
	routines := runtime.NumGoroutine()
	const tries = 5
	for range tries {
		short, cancel := context.WithTimeout(ctx, 50*time.Millisecond)
		if err := c.Run(short, "wait", testMeta{}, &got, int(r.Fd())); err == nil {
			t.Error("it does not wait")
		}
		cancel()
	}
	// A pidfd and a goroutine for each process is all that is left.
	eventually(t, "connections end", func() bool { return openFDs(t) <= before+tries })
	eventually(t, "goroutines end", func() bool { return runtime.NumGoroutine() <= routines+tries })
	unix.Close(w) // which wakes them
	eventually(t, "the processes end", func() bool { return len(childrenOf(t, os.Getpid())) == 0 })
	if err := c.Run(ctx, "pid", testMeta{}, &got); err != nil {
		t.Error(err)
	}
}

func TestListPages(t *testing.T) {
	ctx := t.Context()
	path := socketPath(t)
	start(t, path)
	c := connect(t, path)
	_, w := pipeFDs(t)
	defer unix.Close(w)
	const n = 60 // of 200 bytes: three pages
	var want []string
	for i := range n {
		key := fmt.Sprintf("%03d", i) + strings.Repeat("<", 197)
		want = append(want, key)
		if err := c.Put(ctx, key, testMeta{}, w); err != nil {
			t.Fatal(err)
		}
	}
	keys, err := c.List(ctx)
	if err != nil || strings.Join(keys, "\n") != strings.Join(want, "\n") {
		t.Errorf("list gives %d keys, want %d: %v", len(keys), n, err)
	}
}

func TestClientRefusesBadArguments(t *testing.T) {
	ctx := t.Context()
	path := socketPath(t)
	start(t, path)
	c := connect(t, path)
	_, w := pipeFDs(t)
	defer unix.Close(w)
	before := openFDs(t)
	for name, err := range map[string]error{
		"empty key":  c.Put(ctx, "", testMeta{}, w),
		"no object":  c.Put(ctx, "a", []int{1}, w),
		"bad fd":     c.Put(ctx, "a", testMeta{}, 1<<20),
		"huge meta":  c.Put(ctx, "a", testMeta{Text: strings.Repeat("x", maxMeta)}, w),
		"no channel": c.Put(ctx, "a", make(chan int), w),
	} {
		if err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	if _, err := c.Freeze(ctx, "a", w, 0); err == nil {
		t.Error("freeze for no time: accepted")
	}
	if _, err := c.Freeze(ctx, "a", w, time.Second); err == nil {
		t.Error("freeze of a pipe: accepted")
	}
	eventually(t, "descriptors closed", func() bool { return openFDs(t) <= before })
	if err := c.Err(); err != nil {
		t.Errorf("the connection suffered: %v", err)
	}
}

// TestKeeperRestart replaces the keeper under a client.
func TestKeeperRestart(t *testing.T) {
	ctx := t.Context()
	path := socketPath(t)
	stop := start(t, path)
	c := connect(t, path)
	r1, w1 := pipeFDs(t)
	r2, w2 := pipeFDs(t)
	want := inode(t, w1)
	for key, fd := range map[string]int{"stays": w1, "goes": w2} {
		if err := c.Put(ctx, key, testMeta{Text: key}, fd); err != nil {
			t.Fatal(err)
		}
		unix.Close(fd)
	}
	for range 3 {
		stop()
		eventually(t, "client notices", func() bool { return c.Err() != nil })
		stop = start(t, path)
		eventually(t, "client is back", func() bool { return c.Err() == nil })
		_, fds, err := connect(t, path).Get(ctx, "stays")
		if err != nil || len(fds) != 1 || inode(t, fds[0]) != want {
			t.Fatalf("not put again: %v, %v", fds, err)
		}
		closeAll(fds)
	}
	// A drop that cannot be delivered is made up for.
	stop()
	short, cancel := context.WithTimeout(ctx, 10*time.Millisecond)
	defer cancel()
	if err := c.Drop(short, "goes"); err == nil {
		t.Error("drop without a keeper: no error")
	}
	isClosed(t, r2)
	start(t, path)
	if keys, err := c.List(ctx); err != nil || len(keys) != 1 || keys[0] != "stays" {
		t.Errorf("after the restart: %v, %v", keys, err)
	}
	if err := c.Drop(ctx, "stays"); err != nil {
		t.Error(err)
	}
	isClosed(t, r1)
	c.Close()
	if err := c.Put(ctx, "late", testMeta{}, 0); !errors.Is(err, ErrClosed) {
		t.Errorf("put with a closed client: %v", err)
	}
}

// TestDropAfterLostAnswer drops a key whose put was not waited for.
func TestDropAfterLostAnswer(t *testing.T) {
	ctx := t.Context()
	path := socketPath(t)
	start(t, path)
	c := connect(t, path)
	r, w := pipeFDs(t)
	over, cancel := context.WithCancel(ctx)
	cancel()
	for range 200 { // which the keeper sees now and then
		c.Put(over, "a", testMeta{}, w)
	}
	unix.Close(w)
	if err := c.Drop(ctx, "a"); err != nil {
		t.Fatal(err)
	}
	isClosed(t, r)
	if keys, err := c.List(ctx); err != nil || len(keys) != 0 {
		t.Errorf("after the drop: %v, %v", keys, err)
	}
}

// TestDropNotSent: a drop whose time ended behind another call is made up for on
// the same connection.
func TestDropNotSent(t *testing.T) {
	path := socketPath(t)
	l, err := unixsocket.Listen(t.Context(), network, path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c, err := Dial(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	conn, err := l.AcceptUnix()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(patience))
	next := func(want op) (key string) {
		t.Helper()
		msg, _, err := receive(conn)
		if err != nil {
			t.Fatal(err)
		}
		r, err := parseRequest(msg, 0)
		if err != nil || r.Op != want {
			t.Fatalf("the client sends %s, %v", msg, err)
		}
		return r.Key
	}
	listed := make(chan error, 1)
	go func() {
		_, err := c.List(t.Context())
		listed <- err
	}()
	next(opList)
	over, cancel := context.WithCancel(t.Context())
	cancel()
	if err := c.Drop(over, "a"); !errors.Is(err, context.Canceled) {
		t.Errorf("drop behind a call without an answer: %v", err)
	}
	if err := send(conn, response{Version: protocolVersion}, nil); err != nil {
		t.Fatal(err)
	}
	if err := <-listed; err != nil {
		t.Error(err)
	}
	if key := next(opDrop); key != "a" {
		t.Errorf("dropped %q", key)
	}
}

// TestMessageOfTheGone: what a client sent before it closed is not carried out
// once a newer connection may have overtaken it.
func TestMessageOfTheGone(t *testing.T) {
	path := socketPath(t)
	l, err := unixsocket.Listen(t.Context(), network, path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	client, err := net.Dial(network, path)
	if err != nil {
		t.Fatal(err)
	}
	conn, err := l.AcceptUnix()
	if err != nil {
		t.Fatal(err)
	}
	r, w := pipeFDs(t)
	put := request{Version: protocolVersion, Op: opPut, Key: "a", Meta: json.RawMessage("{}")}
	if err := send(client.(*net.UnixConn), put, []int{w}); err != nil {
		t.Fatal(err)
	}
	unix.Close(w)
	client.Close()
	s := &server{entries: make(map[string]entry)}
	s.serveConn(t.Context(), conn)
	isClosed(t, r)
	if len(s.entries) != 0 {
		t.Errorf("carried out: %v", s.entries)
	}
}

// helper runs the test binary exe as one of helpers; its output is in out.
func helper(t *testing.T, exe, name string, cred *syscall.Credential, args ...string) (cmd *exec.Cmd, out io.Reader) {
	t.Helper()
	cmd = exec.Command(exe, args...)
	cmd.Env = append(os.Environ(), "KEEPER_TEST_HELPER="+name)
	cmd.Stderr = os.Stderr
	if cred != nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: cred}
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	return cmd, out
}

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
}

// helperServe is a keeper at args[1].
func helperServe() {
	if err := LockMemory(); err != nil {
		fmt.Fprintln(os.Stderr, "memory not locked:", err)
	}
	if err := Serve(context.Background(), os.Args[1], nil); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
