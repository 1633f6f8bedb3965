package dmuser

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
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

// TestMain lets the test binary be a server of its own that can be killed. Its
// arguments are the keeper's socket and, for a mock behind CUSE, the name and size of
// its device.
func TestMain(m *testing.M) {
	devicetest.ServerMain(func(ctx context.Context, args []string) (transport.Transport, error) {
		k, err := keeper.Dial(ctx, args[0])
		if err != nil {
			return nil, err
		}
		tr := New(k)
		if len(args) > 1 {
			size, err := strconv.ParseInt(args[2], 10, 64)
			if err != nil {
				return nil, err
			}
			tr.mapping = cuse{args[1], size}
		}
		return tr, nil
	})
	os.Exit(m.Run())
}

// startKeeper runs a keeper in this process.
func startKeeper(t testing.TB) (socket string) {
	t.Helper()
	socket = filepath.Join(t.TempDir(), "keeper.sock")
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- keeper.Serve(ctx, socket, nil) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	return socket
}

// cuse is the mapping of a mock that another process serves by CUSE. There is no
// block device.
type cuse struct {
	name string
	size int64
}

func (cuse) make(string, int64, bool) error { return nil }

func (cuse) activate(string) (string, error) { return "/none", nil }

func (c cuse) find(string) (string, int64, error) { return "/none", c.size, nil }

func (cuse) list() ([]string, error) { return nil, nil }

func (c cuse) open(string) (control, error) {
	fd, err := unix.Open("/dev/dm-user/"+c.name, unix.O_RDWR|unix.O_CLOEXEC, 0)
	return node(fd), err
}

func (cuse) remove(string) (bool, error) { return false, nil }

func (cuse) destroy(string) error { return nil }

// TestCuseKill kills the daemon of a mock that enforces the protocol behind a real
// character device, under guests that verify what they read.
func TestCuseKill(t *testing.T) {
	if os.Getenv("SNAPMERGE_VM_GUEST") == "" {
		t.Skip("makes CUSE devices, as root; `make test-vm` runs it in a virtual machine (SNAPMERGE_VM_GUEST=1 runs it here)")
	}
	const guests, part = 12, 1 << 20
	seed, rng := devicetest.Seeded(t)
	target := dmusermock.New()
	server, err := dmusermock.Serve("dm-user/kill", target)
	if err != nil {
		t.Fatal(err)
	}
	defer server.Stop()
	for end := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) { // devtmpfs makes the node
		if _, err := os.Stat("/dev/dm-user/kill"); err == nil {
			break
		}
		if time.Now().After(end) {
			t.Fatal("no control node appears")
		}
	}
	s := devicetest.StartServer(t, devicetest.Image(t, guests*part), startKeeper(t), "kill", fmt.Sprint(guests*part))
	s.Line("ready")
	var wg sync.WaitGroup
	var ops, longest atomic.Int64
	stop := make(chan struct{})
	for w := range guests {
		g := &dmusermock.Guest{Target: target, Base: int64(w) * part, Blocks: part / 4096, Most: 16, Rng: rand.New(rand.NewPCG(seed, uint64(w)))}
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				took, ok := g.Step(t)
				if !ok {
					return
				}
				ops.Add(1)
				longest.Store(max(longest.Load(), int64(took)))
			}
		})
	}
	n := 2 * devicetest.Kills(t)
	for range n {
		time.Sleep(time.Duration(rng.IntN(500)) * time.Millisecond) // some load
		s.Restart()
		if t.Failed() {
			break
		}
	}
	close(stop)
	wg.Wait()
	twice := 0
	for _, note := range target.Notes() {
		twice++
		if t.Failed() || testing.Verbose() {
			t.Log(note)
		}
	}
	t.Logf("%d kills, %d requests, 0 errors, %d of them answered twice; longest %v", n, ops.Load(), twice, time.Duration(longest.Load()))
	if twice > n*channels {
		t.Errorf("%d breaches of the protocol", twice)
	}
	target.Destroy()
	s.Finish()
}
