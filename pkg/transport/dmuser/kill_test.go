package dmuser

import (
	"bytes"
	"errors"
	"fmt"
	"runtime"
	"sync"
	"testing"

	"github.com/snapmerge/snapmerge/pkg/transport"
	"github.com/snapmerge/snapmerge/test/devicetest"
	"github.com/snapmerge/snapmerge/test/dmusermock"
)

// reaper ends a channel's thread, as SIGKILL does, at the step that is chosen:
// before or after a system call or a call of the backend.
type reaper struct {
	left int // steps to go; negative: never
	*dmusermock.Channel
	*devicetest.Memory
}

func (r *reaper) step() {
	if r.left == 0 {
		runtime.Goexit()
	}
	r.left--
}

// reapedNode and reapedBackend are what is at hand of a channel that is reaped.
type (
	reapedNode    struct{ *reaper }
	reapedBackend struct{ *reaper }
)

func (r reapedNode) Read(p []byte) (int, error) {
	r.step()
	n, err := r.Channel.Read(p)
	r.step()
	return n, err
}

func (r reapedNode) Write(p []byte) (int, error) {
	r.step()
	n, err := r.Channel.Write(p)
	r.step()
	return n, err
}

func (r reapedBackend) ReadAt(p []byte, off int64) (int, error) {
	r.step()
	n, err := r.Memory.ReadAt(p, off)
	r.step()
	return n, err
}

func (r reapedBackend) WriteAt(p []byte, off int64) (int, error) {
	r.step()
	n, err := r.Memory.WriteAt(p, off)
	r.step()
	return n, err
}

func (r reapedBackend) Flush() error {
	r.step()
	err := r.Memory.Flush()
	r.step()
	return err
}

// TestKilledAtEachStep kills a channel at each step of each kind of request. The
// next one must end it, without an error unless the request is one whose answer
// cannot be continued.
func TestKilledAtEachStep(t *testing.T) {
	for _, tt := range []struct {
		name  string
		typ   uint64
		flags uint64
		size  int
		torn  bool // may fail
	}{
		{"read", dmusermock.Read, 0, 8192, false},
		{"large read", dmusermock.Read, 0, 3*chunk - 512, false},
		{"huge read", dmusermock.Read, 0, 4*chunk + 512, true},
		{"write", dmusermock.Write, 0, 8192, false},
		{"least write", dmusermock.Write, 0, 512, false},
		{"large write", dmusermock.Write, dmusermock.FUA | dmusermock.Preflush, 3*chunk - 512, false},
		{"flush", dmusermock.Write, dmusermock.Preflush, 0, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			failures := 0
			for step := 0; ; step++ {
				died, failed := killedAt(t, step, tt.typ, tt.flags, tt.size)
				if failed {
					failures++
				}
				if t.Failed() || !died {
					t.Logf("%d steps, %d of them leave a request that fails", step, failures)
					break
				}
			}
			if (failures > 0) != tt.torn {
				t.Errorf("%d requests failed", failures)
			}
		})
	}
}

// killedAt has the first channel die at a step of the request, and another one
// go on. died is false if the request has not so many steps.
func killedAt(t *testing.T, step int, typ, flags uint64, size int) (died, failed bool) {
	const base = 4096
	target := dmusermock.New()
	mem := devicetest.NewMemory(5 * chunk)
	data, want := make([]byte, size), make([]byte, size)
	for i := range want {
		want[i] = byte(i>>9 + i*7 + 1)
	}
	if typ == dmusermock.Write {
		copy(data, want)
	} else if _, err := mem.WriteAt(want, base); err != nil {
		t.Fatal(err)
	}
	a, err := newArena(1)
	if err != nil {
		t.Fatal(err)
	}
	ctl, err := target.Open()
	if err != nil {
		t.Fatal(err)
	}
	r := &reaper{left: step, Channel: ctl, Memory: mem}
	first := &channel{backend: reapedBackend{r}, slot: a.slot(0), staged: 3 * chunk, ctl: reapedNode{r}}
	done := target.Submit(typ, flags, base, data)
	var wg sync.WaitGroup
	ended := false
	wg.Go(func() {
		if err := errors.Join(first.take(), first.carryOut()); err != nil {
			t.Errorf("step %d: %v", step, err)
		}
		ended = true
	})
	wg.Wait()
	var renewed []control
	second := &channel{backend: mem, slot: a.slot(0), staged: 3 * chunk, ctl: ctl}
	wg.Go(func() {
		err := second.run(func(c *channel) error {
			ctl, err := target.Open()
			if err != nil {
				return err
			}
			old, err := c.replace(ctl)
			renewed = append(renewed, ctl)
			return errors.Join(err, old.Close())
		})
		if err != nil {
			t.Errorf("step %d: %v", step, err)
		}
	})
	err = answered(t, done)
	if err == nil && typ == dmusermock.Read && !bytes.Equal(data, want) {
		t.Errorf("step %d: read wrong data", step)
	}
	if err == nil && typ == dmusermock.Write && !bytes.Equal(mem.Content()[base:base+size], want) {
		t.Errorf("step %d: wrote wrong data", step)
	}
	// The channel must be of use afterwards.
	check := make([]byte, 512)
	if err := answered(t, target.Submit(dmusermock.Read, 0, base, check)); err != nil || !bytes.Equal(check, mem.Content()[base:base+512]) {
		t.Errorf("step %d: the next request: %v", step, err)
	}
	target.Destroy()
	wg.Wait()
	second.close()
	a.close()
	// The second answer to a request is the only breach allowed, on a channel that is
	// given up at once.
	if n := len(target.Notes()); n > 1 || n == 1 && len(renewed) != 1 || target.Channels() != 0 {
		t.Errorf("step %d: %d channels open, %d renewed; %v", step, target.Channels(), len(renewed), target.Notes())
	}
	return !ended, err != nil
}

// TestFailedWriteStaysFailed: if a part of a write has failed before the kill, the
// rest does not make it a success.
func TestFailedWriteStaysFailed(t *testing.T) {
	for step := 0; ; step++ {
		target := dmusermock.New()
		mem := devicetest.NewMemory(4 * chunk)
		a, err := newArena(1)
		if err != nil {
			t.Fatal(err)
		}
		ctl, err := target.Open()
		if err != nil {
			t.Fatal(err)
		}
		mem.FailWith(fmt.Errorf("full"))
		r := &reaper{left: step, Channel: ctl, Memory: mem}
		first := &channel{backend: reapedBackend{r}, slot: a.slot(0), staged: 3 * chunk, ctl: reapedNode{r}}
		done := target.Submit(dmusermock.Write, 0, 0, make([]byte, 2*chunk))
		var wg sync.WaitGroup
		ended := false
		wg.Go(func() {
			_ = errors.Join(first.take(), first.carryOut())
			ended = true
		})
		wg.Wait()
		mem.FailWith(nil)
		written := mem.Writes.Load() > 0 && first.slot.get(offDone) > 0
		second := &channel{backend: mem, slot: a.slot(0), staged: 3 * chunk, ctl: ctl}
		wg.Go(func() {
			_ = second.run(func(c *channel) error {
				ctl, err := target.Open()
				if err != nil {
					return err
				}
				old, err := c.replace(ctl)
				return errors.Join(err, old.Close())
			})
		})
		if err := answered(t, done); written && err == nil {
			t.Errorf("step %d: half a write is a success", step)
		}
		target.Destroy()
		wg.Wait()
		second.close()
		a.close()
		if ended {
			break
		}
	}
}

// TestOnePossessor: the memory of the channels belongs to one process.
func TestOnePossessor(t *testing.T) {
	a, err := newArena(2)
	if err != nil {
		t.Fatal(err)
	}
	defer a.close()
	if _, err := openArena(a.fd, 2); !errors.Is(err, errServed) {
		t.Errorf("opened twice: %v", err)
	}
}

var _ transport.Backend = reapedBackend{}
