package keeper

import (
	"errors"
	"fmt"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"
)

// FIFREEZE and FITHAW of linux/fs.h: _IOWR('X', 119 and 120, int).
const (
	ioctlFreeze = 0xc0045877
	ioctlThaw   = 0xc0045878
)

// rethaw is how often an overdue freeze is thawed again: a thaw that came too
// early for a slow FIFREEZE must not be the last one.
const rethaw = time.Second

// freeze is one frozen file system, in the child that has frozen it.
type freeze struct {
	key string

	mu     sync.Mutex
	dir    int // an open directory of the file system; -1 once thawed for good
	timer  *time.Timer
	broken bool // thawed by the watchdog
}

// newFreeze freezes the file system of the directory dir and owns dir from now
// on. The timeout counts from before FIFREEZE, because writers wait from then.
// gone tells whether nobody wants it any more.
func newFreeze(key string, dir int, timeout time.Duration, gone func() bool) (*freeze, error) {
	// What is dirty is written before any writer has to wait.
	if err := unix.Syncfs(dir); err != nil {
		unix.Close(dir)
		return nil, fmt.Errorf("syncfs: %w", err)
	}
	if gone() {
		unix.Close(dir)
		return nil, errors.New("given up during syncfs")
	}
	f := &freeze{key: key, dir: dir}
	f.mu.Lock() // expire must find the timer set
	f.timer = time.AfterFunc(timeout, f.expire)
	f.mu.Unlock()
	if err := unix.IoctlSetInt(dir, ioctlFreeze, 0); err != nil {
		f.mu.Lock()
		defer f.mu.Unlock()
		f.closeLocked()
		return nil, fmt.Errorf("FIFREEZE: %w", err)
	}
	return f, nil
}

// expire is the watchdog: it thaws, and goes on doing so until somebody thaws
// in the orderly way.
func (f *freeze) expire() {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.dir < 0 {
		return
	}
	f.broken = true
	switch err := thawFS(f.dir); {
	case err == nil:
		klog.InfoS("Thawed a file system that was frozen for too long", "key", f.key)
	case !errors.Is(err, errNotFrozen):
		klog.ErrorS(err, "Cannot thaw a file system that was frozen for too long", "key", f.key)
	}
	f.timer.Reset(rethaw)
}

// thaw ends the freeze. errNotFrozen says that the freeze was broken before.
func (f *freeze) thaw() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.dir < 0 {
		return errNotFrozen
	}
	err := thawFS(f.dir)
	if err != nil && !errors.Is(err, errNotFrozen) {
		return err // the timer tries again
	}
	f.closeLocked()
	if f.broken {
		return errNotFrozen
	}
	return err
}

// thawForGood thaws for somebody who went away, however often it takes.
func (f *freeze) thawForGood() {
	for {
		err := f.thaw()
		if err == nil {
			klog.InfoS("Thawed a file system whose client went away", "key", f.key)
		}
		if err == nil || errors.Is(err, errNotFrozen) {
			return
		}
		klog.ErrorS(err, "Cannot thaw a file system whose client went away", "key", f.key)
		time.Sleep(rethaw)
	}
}

// closeLocked stops the watchdog; mu must be held.
func (f *freeze) closeLocked() {
	f.timer.Stop()
	unix.Close(f.dir)
	f.dir = -1
}

// errNotFrozen is the answer to thawing what is not frozen.
var errNotFrozen = errors.New("file system is not frozen")

func thawFS(dir int) error {
	err := unix.IoctlSetInt(dir, ioctlThaw, 0)
	if errors.Is(err, unix.EINVAL) {
		return errNotFrozen
	}
	if err != nil {
		return fmt.Errorf("FITHAW: %w", err)
	}
	return nil
}
