package ublk

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/pprof"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/snapmerge/snapmerge/pkg/transport"
	"github.com/snapmerge/snapmerge/test/devicetest"
)

const patience = 60 * time.Second

// needDriver skips where no devices are to be made.
func needDriver(t testing.TB) {
	t.Helper()
	if os.Getenv("SNAPMERGE_VM_GUEST") == "" {
		t.Skip("makes ublk devices, as root; `make test-vm` runs it in a virtual machine (SNAPMERGE_VM_GUEST=1 runs it here)")
	}
}

func within(t testing.TB, limit time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	t.Cleanup(cancel)
	return ctx
}

// eventually waits for something that has no event to wait for.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("never happened: %s", what)
		}
	}
}

// noLeftovers makes the test fail if it leaves devices, descriptors or
// goroutines behind.
func noLeftovers(t *testing.T) {
	t.Helper()
	needDriver(t)
	before := len(openFiles(t))
	t.Cleanup(func() {
		left, err := filepath.Glob(charClass + "/ublkc*")
		if err != nil || len(left) > 0 {
			t.Errorf("devices left: %v, %v", left, err)
		}
		eventually(t, "goroutines end", func() bool {
			var b bytes.Buffer
			_ = pprof.Lookup("goroutine").WriteTo(&b, 1)
			return !strings.Contains(b.String(), "ublk.(*queue)") && !strings.Contains(b.String(), "ublk.(*device)")
		})
		if after := openFiles(t); len(after) > before {
			t.Errorf("descriptors left: had %d, now %v", before, after)
		}
	})
}

func openFiles(t testing.TB) []string {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		if name, err := os.Readlink("/proc/self/fd/" + e.Name()); err == nil {
			names = append(names, name)
		}
	}
	return names
}

// create makes a device that is closed at the end of the test.
func create(t testing.TB, tr *Transport, volume string, b transport.Backend, o transport.Options) *device {
	t.Helper()
	d, err := tr.Create(within(t, patience), volume, b, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { closeDevice(t, d) })
	return d.(*device)
}

func closeDevice(t testing.TB, d transport.Device) {
	t.Helper()
	if err := d.Close(within(t, patience)); err != nil {
		t.Error(err)
	}
}

// imageFile makes a file of the size with every block allocated.
func imageFile(t testing.TB, size int) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(name, make([]byte, size), 0o600); err != nil {
		t.Fatal(err)
	}
	return name
}

// TestMain lets the test binary be a server of its own that can be killed.
func TestMain(m *testing.M) {
	if os.Getenv("UBLK_TEST_SERVER") == "" {
		os.Exit(m.Run())
	}
	if err := helperServer(os.Args[1], os.Args[2]); err != nil {
		fmt.Println("error:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

// helperServer serves the image, adopted or new, and prints "adopted" or "ready"
// and the device. A line on its input has it close the device, print "closed" and
// end.
func helperServer(dir, image string) error {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	b, err := devicetest.OpenFile(image)
	if err != nil {
		return err
	}
	tr, state := New(dir), "adopted"
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

// server is a helper that runs.
type server struct {
	t    testing.TB
	args []string
	cmd  *exec.Cmd
	in   io.WriteCloser
	out  *bufio.Reader
}

func startServer(t testing.TB, dir, image string) *server {
	t.Helper()
	s := &server{t: t, args: []string{dir, image}}
	s.start()
	t.Cleanup(s.kill)
	return s
}

func (s *server) start() {
	s.t.Helper()
	s.cmd = exec.Command(os.Args[0], s.args...)
	s.cmd.Env = append(os.Environ(), "UBLK_TEST_SERVER=1")
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

// kill sends SIGKILL and waits until the process is gone.
func (s *server) kill() {
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
	case <-time.After(patience):
		s.t.Fatalf("process %d does not die", s.cmd.Process.Pid)
	}
}

// line reads a line that must begin with want, and returns the rest.
func (s *server) line(want string) string {
	s.t.Helper()
	line, err := s.out.ReadString('\n')
	word, rest, _ := strings.Cut(strings.TrimSpace(line), " ")
	if err != nil || word != want {
		s.t.Fatalf("server says %q, want %q (%v)", line, want, err)
	}
	return rest
}

// finish has the server close its device and end.
func (s *server) finish() {
	s.t.Helper()
	if _, err := io.WriteString(s.in, "close\n"); err != nil {
		s.t.Fatal(err)
	}
	s.line("closed")
	if err := s.cmd.Wait(); err != nil {
		s.t.Error(err)
	}
}
