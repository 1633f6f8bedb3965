package fuseloop

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/snapmerge/snapmerge/pkg/keeper"
)

// taskName is our task's in the keeper.
const taskName = "fuseloop"

// Tasks is what a keeper must be able to do for this transport, for
// keeper.Serve.
func Tasks() map[string]keeper.Task {
	return map[string]keeper.Task{taskName: runTask}
}

// step is something done to a loop device that may wait for the device's
// server, so that the server must not do it itself if it can be helped.
type step struct {
	Do   string `json:"do"` // one of the constants below
	Loop int    `json:"loop"`
	Tag  string `json:"tag"`

	Name     string `json:"name,omitempty"`     // of the file in the mount; attach, resize
	ReadOnly bool   `json:"readOnly,omitempty"` // attach
	Size     int64  `json:"size,omitempty"`     // in bytes; resize
	Last     bool   `json:"last,omitempty"`     // detach: the last try
}

const (
	doAttach = "attach" // with the mount; result busy: the loop device is not free
	doCheck  = "check"
	doResize = "resize" // with the mount
	doDetach = "detach" // result busy: it is in use
)

// outcome is the result of a step.
type outcome struct {
	Busy    bool   `json:"busy,omitempty"`
	NotOurs bool   `json:"notOurs,omitempty"` // the error is errNotOurs
	Error   string `json:"error,omitempty"`
}

// do carries out the step in this process. mount may be -1 if the step needs
// none.
func (s *step) do(mount int) (busy bool, err error) {
	l := loopDev{s.Loop, s.Tag}
	switch s.Do {
	case doAttach:
		return l.attach(mount, s.Name, s.ReadOnly)
	case doCheck:
		return false, l.check()
	case doResize:
		return false, l.resize(mount, s.Name, s.Size)
	case doDetach:
		return l.tryDetach(s.Last)
	default:
		return false, fmt.Errorf("no such step: %q", s.Do)
	}
}

// runTask is do in the keeper.
func runTask(args json.RawMessage, fds []int) (any, error) {
	var s step
	if err := json.Unmarshal(args, &s); err != nil {
		return nil, err
	}
	mount := -1
	if len(fds) > 0 {
		mount = fds[0]
	}
	busy, err := s.do(mount)
	o := outcome{Busy: busy, NotOurs: errors.Is(err, errNotOurs)}
	if err != nil {
		o.Error = err.Error()
	}
	return o, nil
}

// run carries out the step, in the keeper if there is one. mount may be -1.
func (t *Transport) run(ctx context.Context, s step, mount int) (busy bool, err error) {
	if t.keeper == nil {
		return s.do(mount)
	}
	var fds []int
	if mount >= 0 {
		fds = append(fds, mount)
	}
	var o outcome
	if err := t.keeper.Run(ctx, taskName, s, &o, fds...); err != nil {
		return false, err
	}
	switch {
	case o.NotOurs:
		err = errNotOurs
	case o.Error != "":
		err = errors.New(o.Error)
	}
	return o.Busy, err
}
