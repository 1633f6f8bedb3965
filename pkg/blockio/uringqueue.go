package blockio

import "errors"

// ProbeURing says why io_uring cannot be used, or nil.
func ProbeURing() error { return errors.New("the io_uring queue is not built yet") }

type uringQueue struct {
	syncQueue
}

func newURingQueue(int) (Queue, error) { return nil, ProbeURing() }
