package blockio

import (
	"fmt"
	"os"
	"strings"
	"sync"

	"github.com/snapmerge/snapmerge/pkg/uring"
)

// ProbeURing says why io_uring cannot be used by this process, or nil. It looks
// once, by making a ring, asking for the opcodes that queues use and passing an
// entry through.
func ProbeURing() error { return probeURing() }

var probeURing = sync.OnceValue(func() error {
	err := tryURing()
	if err == nil {
		return nil
	}
	const setting = "/proc/sys/kernel/io_uring_disabled" // kernel 6.6
	if value, readErr := os.ReadFile(setting); readErr == nil {
		return fmt.Errorf("%w (kernel.io_uring_disabled is %s)", err, strings.TrimSpace(string(value)))
	}
	return err
})

func tryURing() error {
	r, err := uring.New(1, 0)
	if err != nil {
		return err
	}
	defer r.Close()
	p, err := r.Probe()
	if err != nil {
		return err
	}
	for _, op := range []uint8{uring.OpRead, uring.OpWrite, uring.OpReadv, uring.OpWritev} {
		if !p.Supports(op) {
			return fmt.Errorf("io_uring: the kernel lacks opcode %d", op)
		}
	}
	r.SQE().Nop()
	for {
		if c, ok := r.CQE(); ok {
			if c.Res != 0 {
				return fmt.Errorf("io_uring: an entry that does nothing gives %d", c.Res)
			}
			return nil
		}
		if _, err := r.Submit(1); err != nil && !uring.TryAgain(err) {
			return os.NewSyscallError("io_uring_enter", err)
		}
	}
}
