package crashfs

import (
	"io/fs"
	"slices"
	"syscall"

	"github.com/snapmerge/snapmerge/pkg/blockio"
)

// file is a handle.
type file struct {
	fsys     *FS
	node     *node
	name     string
	readOnly bool
	closed   bool  // fsys.mu must be held
	failed   error // what a flush failed with; fsys.mu must be held
}

var (
	_ blockio.File   = (*file)(nil)
	_ blockio.Cloner = (*file)(nil)
)

// step does a mutating step of the file's node.
func (f *file) step(s Step, check func() error, apply func(Step)) error {
	s.Name = f.name
	return f.fsys.do(s, func() error {
		switch {
		case f.closed:
			return fs.ErrClosed
		case f.readOnly && s.Op != OpFlush:
			return syscall.EBADF
		case s.Off < 0 || s.Len < 0:
			return syscall.EINVAL
		case check != nil:
			return check()
		}
		return nil
	}, apply)
}

// effect makes e live and remembers it as unsynced; fsys.mu must be held.
func (f *file) effect(e *effect) {
	f.fsys.seq++
	e.seq, e.node = f.fsys.seq, f.node.id
	e.apply(&f.node.live)
	f.node.effects = append(f.node.effects, e)
}

// view runs a reading function with the node locked.
func (f *file) view(op Op, do func(c *content) error) error {
	f.fsys.mu.Lock()
	defer f.fsys.mu.Unlock()
	if f.closed {
		return pathError(Step{Op: op, Name: f.name}, fs.ErrClosed)
	}
	return do(&f.node.live)
}

func (f *file) Name() string { return f.name }

func (f *file) ReadAt(p []byte, off int64) (n int, err error) {
	err = f.view("read", func(c *content) (err error) {
		if off < 0 {
			return pathError(Step{Op: "read", Name: f.name}, syscall.EINVAL)
		}
		n, err = c.readAt(p, off)
		return err
	})
	return n, err
}

func (f *file) WriteAt(p []byte, off int64) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	s := Step{Op: OpWrite, Off: off, Len: int64(len(p))}
	var n int64
	err := f.step(s, nil, func(s Step) {
		n = f.fsys.room(f.node, s.Off, s.Len)
		if n > 0 {
			s.Len = n
			f.effect(&effect{step: s, data: slices.Clone(p[:n])})
		}
	})
	if err == nil && n < int64(len(p)) {
		s.Name = f.name
		err = pathError(s, syscall.ENOSPC)
	}
	return int(n), err
}

// Clone leaves after a crash what a write of the same bytes would: any part.
func (f *file) Clone(to, from, n int64) error {
	s := Step{Op: OpWrite, Off: to, Len: n}
	return f.step(s, func() error {
		if n <= 0 || from < 0 || (to|from|n)%blockio.BlockSize != 0 || max(to, from) < min(to, from)+n || max(to, from)+n > f.node.live.size {
			return syscall.EINVAL
		}
		return nil
	}, func(s Step) {
		data := make([]byte, n)
		_, _ = f.node.live.readAt(data, from) // all of it is there
		f.effect(&effect{step: s, data: data})
	})
}

func (f *file) Truncate(size int64) error {
	s := Step{Op: OpTruncate, Off: size}
	return f.step(s, nil, func(s Step) { f.effect(&effect{step: s}) })
}

func (f *file) Zero(off, n int64) error {
	s := Step{Op: OpZero, Off: off, Len: n}
	return f.step(s, func() error {
		if (off|n)%blockio.SectorSize != 0 {
			return syscall.EINVAL
		}
		return nil
	}, func(s Step) {
		if n > 0 {
			f.effect(&effect{step: s})
		}
	})
}

func (f *file) Allocate(off, n int64) error {
	s := Step{Op: OpAllocate, Off: off, Len: n}
	var fits int64
	err := f.step(s, func() error {
		if n <= 0 {
			return syscall.EINVAL
		}
		return nil
	}, func(s Step) {
		fits = f.fsys.room(f.node, off, n)
		if fits > 0 {
			s.Len = fits
			f.effect(&effect{step: s})
		}
	})
	if err == nil && fits < n {
		s.Name = f.name
		err = pathError(s, syscall.ENOSPC)
	}
	return err
}

func (f *file) SetXattr(name string, value []byte) error {
	s := Step{Op: OpSetXattr, Other: name}
	value = append([]byte{}, value...)
	return f.step(s, nil, func(s Step) { f.effect(&effect{step: s, value: value}) })
}

func (f *file) RemoveXattr(name string) error {
	s := Step{Op: OpRemoveXattr, Other: name}
	return f.step(s, nil, func(s Step) { f.effect(&effect{step: s}) })
}

func (f *file) Xattr(name string) (value []byte, err error) {
	err = f.view("get xattr", func(c *content) error {
		v, ok := c.xattrs[name]
		if !ok {
			return pathError(Step{Op: "get xattr " + Op(name), Name: f.name}, fs.ErrNotExist)
		}
		value = slices.Clone(v)
		return nil
	})
	return value, err
}

// Flush fails for good once the hook has made it fail, as a real one does.
func (f *file) Flush() error {
	f.fsys.mu.Lock()
	failed := f.failed
	f.fsys.mu.Unlock()
	if failed != nil {
		return failed
	}
	err := f.step(Step{Op: OpFlush}, nil, func(Step) {
		f.node.durable = f.node.live.clone()
		f.node.effects = nil
	})
	if err != nil {
		f.fsys.mu.Lock()
		defer f.fsys.mu.Unlock()
		f.failed = err
	}
	return err
}

// Size of a closed file is 0.
func (f *file) Size() (size int64) {
	_ = f.view("stat", func(c *content) error {
		size = c.size
		return nil
	})
	return size
}

func (f *file) NextData(off int64) (start, end int64, err error) {
	err = f.view("seek data", func(c *content) (err error) {
		if off < 0 {
			return pathError(Step{Op: "seek data", Name: f.name}, syscall.EINVAL)
		}
		start, end, err = c.nextData(off)
		return err
	})
	return start, end, err
}

func (f *file) ID() (id blockio.FileID, err error) {
	err = f.view("stat", func(*content) error {
		id.Inode = uint64(f.node.id)
		return nil
	})
	return id, err
}

func (f *file) Links() (links uint64, err error) {
	err = f.view("stat", func(*content) error {
		links = uint64(f.node.links)
		return nil
	})
	return links, err
}

func (f *file) Lock() error {
	return f.view("lock", func(*content) error {
		if f.node.lock != nil && f.node.lock != f {
			return pathError(Step{Op: "lock", Name: f.name}, blockio.ErrLocked)
		}
		f.node.lock = f
		return nil
	})
}

// Close releases the lock. It makes nothing durable.
func (f *file) Close() error {
	return f.view("close", func(*content) error {
		f.closed = true
		f.node.open--
		if f.node.lock == f {
			f.node.lock = nil
		}
		return nil
	})
}
