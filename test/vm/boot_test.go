package vm

import (
	"context"
	"os"
	"strings"
	"testing"
	"time"
)

// needVM skips unless machines are to be booted. The test runs beside others then: an
// emulated machine has one processor of the host, however many it has itself.
func needVM(t *testing.T) {
	t.Helper()
	if os.Getenv("SNAPMERGE_VM") == "" {
		t.Skip("boots virtual machines; set SNAPMERGE_VM=1 to run it, or `make test-vm`")
	}
	t.Parallel()
}

// console shows what the guest prints in the log of the test as it comes.
type console struct{ t testing.TB }

func (c console) Write(p []byte) (int, error) {
	c.t.Log(strings.TrimRight(string(p), "\n"))
	return len(p), nil
}

func kernel(t testing.TB) *Kernel {
	t.Helper()
	k, err := FetchKernel()
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// TestBoot runs a script, writes a disk, and gets the exit code back.
func TestBoot(t *testing.T) {
	needVM(t)
	k := kernel(t)
	image, err := Initramfs(k, Contents{Modules: []string{"virtio_blk"}})
	if err != nil {
		t.Fatal(err)
	}
	d := NewDisk(4 << 20)
	m, err := Boot(Config{Kernel: k, Initramfs: image, Console: console{t}, Disks: []*Disk{d}, Files: map[string][]byte{"/hello": []byte("hello from a file\n")}, Job: `
uname -r
cat /hello
echo a line >/dev/ttyS1
dd if=/hello of=/dev/vda bs=512 conv=sync,fsync
exit 7
`})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	exit, err := m.Wait(ctx)
	if exit != 7 || err != nil {
		t.Fatalf("exit %d, %v", exit, err)
	}
	if line := <-m.Lines(); line != "a line" {
		t.Errorf("line %q", line)
	}
	for _, want := range []string{k.Release, "hello from a file"} {
		if !strings.Contains(m.Console(), want) {
			t.Errorf("console lacks %q", want)
		}
	}
	if c := d.Counts(); c.Flushes == 0 || string(d.durable[:5]) != "hello" {
		t.Errorf("disk: %+v, begins with %q", c, d.durable[:5])
	}
	t.Logf("booted in %v with %v", m.BootTime().Round(time.Millisecond), accel.args)
}
