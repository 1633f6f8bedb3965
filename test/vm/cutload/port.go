package main

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// port is the serial port to the test.
type port struct{ f *os.File }

// say sends a line. When it returns the line has left the machine, whose kernel may
// crash then: what waits in its buffers is lost with it.
func (p *port) say(format string, args ...any) error {
	if _, err := fmt.Fprintf(p.f, format+"\n", args...); err != nil {
		return err
	}
	for {
		err := unix.IoctlSetInt(int(p.f.Fd()), unix.TCSBRK, 1) // tcdrain(3)
		if err != unix.EINTR {                                 // by a signal of Go's scheduler
			return os.NewSyscallError("TCSBRK", err)
		}
	}
}
