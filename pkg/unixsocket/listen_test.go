package unixsocket

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/snapmerge/snapmerge/test/machine"
)

func TestListen(t *testing.T) {
	for _, network := range []string{"unix", "unixpacket"} {
		t.Run(network, func(t *testing.T) {
			path := machine.SocketPath(t, "run/s")
			l, err := Listen(t.Context(), network, path)
			if err != nil {
				t.Fatal(err)
			}
			if st, err := os.Stat(path); err != nil || st.Mode().Perm() != 0o600 {
				t.Errorf("%v, %v; want mode 0600", st.Mode(), err)
			}
			if _, err := Listen(t.Context(), network, path); !errors.Is(err, ErrServed) {
				t.Errorf("second listener: %v", err)
			}
			if c, err := net.Dial(network, path); err != nil {
				t.Errorf("after that the first cannot be reached: %v", err)
			} else {
				c.Close()
			}
			l.SetUnlinkOnClose(false) // as a killed process leaves it
			l.Close()
			l, err = Listen(t.Context(), network, path)
			if err != nil {
				t.Fatalf("over a dead socket: %v", err)
			}
			l.Close()
		})
	}
}

// TestLeftAlone: what is at the path stays if it is not ours to remove.
func TestLeftAlone(t *testing.T) {
	dir := machine.SocketDir(t)
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if l, err := Listen(t.Context(), "unix", file); err == nil {
		l.Close()
		t.Error("listens at a file")
	}
	if b, err := os.ReadFile(file); err != nil || string(b) != "precious" {
		t.Errorf("the file is now %q, %v", b, err)
	}
	link := filepath.Join(dir, "link")
	if err := os.Symlink(file, link); err != nil {
		t.Fatal(err)
	}
	if l, err := Listen(t.Context(), "unix", link); err == nil {
		l.Close()
		t.Error("listens at a link")
	}
	// A living socket of another type.
	other := filepath.Join(dir, "other")
	l, err := net.Listen("unixpacket", other)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if _, err := Listen(t.Context(), "unix", other); !errors.Is(err, unix.EPROTOTYPE) {
		t.Errorf("over a socket of another type: %v", err)
	}
	if c, err := net.Dial("unixpacket", other); err != nil {
		t.Errorf("it cannot be reached any more: %v", err)
	} else {
		c.Close()
	}
}
