package ublk

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"runtime/pprof"
	"strings"
	"testing"
	"time"

	"github.com/snapmerge/snapmerge/pkg/transport"
	"github.com/snapmerge/snapmerge/test/devicetest"
)

const patience = devicetest.Patience

// needDriver skips where no devices are to be made.
func needDriver(t testing.TB) {
	t.Helper()
	if os.Getenv("SNAPMERGE_VM_GUEST") == "" {
		t.Skip("makes ublk devices, as root; `make test-vm` runs it in a virtual machine (SNAPMERGE_VM_GUEST=1 runs it here)")
	}
}

func within(t testing.TB, limit time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	t.Cleanup(cancel)
	return ctx
}

// eventually waits for something that has no event to wait for.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("never happened: %s", what)
		}
	}
}

// noLeftovers makes the test fail if it leaves devices, descriptors or
// goroutines behind.
func noLeftovers(t *testing.T) {
	t.Helper()
	needDriver(t)
	before := len(openFiles(t))
	t.Cleanup(func() {
		left, err := filepath.Glob(charClass + "/ublkc*")
		if err != nil || len(left) > 0 {
			t.Errorf("devices left: %v, %v", left, err)
		}
		eventually(t, "goroutines end", func() bool {
			var b bytes.Buffer
			_ = pprof.Lookup("goroutine").WriteTo(&b, 1)
			return !strings.Contains(b.String(), "ublk.(*queue)") && !strings.Contains(b.String(), "ublk.(*device)")
		})
		if after := openFiles(t); len(after) > before {
			t.Errorf("descriptors left: had %d, now %v", before, after)
		}
	})
}

func openFiles(t testing.TB) []string {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		if name, err := os.Readlink("/proc/self/fd/" + e.Name()); err == nil {
			names = append(names, name)
		}
	}
	return names
}

// create makes a device that is closed at the end of the test.
func create(t testing.TB, tr *Transport, volume string, b transport.Backend, o transport.Options) *device {
	t.Helper()
	d, err := tr.Create(within(t, patience), volume, b, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { closeDevice(t, d) })
	return d.(*device)
}

func closeDevice(t testing.TB, d transport.Device) {
	t.Helper()
	if err := d.Close(within(t, patience)); err != nil {
		t.Error(err)
	}
}

// TestMain lets the test binary be a server of its own that can be killed.
func TestMain(m *testing.M) {
	devicetest.ServerMain(func(_ context.Context, args []string) (transport.Transport, error) { return New(args[0]), nil })
	os.Exit(m.Run())
}

// starter starts servers whose records are in dir.
func starter(t testing.TB, dir string) func(image string) *devicetest.Server {
	return func(image string) *devicetest.Server { return devicetest.StartServer(t, image, dir) }
}
