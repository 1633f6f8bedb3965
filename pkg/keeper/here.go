package keeper

import (
	"context"
	"fmt"
	"time"

	"golang.org/x/sys/unix"
)

// here are the children of a process that has no keeper to do things for it.
var here children

// FreezeHere is Client.Freeze for a process without a keeper. The program must
// begin with Child.
func FreezeHere(ctx context.Context, key string, dir int, timeout time.Duration) (*Frozen, error) {
	req := request{Version: protocolVersion, Op: opFreeze, Key: key, TimeoutMS: timeout.Milliseconds()}
	if err := req.checkFields(); err != nil {
		return nil, fmt.Errorf("freeze %q: %w", key, err)
	}
	dup, err := unix.FcntlInt(uintptr(dir), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("freeze %q: %w", key, err)
	}
	c, err := here.freeze(ctx, req, dup)
	if err != nil {
		unix.Close(dup)
		return nil, fmt.Errorf("freeze %q: %w", key, err)
	}
	return &Frozen{child: c, conn: c.conn, dir: dup}, nil
}
