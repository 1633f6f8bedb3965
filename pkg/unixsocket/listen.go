// Package unixsocket makes the sockets that our processes listen at.
package unixsocket

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"
)

// ErrServed says that a living process listens at the path.
var ErrServed = errors.New("another process serves it")

// Listen makes a socket at the path that only our user can connect to, and the
// directory that it lies in if that is missing. network is "unix" or
// "unixpacket". A socket that a dead process left is replaced; a living one gives
// ErrServed, and anything else at the path is an error and left alone.
func Listen(ctx context.Context, network, path string) (*net.UnixListener, error) {
	l, err := listen(ctx, network, path)
	if err != nil {
		return nil, fmt.Errorf("socket %s: %w", path, err)
	}
	return l, nil
}

func listen(ctx context.Context, network, path string) (*net.UnixListener, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil { // /run is empty after a boot
		return nil, err
	}
	if err := removeStale(ctx, network, path); err != nil {
		return nil, err
	}
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		// The mode of an unbound socket becomes that of the file that bind makes.
		var err error
		if cerr := c.Control(func(fd uintptr) { err = unix.Fchmod(int(fd), 0o600) }); cerr != nil {
			return cerr
		}
		return err
	}}
	l, err := lc.Listen(ctx, network, path)
	if err != nil {
		return nil, err
	}
	return l.(*net.UnixListener), nil
}

// removeStale removes a socket that nobody listens at.
func removeStale(ctx context.Context, network, path string) error {
	st, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if st.Mode()&fs.ModeSocket == 0 {
		return errors.New("there is something that is no socket")
	}
	var d net.Dialer
	c, err := d.DialContext(ctx, network, path)
	switch {
	case err == nil:
		c.Close()
		return ErrServed
	case errors.Is(err, unix.ECONNREFUSED), errors.Is(err, fs.ErrNotExist):
	default:
		return err // full, or of another type: somebody's all the same
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}
