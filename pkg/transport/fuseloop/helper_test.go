package fuseloop

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
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/snapmerge/snapmerge/pkg/keeper"
	"github.com/snapmerge/snapmerge/pkg/transport"
	"github.com/snapmerge/snapmerge/test/devicetest"
)

// TestMain lets the test binary be a process of its own: a keeper, a server of
// volumes that can be killed, or a probe in another mount namespace.
func TestMain(m *testing.M) {
	keeper.Child(Tasks())
	var err error
	switch os.Getenv("FUSELOOP_TEST_HELPER") {
	case "":
		os.Exit(m.Run())
	case "keeper":
		err = keeper.Serve(context.Background(), os.Args[1], Tasks())
	case "server":
		err = helperServer(os.Args[1], os.Args[2:])
	case "probe":
		err = helperProbe(os.Args[1:])
	}
	if err != nil {
		fmt.Println("error:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

// helperServer serves the images, each as the volume of its base name, adopted
// or new; it prints "ready" and the devices, or "adopted" and the devices. Then it
// obeys lines on its input: "freeze DIR" freezes a file system and prints
// "frozen"; "hang" makes the devices hang and prints "hangs"; "close" closes the devices, prints "closed" and ends. Without a socket
// it has no keeper.
func helperServer(socket string, images []string) error {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	var k *keeper.Client
	if socket != "" {
		var err error
		if k, err = keeper.Dial(ctx, socket); err != nil {
			return err
		}
		defer k.Close()
	}
	tr := New(k)
	var devices []transport.Device
	var hang atomic.Bool
	state, paths := "adopted", ""
	for _, image := range images {
		file, err := devicetest.OpenServed(image)
		if err != nil {
			return err
		}
		b := &hangBackend{file, &hang}
		volume := filepath.Base(image)
		d, err := tr.Adopt(ctx, volume, b)
		if errors.Is(err, transport.ErrNotFound) {
			state = "ready"
			var o transport.Options
			if os.Getenv(helperBase) != "" {
				o.Base = func() (string, error) { return image, nil }
			}
			d, err = tr.Create(ctx, volume, b, o)
		}
		if err != nil {
			return err
		}
		devices = append(devices, d)
		paths += " " + d.Path()
	}
	fmt.Println(state + paths)
	in := bufio.NewScanner(os.Stdin)
	for in.Scan() {
		if dir, ok := strings.CutPrefix(in.Text(), "freeze "); ok {
			if err := helperFreeze(k, dir); err != nil {
				return err
			}
			continue
		}
		if in.Text() == "hang" {
			hang.Store(true)
			fmt.Println("hangs")
			continue
		}
		for _, d := range devices {
			if err := d.Close(context.Background()); err != nil {
				return err
			}
		}
		fmt.Println("closed")
		return nil
	}
	return in.Err()
}

// helperBase is set in the environment of a server whose devices pass through to the
// images.
const helperBase = "FUSELOOP_TEST_BASE"

// hangBackend does not return from writes once hang is set.
type hangBackend struct {
	*devicetest.Served
	hang *atomic.Bool
}

func (b *hangBackend) Lend(off, n int64, write bool) (fd int, back func(done bool), ok bool) {
	if b.hang.Load() {
		return -1, nil, false
	}
	return b.Served.Lend(off, n, write)
}

func (b *hangBackend) WriteAt(p []byte, off int64) (int, error) {
	if b.hang.Load() {
		select {}
	}
	return b.Served.WriteAt(p, off)
}

// watchdog is that of a frozen file system: so late that a thaw before it comes
// from something else. It is the longest that a freeze may ask for.
const watchdog = time.Minute

// helperFreeze freezes for as long as the process lives.
func helperFreeze(k *keeper.Client, dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	if k != nil {
		_, err = k.Freeze(context.Background(), dir, int(f.Fd()), watchdog)
	} else {
		_, err = keeper.FreezeHere(context.Background(), dir, int(f.Fd()), watchdog)
	}
	if err != nil {
		return err
	}
	fmt.Println("frozen")
	return nil
}

// process is a helper that runs.
type process struct {
	cmd *exec.Cmd
	in  io.WriteCloser
	out *bufio.Reader
}

func startHelper(t *testing.T, kind string, args ...string) *process {
	t.Helper()
	p := &process{cmd: exec.Command(os.Args[0], args...)}
	p.cmd.Env = append(os.Environ(), "FUSELOOP_TEST_HELPER="+kind)
	p.cmd.Stderr = os.Stderr
	var err error
	if p.in, err = p.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	p.out = bufio.NewReader(out)
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.kill(t) })
	return p
}

// kill sends SIGKILL and waits until the process is gone.
func (p *process) kill(t *testing.T) {
	t.Helper()
	if p.cmd.ProcessState != nil {
		return
	}
	p.cmd.Process.Signal(syscall.SIGKILL)
	gone := make(chan struct{})
	go func() {
		defer close(gone)
		p.cmd.Wait()
	}()
	select {
	case <-gone:
	case <-time.After(patience):
		t.Fatalf("process %d does not die", p.cmd.Process.Pid)
	}
}

// line reads a line that must begin with want, and returns the fields after it.
func (p *process) line(t *testing.T, want string) []string {
	t.Helper()
	line, err := p.out.ReadString('\n')
	fields := strings.Fields(line)
	if err != nil || fields[0] != want {
		t.Fatalf("helper says %q, want %q (%v)", line, want, err)
	}
	return fields[1:]
}

// tell gives a server a command.
func (p *process) tell(t *testing.T, command string) {
	t.Helper()
	if _, err := io.WriteString(p.in, command+"\n"); err != nil {
		t.Fatal(err)
	}
}

// finish has a server close its devices and end.
func (p *process) finish(t *testing.T) {
	t.Helper()
	p.tell(t, "close")
	p.line(t, "closed")
	if err := p.cmd.Wait(); err != nil {
		t.Error(err)
	}
}

// startKeeper runs a keeper as a process of its own.
func startKeeper(t *testing.T, socket string) *process {
	t.Helper()
	return startHelper(t, "keeper", socket)
}

func dialKeeper(t *testing.T, socket string) *keeper.Client {
	t.Helper()
	k, err := keeper.Dial(within(t, patience), socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { k.Close() })
	return k
}
