package handover

import (
	"bufio"
	"context"
	"crypto/sha256"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"k8s.io/klog/v2"

	"github.com/snapmerge/snapmerge/pkg/blockio"
	"github.com/snapmerge/snapmerge/pkg/transport"
	"github.com/snapmerge/snapmerge/pkg/transport/nbd"
	"github.com/snapmerge/snapmerge/pkg/volume"
	"github.com/snapmerge/snapmerge/test/devicetest"
)

const (
	volumeSize = 32 << 20
	swaps      = 4
)

// TestMain lets the test binary be a node's volumes, which can be killed: see serve.
func TestMain(m *testing.M) {
	if devicetest.IsServer() {
		if err := serve(os.Args[1], os.Args[2:]); err != nil {
			fmt.Println("error:", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// serve has the volume "v" in a state directory, over NBD, which needs no keeper. It
// prints "ready", the device and the state, and obeys: "native" waits for the
// hand-over, "snapshot NAME" makes one and waits until it is encoded, "close" ends the
// device and the process. With an argument no device is handed over.
func serve(dir string, args []string) error {
	flags := flag.NewFlagSet("", flag.ContinueOnError)
	klog.InitFlags(flags)
	if err := flags.Set("v", "2"); err != nil { // how long each swap took
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), devicetest.Patience)
	defer cancel()
	usable := Available()
	if len(args) > 0 {
		usable = errors.New(args[0])
	} else if usable != nil {
		return usable
	}
	m, err := volume.OpenManager(ctx, volume.ManagerConfig{
		FS: blockio.OS(), StateDir: dir, Init: true, IO: blockio.Auto, Log: klog.Background(),
		Transport: New(nbd.New(filepath.Join(dir, "nbd")), filepath.Join(dir, "native"), usable),
	})
	if err != nil {
		return err
	}
	if len(m.IDs()) == 0 {
		if _, err := m.CreateVolume(ctx, volume.VolumeSpec{ID: "v", Size: volumeSize}); err != nil {
			return err
		}
	}
	dev, err := m.Attach(ctx, "v", transport.Options{})
	if err != nil {
		return err
	}
	fmt.Println("ready", dev)
	for in := bufio.NewScanner(os.Stdin); in.Scan(); {
		var what, name string
		_, _ = fmt.Sscan(in.Text(), &what, &name)
		switch what {
		case "native":
			err = waitNative(m)
		case "snapshot":
			err = snapshot(ctx, m, name)
		case "close":
			if err := errors.Join(m.Detach(ctx, "v"), m.Close()); err != nil {
				return err
			}
			fmt.Println("closed")
			return nil
		}
		if err != nil {
			return err
		}
		fmt.Println(what)
	}
	return io.ErrUnexpectedEOF
}

// snapshot makes one, after that which an earlier process may have begun.
func snapshot(ctx context.Context, m *volume.Manager, id string) error {
	for {
		_, err := m.CreateSnapshot(volume.SnapshotSpec{ID: id, Volume: "v"})
		if !errors.Is(err, volume.ErrCutInFlight) || ctx.Err() != nil {
			_, werr := m.WaitSnapshot(ctx, id)
			return errors.Join(err, werr)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func waitNative(m *volume.Manager) error {
	for end := time.Now().Add(time.Minute); ; time.Sleep(5 * time.Millisecond) {
		st, err := m.Status("v")
		if err != nil {
			return err
		}
		if st.State == volume.Native {
			return nil
		}
		if time.Now().After(end) {
			return fmt.Errorf("not handed over: %+v", st)
		}
	}
}

func needVM(t *testing.T) {
	t.Helper()
	if os.Getenv("SNAPMERGE_VM_GUEST") == "" {
		t.Skip("makes device-mapper, loop and NBD devices, as root; `make test-vm` runs it in a virtual machine (SNAPMERGE_VM_GUEST=1 runs it here)")
	}
}

// ask has the server do something.
func ask(s *devicetest.Server, line string) {
	s.Say(line)
	what, _, _ := strings.Cut(line, " ")
	s.Line(what)
}

// TestSwapUnderLoad hands a volume over and back under a load that verifies what it
// reads, and kills the process while requests go past it, and at any moment.
func TestSwapUnderLoad(t *testing.T) {
	needVM(t)
	seed, rng := devicetest.Seeded(t)
	dir := t.TempDir()
	s := devicetest.StartServer(t, dir)
	dev := s.Line("ready")
	load := func() *devicetest.Load { return devicetest.StartLoad(t, dev, 8, seed) }
	n := 0
	next := func() string { n++; return fmt.Sprint("snapshot s", n) }

	ops, longest := withoutSwaps(t, seed)
	t.Logf("no swaps, %d snapshots: %d requests, 0 errors; longest stall of a request %v", swaps, ops, longest)
	l := load()
	ask(s, "native")
	for range swaps {
		ask(s, next())
		ask(s, "native")
	}
	ops, longest = l.Finish()
	t.Logf("%d swaps to the base and %d back, %d requests, 0 errors; longest stall of a request %v", swaps+1, swaps, ops, longest)
	zero(t, dev)

	l = load()
	s.Kill()
	before := l.Requests()
	for end := time.Now().Add(devicetest.Patience); l.Requests() < before+1000; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("requests do not go on without the process")
		}
	}
	s.Start()
	if again := s.Line("ready"); again != dev {
		t.Fatalf("%s, was %s", again, dev)
	}
	ops, longest = l.Finish()
	t.Logf("killed while native, started again: %d requests, 0 errors; longest stall of a request %v", ops, longest)
	zero(t, dev)

	l = load()
	kills := devicetest.Kills(t)
	for range kills {
		s.Say(next())
		time.Sleep(time.Duration(rng.IntN(400)) * time.Millisecond)
		s.Kill()
		s.Start()
		s.Line("ready")
		if rng.IntN(2) == 0 {
			ask(s, "native")
		}
	}
	ask(s, "native")
	ops, longest = l.Finish()
	t.Logf("%d kills around the swaps: %d requests, 0 errors; longest stall of a request %v", kills, ops, longest)

	want := sum(t, dev)
	s.Finish()
	if got := sum(t, filepath.Join(dir, "volumes", "v", "base.img")); got != want {
		t.Error("the base is not what the device was")
	}
	if left, err := filepath.Glob("/sys/block/dm-*"); err != nil || len(left) > 0 {
		t.Errorf("left %v, %v", left, err)
	}
	if left, err := filepath.Glob("/sys/block/loop*/loop"); err != nil || len(left) > 0 {
		t.Errorf("left %v, %v", left, err)
	}
}

// withoutSwaps is the same with a volume that is never handed over: what the machine
// and the snapshots make of the longest stall.
func withoutSwaps(t *testing.T, seed uint64) (ops int64, longest time.Duration) {
	t.Helper()
	s := devicetest.StartServer(t, t.TempDir(), "for comparison")
	l := devicetest.StartLoad(t, s.Line("ready"), 8, seed)
	for n := range swaps {
		ask(s, fmt.Sprint("snapshot s", n))
	}
	ops, longest = l.Finish()
	s.Finish()
	return ops, longest
}

// zero makes the device what a load begins with.
func zero(t *testing.T, dev string) {
	t.Helper()
	f := devicetest.Open(t, dev, os.O_RDWR)
	defer f.Close()
	if err := devicetest.RangeIoctl(f, devicetest.ZeroOut, 0, volumeSize); err != nil {
		t.Fatal(err)
	}
}

func sum(t *testing.T, path string) (sum [sha256.Size]byte) {
	t.Helper()
	f := devicetest.Open(t, path, os.O_RDONLY)
	defer f.Close()
	h, buf := sha256.New(), devicetest.Aligned(t, 1<<20)
	for off := int64(0); off < volumeSize; off += int64(len(buf)) {
		if _, err := f.ReadAt(buf, off); err != nil {
			t.Fatal(err)
		}
		h.Write(buf)
	}
	return [sha256.Size]byte(h.Sum(nil))
}
