package keeper

import (
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"
)

// FreezeHere is Client.Freeze for a process without a keeper: the watchdog is
// this process's own, and if the process dies the file system stays frozen until
// somebody thaws it. thaw can be called once; its error is as Frozen.Thaw's.
func FreezeHere(key string, dir int, timeout time.Duration) (thaw func() error, err error) {
	dup, err := unix.FcntlInt(uintptr(dir), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("freeze %q: %w", key, err)
	}
	f, err := newFreeze(key, dup, timeout)
	if err != nil {
		return nil, fmt.Errorf("freeze %q: %w", key, err)
	}
	return func() error {
		err := f.thaw()
		if errors.Is(err, errNotFrozen) {
			return ErrBroken
		}
		return err
	}, nil
}
