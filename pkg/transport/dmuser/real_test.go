package dmuser

import (
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/snapmerge/snapmerge/pkg/devmapper"
	"github.com/snapmerge/snapmerge/pkg/keeper"
	"github.com/snapmerge/snapmerge/pkg/transport"
	"github.com/snapmerge/snapmerge/test/devicetest"
)

// needTarget skips where the kernel has no dm-user, or no devices are to be made.
func needTarget(t testing.TB) {
	t.Helper()
	if os.Getenv("SNAPMERGE_VM_GUEST") == "" {
		t.Skip("makes dm-user devices, as root; `make test-vm KERNEL_MODULES=.../dm-user.ko` runs it in a virtual machine")
	}
	if _, err := devmapper.TargetVersion("user"); err != nil {
		t.Skipf("the kernel has no dm-user: %v; `make test-vm KERNEL_MODULES=.../dm-user.ko` loads one", err)
	}
	t.Cleanup(func() {
		var names []string
		for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(time.Millisecond) { // those in use go by and by
			var err error
			if names, err = devmapper.List(); err != nil {
				t.Error(err)
			}
			if len(names) == 0 {
				return
			}
		}
		t.Errorf("devices left: %v", names)
	})
}

// realDevice makes a device of the kernel that is closed at the end of the test.
func realDevice(t testing.TB, volume string, b transport.Backend, o transport.Options) *device {
	t.Helper()
	d, err := New(nil).Create(within(t, patience), volume, b, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Close(within(t, patience)); err != nil {
			t.Error(err)
		}
	})
	return d.(*device)
}

func TestRealIO(t *testing.T) {
	needTarget(t)
	seed, _ := devicetest.Seeded(t)
	var wg sync.WaitGroup
	defer wg.Wait()
	for i := range 2 {
		m := devicetest.NewMemory(8 << 20)
		d := realDevice(t, fmt.Sprint("random-", i), m, transport.Options{})
		f := devicetest.Open(t, d.Path(), os.O_RDWR)
		buf := devicetest.Aligned(t, 3<<20)
		wg.Go(func() { devicetest.RandomIO(t, f, m, buf, rand.New(rand.NewPCG(seed, uint64(i))), 400, false) })
	}
	wg.Wait()
}

func TestRealProbe(t *testing.T) {
	needTarget(t)
	tr := New(nil)
	if err := tr.Probe(); err != nil {
		t.Error(err)
	}
	n, err := tr.MaxVolumes()
	if err != nil || n < 1 {
		t.Errorf("at most %d volumes, %v", n, err)
	}
	if tr.SurvivesRestart() == nil {
		t.Error("survives a restart without a keeper")
	}
}

func TestRealReadOnly(t *testing.T) {
	needTarget(t)
	m := devicetest.NewMemory(1 << 20)
	d := realDevice(t, "ro", m, transport.Options{ReadOnly: true})
	if b, err := os.ReadFile(blockDir(d.Path()) + "/ro"); err != nil || strings.TrimSpace(string(b)) != "1" {
		t.Errorf("ro is %q, %v", b, err)
	}
	if f, err := os.OpenFile(d.Path(), os.O_RDWR, 0); err == nil {
		if _, err := f.Write(make([]byte, 4096)); err == nil {
			t.Error("write to a read-only device succeeds")
		}
		f.Close()
	}
	if m.Writes.Load() != 0 {
		t.Error("the backend was written")
	}
}

func TestRealBusyAndAbort(t *testing.T) {
	needTarget(t)
	m := devicetest.NewMemory(16 << 20)
	d := realDevice(t, "busy", m, transport.Options{})
	if out, err := exec.Command("mkfs.ext4", "-q", d.Path()).CombinedOutput(); err != nil {
		t.Skipf("mkfs.ext4: %v: %s", err, out)
	}
	dir := t.TempDir()
	if err := unix.Mount(d.Path(), dir, "ext4", 0, ""); err != nil {
		t.Fatal(err)
	}
	if err := d.Close(within(t, patience)); err == nil || !strings.Contains(err.Error(), "busy") {
		t.Errorf("close of a mounted device: %v", err)
	}
	if err := os.WriteFile(dir+"/file", make([]byte, 1<<20), 0o600); err != nil {
		t.Errorf("it does not serve any more: %v", err)
	}
	// A backend that hangs, and a write that waits for it.
	release := m.Hang()
	defer release()
	failed := make(chan error, 1)
	go func() {
		f, err := os.OpenFile(d.Path(), os.O_RDWR|unix.O_DIRECT, 0)
		if err == nil {
			_, err = f.ReadAt(devicetest.Aligned(t, 4096), 8<<20)
			f.Close()
		}
		failed <- err
	}()
	reads := m.Reads.Load()
	for end := time.Now().Add(patience); m.Reads.Load() == reads && time.Now().Before(end); time.Sleep(time.Millisecond) {
	}
	begin := time.Now()
	if err := d.Abort(); err != nil {
		t.Error(err)
	}
	t.Logf("abort took %v", time.Since(begin))
	if err := <-failed; err == nil {
		t.Error("a read of an aborted device succeeds")
	}
	if err := unix.Unmount(dir, 0); err != nil {
		t.Error(err)
	}
	release()
}

func TestRealClose(t *testing.T) {
	needTarget(t)
	m := devicetest.NewMemory(1 << 20)
	d := realDevice(t, "dirty", m, transport.Options{})
	f, err := os.OpenFile(d.Path(), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt([]byte("dirty"), 5*4096); err != nil {
		t.Fatal(err)
	}
	f.Close()
	if err := d.Close(within(t, patience)); err != nil {
		t.Fatal(err)
	}
	if string(m.Content()[5*4096:5*4096+5]) != "dirty" {
		t.Error("lost")
	}
	// Removed by somebody else: it has failed.
	d = realDevice(t, "dirty", m, transport.Options{})
	if err := devmapper.Remove(d.meta.Name); err != nil {
		t.Fatal(err)
	}
	select {
	case <-d.Failed():
	case <-time.After(patience):
		t.Error("nobody has noticed")
	}
}

// realServer starts servers of the kernel's devices.
func realServer(t testing.TB) func(image string) *devicetest.Server {
	socket := startKeeper(t)
	return func(image string) *devicetest.Server { return devicetest.StartServer(t, image, socket) }
}

func TestRealKillUnderLoad(t *testing.T) {
	needTarget(t)
	devicetest.KillUnderLoad(t, 16, realServer(t))
}

func TestRealKillFio(t *testing.T) {
	needTarget(t)
	devicetest.KillFio(t, realServer(t))
}

func TestRealKillWithMount(t *testing.T) {
	needTarget(t)
	devicetest.KillWithMount(t, realServer(t), "")
}

// TestRealDeadWithoutKeeper: what a process without a keeper leaves goes before
// the next device of the volume comes.
func TestRealDeadWithoutKeeper(t *testing.T) {
	needTarget(t)
	socket := startKeeper(t)
	s := devicetest.StartServer(t, devicetest.Image(t, 1<<20), socket)
	dev := s.Line("ready")
	k, err := keeper.Dial(t.Context(), socket)
	if err != nil {
		t.Fatal(err)
	}
	defer k.Close()
	s.Kill()
	if err := k.Drop(t.Context(), keyPrefix+"v"); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(dev)
	if err == nil {
		if _, err := f.ReadAt(make([]byte, 4096), 0); err == nil {
			t.Error("a device without a server can be read")
		}
		f.Close()
	}
	tr := New(k)
	d, err := tr.Create(within(t, patience), "v", devicetest.NewMemory(1<<20), transport.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if f, err := devmapper.List(); len(f) > 2 || err != nil { // the dead one may still be going
		t.Errorf("devices %v, %v", f, err)
	}
	if err := d.Close(within(t, patience)); err != nil {
		t.Error(err)
	}
}
