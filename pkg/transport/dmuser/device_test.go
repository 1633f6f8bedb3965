package dmuser

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/snapmerge/snapmerge/pkg/keeper"
	"github.com/snapmerge/snapmerge/pkg/transport"
	"github.com/snapmerge/snapmerge/test/devicetest"
	"github.com/snapmerge/snapmerge/test/dmusermock"
)

// TestLoad has more guests than channels, with whole reads of the control node
// and with short ones.
func TestLoad(t *testing.T) {
	for _, maxRead := range []int{0, 7, 1000} {
		t.Run(fmt.Sprint("reads of ", maxRead), func(t *testing.T) {
			seed, _ := devicetest.Seeded(t)
			mem := devicetest.NewMemory(16 << 20)
			m := newMock()
			m.maxRead = maxRead
			_, target := create(t, m, mem, transport.Options{})
			var wg sync.WaitGroup
			for w := range 16 {
				g := &dmusermock.Guest{Target: target, Base: int64(w) << 20, Blocks: 256, Most: 16, Rng: rand.New(rand.NewPCG(seed, uint64(w)))}
				wg.Go(func() {
					for range 100 {
						if _, ok := g.Step(t); !ok {
							return
						}
					}
				})
			}
			wg.Wait()
			if target.Warnings() > 0 || mem.Flushes.Load() == 0 {
				t.Errorf("%d warnings, %d flushes", target.Warnings(), mem.Flushes.Load())
			}
		})
	}
}

// TestLargeRequests: there is no limit, and memory does not grow with them.
func TestLargeRequests(t *testing.T) {
	_, rng := devicetest.Seeded(t)
	for _, size := range []int{sectorSize, chunk, chunk + sectorSize, 3*chunk - 4096, maxStaged, maxStaged + 4096, maxStaged + 3*chunk} {
		mem := devicetest.NewMemory(maxStaged + 4*chunk)
		_, target := create(t, newMock(), mem, transport.Options{})
		data := make([]byte, size)
		for i := 0; i < size; i += 8 {
			native.PutUint64(data[i:], rng.Uint64())
		}
		if err := answered(t, target.Submit(dmusermock.Write, 0, chunk/2, data)); err != nil {
			t.Errorf("write of %d bytes: %v", size, err)
		}
		if !bytes.Equal(mem.Content()[chunk/2:chunk/2+size], data) {
			t.Errorf("write of %d bytes went wrong", size)
		}
		got := make([]byte, size)
		if err := answered(t, target.Submit(dmusermock.Read, 0, chunk/2, got)); err != nil || !bytes.Equal(got, data) {
			t.Errorf("read of %d bytes wrong, or %v", size, err)
		}
	}
}

// TestErrors: a request that fails is answered, and the next one is served.
func TestErrors(t *testing.T) {
	const size = 4 << 20
	mem := devicetest.NewMemory(size)
	_, target := create(t, newMock(), mem, transport.Options{})
	big := make([]byte, 3*chunk)
	for _, tt := range []struct {
		name  string
		fail  error
		typ   uint64
		flags uint64
		off   int64
		data  []byte
	}{
		{"read", unix.EIO, dmusermock.Read, 0, 0, big[:4096]},
		{"large read", unix.ENOSPC, dmusermock.Read, 0, 0, big},
		{"write", errors.New("no errno"), dmusermock.Write, 0, 0, big[:4096]},
		{"large write", unix.ENOSPC, dmusermock.Write, dmusermock.FUA, 0, big},
		{"flush", unix.EIO, dmusermock.Write, dmusermock.Preflush, 0, nil},
		{"real flush", unix.EIO, dmusermock.Flush, 0, 0, nil},
		{"write beyond the end", nil, dmusermock.Write, 0, size - 4096, big},
		{"read beyond the end", nil, dmusermock.Read, 0, size, big[:4096]},
		{"read far beyond the end", nil, dmusermock.Read, 0, 1 << 62, big[:4096]},
		{"write far beyond the end", nil, dmusermock.Write, 0, 1<<62 - 4096, big[:4096]},
		{"discard", nil, 3, 0, 0, nil},
		{"unknown", nil, 12, 0, 0, nil},
	} {
		mem.FailWith(tt.fail)
		if err := answered(t, target.Submit(tt.typ, tt.flags, tt.off, tt.data)); err == nil {
			t.Errorf("%s succeeds", tt.name)
		}
		mem.FailWith(nil)
		for range channels {
			if err := answered(t, target.Submit(dmusermock.Read, 0, 0, make([]byte, 512))); err != nil {
				t.Fatalf("after %s: %v", tt.name, err)
			}
		}
	}
	// FUA and PREFLUSH flush.
	for _, flags := range []uint64{dmusermock.FUA, dmusermock.Preflush} {
		flushes := mem.Flushes.Load()
		if err := answered(t, target.Submit(dmusermock.Write, flags, 0, big[:512])); err != nil || mem.Flushes.Load() != flushes+1 {
			t.Errorf("flags %#x: %v, %d flushes", flags, err, mem.Flushes.Load()-flushes)
		}
	}
}

// failing is a backend whose reads fail after so many.
type failing struct {
	*devicetest.Memory
	left atomic.Int64
}

func (f *failing) ReadAt(p []byte, off int64) (int, error) {
	if f.left.Add(-1) < 0 {
		return 0, unix.EIO
	}
	return f.Memory.ReadAt(p, off)
}

// TestUnsayable: a read that fails when its answer has begun fails all the same,
// and the channel goes on.
func TestUnsayable(t *testing.T) {
	b := &failing{Memory: devicetest.NewMemory(maxStaged + 4*chunk)}
	_, target := create(t, newMock(), b, transport.Options{})
	const pieces = maxStaged/chunk + 1
	for _, good := range []int64{pieces - 1, pieces, pieces + 5} { // first pass, first piece, later
		b.left.Store(good)
		if err := answered(t, target.Submit(dmusermock.Read, 0, 0, make([]byte, pieces*chunk))); err == nil {
			t.Errorf("succeeds with %d good reads", good)
		}
		b.left.Store(1 << 30)
		for range channels {
			if err := answered(t, target.Submit(dmusermock.Read, 0, 0, make([]byte, 512))); err != nil {
				t.Fatal(err)
			}
		}
	}
}

func TestReadOnly(t *testing.T) {
	mem := devicetest.NewMemory(1 << 20)
	_, target := create(t, newMock(), mem, transport.Options{ReadOnly: true})
	if err := answered(t, target.Submit(dmusermock.Write, 0, 0, make([]byte, 4096))); err == nil || mem.Writes.Load() != 0 {
		t.Errorf("write: %v, %d writes", err, mem.Writes.Load())
	}
	if err := answered(t, target.Submit(dmusermock.Read, 0, 0, make([]byte, 4096))); err != nil {
		t.Error(err)
	}
}

func TestCloseBusy(t *testing.T) {
	mem := devicetest.NewMemory(1 << 20)
	m := newMock()
	d, target := create(t, m, mem, transport.Options{})
	m.setBusy(true)
	over, cancel := context.WithCancel(t.Context())
	cancel()
	err := d.Close(over)
	for end := time.Now().Add(patience); errors.Is(err, context.Canceled) && time.Now().Before(end); {
		err = d.Close(over) // so slow a machine that it did not come to a try
	}
	if !errors.Is(err, transport.ErrBusy) {
		t.Errorf("close of a busy device: %v", err)
	}
	if err := answered(t, target.Submit(dmusermock.Read, 0, 0, make([]byte, 4096))); err != nil {
		t.Errorf("it does not serve any more: %v", err)
	}
	m.setBusy(false)
	for range 2 {
		if err := d.Close(within(t, patience)); err != nil {
			t.Error(err)
		}
	}
	if mem.Flushes.Load() == 0 {
		t.Error("close did not flush the backend")
	}
}

// TestAbortHung: what waits for a backend that does not return gets EIO, and the
// volume can have a new device.
func TestAbortHung(t *testing.T) {
	mem := devicetest.NewMemory(1 << 20)
	d, target := create(t, newMock(), mem, transport.Options{})
	release := mem.Hang()
	defer release()
	var done []<-chan error
	for i := range 3 {
		done = append(done, target.Submit(dmusermock.Write, 0, int64(i)*4096, make([]byte, 4096)))
	}
	for end := time.Now().Add(patience); mem.Writes.Load() < 3; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("the writes do not arrive")
		}
	}
	if err := d.Abort(); err != nil {
		t.Error(err)
	}
	for _, c := range done {
		if err := answered(t, c); err == nil {
			t.Error("a write of an aborted device succeeds")
		}
	}
	select {
	case <-d.Failed():
		t.Error("an aborted device has failed")
	default:
	}
	again, err := d.t.Create(within(t, patience), "v", devicetest.NewMemory(4096), transport.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := again.Close(within(t, patience)); err != nil {
		t.Error(err)
	}
	release()
	<-d.threadsDone
}

// TestDestroyedByOthers swaps the table behind the transport's back.
func TestDestroyedByOthers(t *testing.T) {
	m := newMock()
	d, _ := create(t, m, devicetest.NewMemory(1<<20), transport.Options{})
	if err := m.destroy(d.meta.Name); err != nil {
		t.Fatal(err)
	}
	select {
	case <-d.Failed():
	case <-time.After(patience):
		t.Error("nobody has noticed")
	}
	if err := d.Abort(); err != nil {
		t.Error(err)
	}
}

func TestCreateRefuses(t *testing.T) {
	m := newMock()
	d, _ := create(t, m, devicetest.NewMemory(1<<20), transport.Options{})
	for name, tt := range map[string]struct {
		volume string
		size   int64
		want   string
	}{
		"no size":      {"b", 0, "not a multiple"},
		"half a block": {"b", 4096 + 512, "not a multiple"},
		"no id":        {"", 4096, "empty volume id"},
		"twice":        {"v", 4096, "already"},
	} {
		if _, err := d.t.Create(t.Context(), tt.volume, devicetest.NewMemory(tt.size), transport.Options{}); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := d.t.Adopt(t.Context(), "b", devicetest.NewMemory(4096)); !errors.Is(err, transport.ErrNotFound) {
		t.Errorf("adopt without a keeper: %v", err)
	}
	if err := d.Resize(); err != nil {
		t.Errorf("resize to the same size: %v", err)
	}
	d.size -= 4096
	if err := d.Resize(); !errors.Is(err, transport.ErrNoResize) {
		t.Errorf("resize: %v", err)
	}
}

// TestDiscard: half-made and dead devices of a volume go before a new one comes,
// those of others stay.
func TestDiscard(t *testing.T) {
	m := newMock()
	tr := New(nil)
	tr.mapping = m
	for _, name := range []string{tr.prefix("v") + "old", tr.prefix("w") + "old", "snapmerge-other"} {
		if err := m.make(name, 4096, false); err != nil {
			t.Fatal(err)
		}
	}
	create(t, m, devicetest.NewMemory(4096), transport.Options{})
	if names, _ := m.list(); len(names) != 3 {
		t.Errorf("there are %v", names)
	}
	if err := tr.Discard([]string{"w"}); err != nil {
		t.Error(err)
	}
	if names, _ := m.list(); len(names) != 2 {
		t.Errorf("there are %v", names)
	}
}

// lateMock has the time of a Create end just before the keeper is given the device.
type lateMock struct {
	*mock
	end func()
}

func (m lateMock) open(name string) (control, error) {
	c, err := m.mock.open(name)
	if err != nil {
		return nil, err
	}
	m.end()
	fd, err := unix.Open("/dev/null", unix.O_RDWR|unix.O_CLOEXEC, 0)
	return heldNode{c, fd}, err
}

// heldNode is a control node that can be given to a keeper.
type heldNode struct {
	control
	fd int
}

func (n heldNode) Fd() int { return n.fd }

func (n heldNode) Close() error { return errors.Join(n.control.Close(), unix.Close(n.fd)) }

// TestCreateTooLate: a keeper that has taken a device which Create could not wait for
// has it taken back, for the next Create.
func TestCreateTooLate(t *testing.T) {
	k, err := keeper.Dial(within(t, patience), startKeeper(t))
	if err != nil {
		t.Fatal(err)
	}
	defer k.Close()
	tr := New(k)
	for range 50 { // the keeper takes it now and then
		ctx, cancel := context.WithCancel(t.Context())
		tr.mapping = lateMock{newMock(), cancel}
		d, err := tr.Create(ctx, "v", devicetest.NewMemory(1<<20), transport.Options{})
		if err == nil {
			err = d.Close(within(t, patience))
		} else if errors.Is(err, context.Canceled) {
			err = nil
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}
