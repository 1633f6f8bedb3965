package keeper

import (
	"context"
	"errors"
	"fmt"
	"net"
	"time"

	"golang.org/x/sys/unix"
)

// Frozen is a file system that the keeper, or a child of this process, holds
// frozen.
type Frozen struct {
	conn  *net.UnixConn // its end thaws
	dir   int           // to thaw with if who froze dies
	child *child        // of this process; nil if the keeper froze
}

// Freeze makes the keeper sync and freeze the file system of the open directory
// dir, which stays the caller's. The file system is thawed by Thaw, by the end of
// ctx before Freeze has returned, by the end of this process, or timeout (to the
// millisecond, at most a minute) after its writers have begun to wait.
func (c *Client) Freeze(ctx context.Context, key string, dir int, timeout time.Duration) (*Frozen, error) {
	req := request{Version: protocolVersion, Op: opFreeze, Key: key, TimeoutMS: timeout.Milliseconds()}
	if err := req.checkFields(); err != nil {
		return nil, fmt.Errorf("keeper: freeze %q: %w", key, err)
	}
	dup, err := unix.FcntlInt(uintptr(dir), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("keeper: freeze %q: %w", key, err)
	}
	conn, err := c.dialAnother(ctx)
	if err != nil {
		unix.Close(dup)
		return nil, err
	}
	f := &Frozen{conn: conn, dir: dup}
	resp, err := ask(ctx, conn, req, dup)
	if err == nil {
		err = resp.err()
	}
	if err != nil {
		f.close()
		return nil, fmt.Errorf("keeper: freeze %q: %w", key, err)
	}
	return f, nil
}

// Thaw ends the freeze. Any error means that the file system may not have been
// frozen all the time; ErrBroken says for certain that it was not. It can be
// called once.
func (f *Frozen) Thaw(ctx context.Context) error {
	defer f.close()
	resp, err := ask(ctx, f.conn, request{Version: protocolVersion, Op: opThaw})
	if err == nil {
		err = resp.err()
		if resp.Code != codeFailed {
			if f.child != nil {
				f.child.end(ctx)
			}
			return err
		}
	}
	if ctx.Err() != nil {
		return fmt.Errorf("keeper: thaw: %w", ctx.Err())
	}
	// Who was to thaw is dead, or could not. A child whose parent has died thaws by
	// itself, so it may be done.
	terr := here.thawDir(ctx, f.dir)
	if terr != nil && !errors.Is(terr, ErrBroken) {
		return fmt.Errorf("keeper: thaw: %w: %w", err, terr)
	}
	return terr
}

func (f *Frozen) close() {
	f.conn.Close()
	unix.Close(f.dir)
}
