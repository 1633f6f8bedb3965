package devicetest

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/snapmerge/snapmerge/pkg/transport"
)

// Patience is how long a test waits for what happens at once or never.
const Patience = 3 * time.Minute

// serverEnv marks a test binary that is to be a server.
const serverEnv = "SNAPMERGE_TEST_SERVER"

// IsServer tells whether this process is one that StartServer has started.
func IsServer() bool { return os.Getenv(serverEnv) != "" }

// ServerMain lets a test binary be a server of its own, which can be killed: in one
// that StartServer has started it serves the image args[0] through the transport
// that open makes of the other arguments, adopted or new, and does not return. It
// prints "adopted" or "ready" and the device. A line on its input has it close the
// device, print "closed" and end.
func ServerMain(open func(ctx context.Context, args []string) (transport.Transport, error)) {
	if !IsServer() {
		return
	}
	if err := serve(open); err != nil {
		fmt.Println("error:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

func serve(open func(context.Context, []string) (transport.Transport, error)) error {
	ctx, cancel := context.WithTimeout(context.Background(), Patience)
	defer cancel()
	b, err := OpenServed(os.Args[1])
	if err != nil {
		return err
	}
	tr, err := open(ctx, os.Args[2:])
	if err != nil {
		return err
	}
	state := "adopted"
	d, err := tr.Adopt(ctx, "v", b)
	if errors.Is(err, transport.ErrNotFound) {
		state = "ready"
		d, err = tr.Create(ctx, "v", b, transport.Options{})
	}
	if err != nil {
		return err
	}
	fmt.Println(state, d.Path())
	if !bufio.NewScanner(os.Stdin).Scan() {
		return io.ErrUnexpectedEOF
	}
	if err := d.Close(context.Background()); err != nil {
		return err
	}
	fmt.Println("closed")
	return nil
}

// Server is a process that serves a device of volume "v".
type Server struct {
	t    testing.TB
	args []string
	cmd  *exec.Cmd
	in   io.WriteCloser
	out  *bufio.Reader
}

// StartServer starts one, which is killed at the end of the test. args go to the
// function that was given to ServerMain.
func StartServer(t testing.TB, image string, args ...string) *Server {
	t.Helper()
	s := &Server{t: t, args: append([]string{image}, args...)}
	s.Start()
	t.Cleanup(s.Kill)
	return s
}

// Start starts it again.
func (s *Server) Start() {
	s.t.Helper()
	s.cmd = exec.Command(os.Args[0], s.args...)
	s.cmd.Env = append(os.Environ(), serverEnv+"=1")
	s.cmd.Stderr = os.Stderr
	var err error
	if s.in, err = s.cmd.StdinPipe(); err != nil {
		s.t.Fatal(err)
	}
	out, err := s.cmd.StdoutPipe()
	if err != nil {
		s.t.Fatal(err)
	}
	s.out = bufio.NewReader(out)
	if err := s.cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
}

// Kill sends SIGKILL and waits until the process is gone.
func (s *Server) Kill() {
	s.t.Helper()
	if s.cmd.ProcessState != nil {
		return
	}
	_ = s.cmd.Process.Signal(syscall.SIGKILL)
	gone := make(chan struct{})
	go func() {
		defer close(gone)
		_ = s.cmd.Wait()
	}()
	select {
	case <-gone:
	case <-time.After(Patience):
		s.t.Fatalf("process %d does not die", s.cmd.Process.Pid)
	}
}

// Say writes a line to it.
func (s *Server) Say(line string) {
	s.t.Helper()
	if _, err := io.WriteString(s.in, line+"\n"); err != nil {
		s.t.Fatal(err)
	}
}

// Line reads a line that must begin with want, and returns the rest.
func (s *Server) Line(want string) string {
	s.t.Helper()
	line, err := s.out.ReadString('\n')
	word, rest, _ := strings.Cut(strings.TrimSpace(line), " ")
	if err != nil || word != want {
		s.t.Fatalf("server says %q, want %q (%v)", line, want, err)
	}
	return rest
}

// Restart kills it and waits until another one has adopted the device.
func (s *Server) Restart() (device string) {
	s.t.Helper()
	s.Kill()
	s.Start()
	return s.Line("adopted")
}

// Finish has the server close its device and end.
func (s *Server) Finish() {
	s.t.Helper()
	s.Say("close")
	s.Line("closed")
	if err := s.cmd.Wait(); err != nil {
		s.t.Error(err)
	}
}

// Image makes a file of the size with every block allocated.
func Image(t testing.TB, size int) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(name, make([]byte, size), 0o600); err != nil {
		t.Fatal(err)
	}
	return name
}
