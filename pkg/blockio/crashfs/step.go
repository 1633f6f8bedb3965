package crashfs

import (
	"fmt"
	"io/fs"
)

// Op is the kind of a mutating step.
type Op string

// The steps. Off and Len of a Step are in bytes.
const (
	OpWrite       Op = "write"        // Off, Len
	OpTruncate    Op = "truncate"     // Off is the new length
	OpZero        Op = "zero"         // Off, Len
	OpAllocate    Op = "allocate"     // Off, Len
	OpSetXattr    Op = "set xattr"    // Other is the attribute
	OpRemoveXattr Op = "remove xattr" // Other is the attribute
	OpFlush       Op = "flush"
	OpCreate      Op = "create"
	OpMkdir       Op = "mkdir"
	OpRename      Op = "rename" // Other is the new name
	OpLink        Op = "link"   // Other is the new name
	OpRemove      Op = "remove"
	OpSyncDir     Op = "sync dir"
)

// Step is one change of the file system, or one flush.
type Step struct {
	N        int64 // 1 for the first step; clones and crash images count on
	Op       Op
	Name     string // cleaned path; of a file, the one it was opened by
	Other    string
	Off, Len int64
}

func (s Step) String() string {
	switch s.Op {
	case OpWrite, OpZero, OpAllocate:
		return fmt.Sprintf("%s %s %d+%d", s.Op, s.Name, s.Off, s.Len)
	case OpTruncate:
		return fmt.Sprintf("%s %s %d", s.Op, s.Name, s.Off)
	case OpSetXattr, OpRemoveXattr, OpRename, OpLink:
		return fmt.Sprintf("%s %s %s", s.Op, s.Name, s.Other)
	}
	return fmt.Sprintf("%s %s", s.Op, s.Name)
}

// OnStep sets a function that is called before every mutating step, from the
// goroutine that does it. Calls that could not succeed anyway are no steps. If
// the function returns an error, the step does not happen and the call fails
// with it (wrapped in an fs.PathError); so a hook that fails from step k on is
// a power cut before step k, and the states after the last step are those of
// the file system at the end. The hook may use the file system, to make crash
// images above all. nil removes it.
func (fsys *FS) OnStep(hook func(Step) error) {
	fsys.mu.Lock()
	defer fsys.mu.Unlock()
	fsys.hook = hook
}

// Steps is the number of steps so far: those that the hook refused, and those
// before the crash, included.
func (fsys *FS) Steps() int64 {
	fsys.mu.Lock()
	defer fsys.mu.Unlock()
	return fsys.steps
}

// do performs one step: check says whether it can be done, apply does it, given the
// step with its number. Both run with mu held and check must not change anything, because it runs again
// after the hook: other goroutines may have come in between.
func (fsys *FS) do(s Step, check func() error, apply func(Step)) error {
	fsys.mu.Lock()
	defer fsys.mu.Unlock()
	if err := check(); err != nil {
		return pathError(s, err)
	}
	fsys.steps++
	s.N = fsys.steps
	if hook := fsys.hook; hook != nil {
		if err := fsys.unlocked(func() error { return hook(s) }); err != nil {
			return pathError(s, err)
		}
		if err := check(); err != nil {
			return pathError(s, err)
		}
	}
	apply(s)
	return nil
}

// unlocked runs f without mu, and has it again even if f panics.
func (fsys *FS) unlocked(f func() error) error {
	fsys.mu.Unlock()
	defer fsys.mu.Lock()
	return f()
}

func pathError(s Step, err error) error {
	return &fs.PathError{Op: string(s.Op), Path: s.Name, Err: err}
}
