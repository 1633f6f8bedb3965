package vm

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/snapmerge/snapmerge/test/nextrelease"
)

// modules are those of all tests.
var modules = []string{"virtio_blk", "loop", "?fuse", "?ublk_drv", "?nbd", "?cuse", "?xfs", "?dm_mod", "?dm_zero", "?dm_flakey", "?dm_snapshot", "?brd"}

// programs are those that tests in the guest call; they skip what is missing.
var programs = []string{"fio", "mkfs.ext4", "e2fsck", "resize2fs", "mkfs.xfs", "xfs_repair", "xfs_growfs", "blkid", "losetup", "dmsetup", "mount", "umount", "dd"}

// image is made once for all tests.
var image = sync.OnceValues(func() ([]byte, error) { return makeImage(modules, programs) })

// smallImage has just what a transport needs; it boots in half the time.
var smallImage = sync.OnceValues(func() ([]byte, error) {
	return makeImage([]string{"virtio_blk", "loop", "?fuse", "?ublk_drv", "?nbd"}, nil)
})

func makeImage(modules, programs []string) ([]byte, error) {
	k, err := FetchKernel()
	if err != nil {
		return nil, err
	}
	more, err := k.Add(strings.Fields(os.Getenv("KERNEL_MODULES")))
	if err != nil {
		return nil, err
	}
	return Initramfs(k, Contents{
		Modules: append(more, modules...), Programs: programs,
		Options: map[string]string{"nbd": "nbds_max=4", "loop": "max_loop=8", "brd": "rd_nr=1 rd_size=262144"},
	})
}

// build compiles a package for the guest, as a test binary if it is to be one.
func build(t testing.TB, pkg string, test bool) []byte {
	t.Helper()
	out := filepath.Join(t.TempDir(), "binary")
	args := []string{"build", "-trimpath", "-ldflags=-s -w", "-o", out, pkg}
	if test {
		args = append([]string{"test", "-c"}, args[1:]...)
	}
	c := exec.Command("go", args...)
	c.Env = append(os.Environ(), "CGO_ENABLED=0")
	if msg, err := c.CombinedOutput(); err != nil {
		t.Fatalf("%v: %v: %s", c.Args, err, msg)
	}
	b, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// ext4 is a disk with an empty ext4 file system, or with the files of a
// directory.
func ext4(t testing.TB, size int64, dir string) *Disk {
	t.Helper()
	name := filepath.Join(t.TempDir(), "ext4")
	args := []string{"-q", "-F", "-b", "4096", "-E", "lazy_itable_init=0"}
	if dir != "" {
		args = append(args, "-d", dir)
	}
	args = append(args, name, fmt.Sprintf("%dk", size>>10))
	if msg, err := exec.Command("mkfs.ext4", args...).CombinedOutput(); err != nil {
		t.Fatalf("mkfs.ext4: %v: %s", err, msg)
	}
	d, err := DiskOf(name)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(d.Remove)
	return d
}

// boot starts a machine, with the image of all tests unless it has one.
func boot(t testing.TB, cfg Config) *Machine {
	t.Helper()
	var err error
	cfg.Kernel = kernel(t)
	if cfg.Initramfs == nil {
		if cfg.Initramfs, err = image(); err != nil {
			t.Fatal(err)
		}
	}
	m, err := Boot(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// runTests runs the tests of a package in the guest, with their files on ext4.
func runTests(t *testing.T, pkg string, limit time.Duration, args ...string) {
	needVM(t)
	runWith(t, "", pkg, limit, args...)
}

// runWith is runTests with assignments for the environment.
func runWith(t *testing.T, env, pkg string, limit time.Duration, args ...string) {
	t.Helper()
	m, exit, err := runBinary(t, build(t, pkg, true), env, limit, args...)
	if exit != 0 || err != nil {
		t.Errorf("exit code %d, %v", exit, err)
	}
	t.Logf("%s: boot %.1f s, in all %.0f s; %d passed, %d failed, %d skipped", pkg, m.BootTime().Seconds(), time.Since(m.booted).Seconds(),
		strings.Count(m.Console(), "--- PASS"), strings.Count(m.Console(), "--- FAIL"), strings.Count(m.Console(), "--- SKIP"))
}

// runBinary runs a test binary in a machine of its own.
func runBinary(t *testing.T, binary []byte, env string, limit time.Duration, args ...string) (m *Machine, exit int, err error) {
	return runOn(t, ext4(t, 2<<30, ""), binary, env, limit, args...)
}

// runOn is runBinary with a disk that may have files; it is mounted at /mnt.
func runOn(t *testing.T, disk *Disk, binary []byte, env string, limit time.Duration, args ...string) (m *Machine, exit int, err error) {
	m = boot(t, Config{
		Console:   console{t},
		Files:     map[string][]byte{"/test": binary},
		Disks:     []*Disk{disk},
		MemoryMiB: 2048,
		Job: fmt.Sprintf(`
mount /dev/vda /mnt && mkdir /mnt/tmp || exit 99
cd /mnt
SNAPMERGE_VM_GUEST=1 SNAPMERGE_SEED=%s SNAPMERGE_VM_COUNT=%s TMPDIR=/mnt/tmp %s /test -test.v -test.timeout=%v %s
code=$?
dmesg | grep -E 'BUG|WARNING|Call Trace|hung|blocked for' && code=98
cd / && umount /mnt
exit $code
`, os.Getenv("SEED"), os.Getenv("COUNT"), env, limit, strings.Join(append(args, os.Getenv("TESTARGS")), " ")),
	})
	ctx, cancel := context.WithTimeout(t.Context(), limit+time.Minute)
	defer cancel()
	exit, err = m.Wait(ctx)
	return m, exit, err
}

// shortForm tells that only as much is to be run as CI has time for.
func shortForm() bool { return os.Getenv("COUNT") == "" }

// timeLimit is how long a test may take that does something COUNT times.
func timeLimit(t *testing.T, rest, each time.Duration) time.Duration {
	t.Helper()
	return rest + time.Duration(count(t))*each
}

const modulePath = "github.com/snapmerge/snapmerge/"

// TestMerge leaves the fixtures to TestVolumes in the short form.
func TestMerge(t *testing.T) {
	skip := "-test.skip=Crash|Fixtures"
	if !shortForm() {
		skip = "-test.skip=Crash"
	}
	runTests(t, modulePath+"pkg/merge", 5*time.Minute, "-test.short", "'"+skip+"'")
}

// TestVolumes runs whole volumes over each transport: the fixtures, fio, file systems,
// discard.
func TestVolumes(t *testing.T) {
	args := []string{"-test.short"}
	if !shortForm() {
		args = nil
	}
	runTests(t, modulePath+"test/devicetest", 15*time.Minute, args...)
}

// driverTests are those of the node plugin that depend on the transport, and in the short
// form leave xfs out.
const (
	driverTests      = "-test.run='^(TestHungDevice|TestDeadDevice|TestExpandUnderLoad|TestShutdown)$'"
	shortDriverTests = "-test.skip='/^xfs$'"
)

func TestDriverUblk(t *testing.T) { runDriver(t, "ublk") }
func TestDriverNbd(t *testing.T)  { runDriver(t, "nbd") }

func TestDriverDmUser(t *testing.T) {
	needDmUser(t)
	runDriver(t, "dm-user")
}

func TestRestartUblk(t *testing.T) { runRestart(t, "ublk") }
func TestRestartNbd(t *testing.T)  { runRestart(t, "nbd") }

func TestRestartDmUser(t *testing.T) {
	needDmUser(t)
	runRestart(t, "dm-user")
}

// runRestart ends the node plugin again and again under fio; with fuse the host does.
func runRestart(t *testing.T, transport string) {
	needLongForm(t)
	binary := build(t, modulePath+"pkg/driver", true)
	limit := timeLimit(t, 10*time.Minute, 20*time.Second)
	untilNoCrash(t, crashes(transport), func() (*Machine, int, error) {
		return runBinary(t, binary, "SNAPMERGE_TEST_TRANSPORT="+transport, limit, "-test.run='^TestRestart$/^ext4$'")
	})
}

func TestUpgradeUblk(t *testing.T) { runUpgrade(t, "ublk") }
func TestUpgradeNbd(t *testing.T)  { runUpgrade(t, "nbd") }

func TestUpgradeDmUser(t *testing.T) {
	needDmUser(t)
	runUpgrade(t, "dm-user")
}

// runUpgrade goes to a release whose volume records have a newer format; with fuse the
// host does.
func runUpgrade(t *testing.T, transport string) {
	needLongForm(t)
	dir := t.TempDir()
	nextrelease.Build(t, dir)
	binary := build(t, modulePath+"pkg/driver", true)
	untilNoCrash(t, crashes(transport), func() (*Machine, int, error) {
		return runOn(t, ext4(t, 2<<30, dir), binary,
			"SNAPMERGE_TEST_TRANSPORT="+transport+" "+nextrelease.Dir+"=/mnt", 12*time.Minute, "-test.run='^TestUpgrade$'")
	})
}

// needLongForm is needVM for what takes too long for the short form.
func needLongForm(t *testing.T) {
	t.Helper()
	needVM(t)
	if shortForm() {
		t.Skip("takes minutes; set COUNT to run it")
	}
}

// runDriver runs the node plugin with the transport; fuse it has on the host.
func runDriver(t *testing.T, transport string) {
	needVM(t)
	args := []string{driverTests}
	if shortForm() {
		args = append(args, shortDriverTests)
	}
	runWith(t, "SNAPMERGE_TEST_TRANSPORT="+transport, modulePath+"pkg/driver", 8*time.Minute, args...)
}

// TestFuseloop is, but for kills, left to the host in the short form.
func TestFuseloop(t *testing.T) {
	args := []string{"-test.short"}
	if shortForm() {
		args = append(args, "-test.run=Kill")
	}
	runTests(t, modulePath+"pkg/transport/fuseloop", timeLimit(t, 4*time.Minute, 10*time.Second), args...)
}

func TestUblk(t *testing.T) {
	runTests(t, modulePath+"pkg/transport/ublk", 5*time.Minute, "-test.skip=TestKill")
}

func TestDevmapper(t *testing.T) {
	runTests(t, modulePath+"pkg/devmapper", time.Minute)
}

func TestHandover(t *testing.T) {
	runTests(t, modulePath+"pkg/transport/handover", timeLimit(t, 3*time.Minute, 20*time.Second))
}

// TestDmUser runs against a mock of the driver behind CUSE and, with a module of
// the real one in KERNEL_MODULES, against that. The short form leaves the fixtures out,
// as TestMerge does.
func TestDmUser(t *testing.T) {
	var args []string
	if shortForm() {
		args = append(args, "-test.skip=Fixtures")
	}
	runTests(t, modulePath+"pkg/transport/dmuser", timeLimit(t, 5*time.Minute, 20*time.Second), args...)
}

func TestNbdTransport(t *testing.T) {
	runTests(t, modulePath+"pkg/transport/nbd", timeLimit(t, 6*time.Minute, 30*time.Second))
}

// maxCrashes is how often the kernel may crash in a test that kills servers: see
// docs/transports.md, "Old drivers crash when their server is killed".
const maxCrashes = 3

// TestUblkKill boots again when the kernel crashes.
func TestUblkKill(t *testing.T) {
	needVM(t)
	binary := build(t, modulePath+"pkg/transport/ublk", true)
	limit := timeLimit(t, 4*time.Minute, 20*time.Second)
	for _, name := range []string{"TestKillUnderLoad", "TestKillFull", "TestKillFio", "TestKillWithMount"} {
		t.Run(name, func(t *testing.T) {
			untilNoCrash(t, maxCrashes, func() (*Machine, int, error) { return runBinary(t, binary, "", limit, "-test.run='^"+name+"$'") })
		})
	}
}

func TestNodeUblk(t *testing.T) { runNode(t, "ublk") }
func TestNodeFuse(t *testing.T) { runNode(t, "fuse") }
func TestNodeNbd(t *testing.T)  { runNode(t, "nbd") }

func TestNodeDmUser(t *testing.T) {
	needDmUser(t)
	runNode(t, "dm-user")
}

// runNode runs the program itself, a keeper and a node plugin, over the transport.
func runNode(t *testing.T, transport string) {
	needVM(t)
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "snapmerge"), build(t, modulePath+"cmd/snapmerge", false), 0o700); err != nil {
		t.Fatal(err)
	}
	binary := build(t, modulePath+"pkg/driver", true)
	limit := timeLimit(t, 6*time.Minute, 20*time.Second)
	untilNoCrash(t, crashes(transport), func() (*Machine, int, error) {
		return runOn(t, ext4(t, 2<<30, dir), binary, "SNAPMERGE_BINARY=/mnt/snapmerge", limit, "-test.run='^TestHandOver$/^"+transport+"$'")
	})
}

// crashes is how often the kernel may crash for its driver of the transport.
func crashes(transport string) int {
	if transport == "ublk" {
		return maxCrashes
	}
	return 0
}

// untilNoCrash runs a machine; when the kernel crashes it does so again, so often at
// most.
func untilNoCrash(t *testing.T, most int, run func() (m *Machine, exit int, err error)) {
	t.Helper()
	for crashes := 0; ; crashes++ {
		m, exit, err := run()
		if exit == 0 && err == nil {
			t.Logf("the kernel crashed %d times", crashes)
			return
		}
		if crashes == most || !strings.Contains(m.Console(), "Kernel panic") {
			t.Fatalf("exit code %d, %v", exit, err)
		}
	}
}
