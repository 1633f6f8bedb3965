package ublk

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/snapmerge/snapmerge/pkg/transport"
	"github.com/snapmerge/snapmerge/test/devicetest"
)

// kills is how often to kill a server: SNAPMERGE_VM_COUNT, or 5.
func kills(t *testing.T) int {
	if s := os.Getenv("SNAPMERGE_VM_COUNT"); s != "" {
		n, err := strconv.Atoi(s)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	return 5
}

func seeded(t *testing.T) (uint64, *rand.Rand) {
	seed := uint64(time.Now().UnixNano())
	if s := os.Getenv("SNAPMERGE_SEED"); s != "" {
		var err error
		if seed, err = strconv.ParseUint(s, 10, 64); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("seed %d", seed)
	return seed, rand.New(rand.NewPCG(seed, 0))
}

// TestKillUnderLoad kills the serving process with SIGKILL at random moments of
// a load that verifies what it reads.
func TestKillUnderLoad(t *testing.T) {
	noLeftovers(t)
	seed, rng := seeded(t)
	s := startServer(t, t.TempDir(), imageFile(t, 32<<20))
	dev := s.line("ready")
	l := devicetest.StartLoad(t, dev, 16, seed)
	var worst time.Duration
	n := kills(t)
	for range n {
		time.Sleep(time.Duration(rng.IntN(1000)) * time.Millisecond) // some load
		begin := time.Now()
		s.kill()
		s.start()
		if again := s.line("adopted"); again != dev {
			t.Fatalf("adopted %s, had %s", again, dev)
		}
		worst = max(worst, time.Since(begin))
	}
	ops, longest := l.Finish()
	t.Logf("%d kills, %d requests, 0 errors; longest stall of a request %v, from kill to service at most %v", n, ops, longest, worst)
	s.finish()
}

// TestKillFio does so under fio with verification.
func TestKillFio(t *testing.T) {
	noLeftovers(t)
	if _, err := exec.LookPath("fio"); err != nil {
		t.Skip("needs fio")
	}
	_, rng := seeded(t)
	s := startServer(t, t.TempDir(), imageFile(t, 32<<20))
	dev := s.line("ready")
	type outcome struct {
		out []byte
		err error
	}
	for _, jobs := range []int{1, 4} {
		done := make(chan outcome, 1)
		go func() {
			args := []string{"--name=v", "--filename=" + dev, "--direct=1", "--ioengine=io_uring", "--rw=randwrite", "--bsrange=4k-64k", "--iodepth=16",
				"--verify=crc32c", "--do_verify=1", "--verify_fatal=1", "--verify_state_save=0", "--randrepeat=0", "--size=8m",
				fmt.Sprint("--numjobs=", jobs), "--offset_increment=8m", "--loops=4", "--group_reporting"}
			out, err := exec.Command("fio", args...).CombinedOutput()
			done <- outcome{out, err}
		}()
		n := 0
		for running := true; running; {
			select {
			case o := <-done:
				if o.err != nil {
					t.Errorf("fio with %d jobs: %v: %s", jobs, o.err, o.out)
				}
				running = false
			case <-time.After(time.Duration(rng.IntN(1500)) * time.Millisecond):
				if n == kills(t) {
					continue
				}
				n++
				s.kill()
				s.start()
				s.line("adopted")
			}
		}
		t.Logf("fio verify with %d jobs: %d kills, 0 errors", jobs, n)
	}
	s.finish()
}

// TestKillWithMount kills the server under a mounted file system that is being
// written, and checks the file system afterwards.
func TestKillWithMount(t *testing.T) {
	noLeftovers(t)
	for _, tt := range []struct{ fs, make, check string }{{"ext4", "mkfs.ext4 -q", "e2fsck -fn"}, {"xfs", "mkfs.xfs -q", "xfs_repair -n"}} {
		t.Run(tt.fs, func(t *testing.T) {
			_, rng := seeded(t)
			s := startServer(t, t.TempDir(), imageFile(t, 320<<20))
			dev := s.line("ready")
			if out, err := exec.Command("sh", "-c", tt.make+" "+dev).CombinedOutput(); err != nil {
				s.finish()
				t.Skipf("%s: %v: %s", tt.make, err, out)
			}
			dir := t.TempDir()
			if err := unix.Mount(dev, dir, tt.fs, 0, "discard"); err != nil {
				t.Fatal(err)
			}
			content := bytes.Repeat([]byte("0123456789abcdef"), 8<<10) // 128 KiB
			ctx, cancel := context.WithCancel(t.Context())
			written := make(chan int)
			go func() {
				n := 0
				for ; ctx.Err() == nil; n++ {
					if err := writeSynced(filepath.Join(dir, fmt.Sprint("file", n%20)), content); err != nil {
						t.Errorf("file %d: %v", n, err)
						break
					}
				}
				written <- n
			}()
			for range 3 {
				time.Sleep(time.Duration(rng.IntN(500)) * time.Millisecond) // some load
				s.kill()
				s.start()
				s.line("adopted")
			}
			cancel()
			n := <-written
			if err := unix.Unmount(dir, 0); err != nil {
				t.Fatal(err)
			}
			if err := unix.Mount(dev, dir, tt.fs, 0, ""); err != nil {
				t.Fatal(err)
			}
			for i := range min(n, 20) {
				if got, err := os.ReadFile(filepath.Join(dir, fmt.Sprint("file", i))); err != nil || !bytes.Equal(got, content) {
					t.Errorf("file %d: %d bytes, %v", i, len(got), err)
				}
			}
			if err := unix.Unmount(dir, 0); err != nil {
				t.Fatal(err)
			}
			if out, err := exec.Command("sh", "-c", tt.check+" "+dev).CombinedOutput(); err != nil {
				t.Errorf("%s: %v: %s", tt.check, err, out)
			}
			t.Logf("%d files written and synced", n)
			s.finish()
		})
	}
}

func writeSynced(name string, content []byte) error {
	f, err := os.Create(name)
	if err != nil {
		return err
	}
	_, err = f.Write(content)
	return errors.Join(err, f.Sync(), f.Close())
}

// TestAdoptFromTheLiving waits for a server that does not die.
func TestAdoptFromTheLiving(t *testing.T) {
	noLeftovers(t)
	dir := t.TempDir()
	image := imageFile(t, 1<<20)
	s := startServer(t, dir, image)
	dev := s.line("ready")
	b, err := devicetest.OpenFile(image)
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	if _, err := New(dir).Adopt(within(t, time.Second), "v", b); !errors.Is(err, unix.EBUSY) {
		t.Errorf("adopted from a process that lives: %v", err)
	}
	f := devicetest.Open(t, dev, os.O_RDWR)
	if _, err := f.ReadAt(devicetest.Aligned(t, blockSize), 0); err != nil {
		t.Error(err)
	}
	f.Close()
	s.finish()
}

// TestHalfMade leaves a device as a process does that is killed while it makes
// one, and a record without a device.
func TestHalfMade(t *testing.T) {
	noLeftovers(t)
	for _, next := range []string{"adopt", "create"} {
		tr := New(t.TempDir())
		if err := tr.records.put("half", 77); err != nil {
			t.Fatal(err)
		}
		if err := withControl(func(c *control) error {
			_, err := c.add(devInfo{queues: 1, depth: depth, maxIO: maxIO, flags: flagsNeeded, tag: 77})
			return err
		}); err != nil {
			t.Fatal(err)
		}
		if next == "adopt" {
			if _, err := tr.Adopt(t.Context(), "half", devicetest.NewMemory(4096)); !errors.Is(err, transport.ErrNotFound) {
				t.Errorf("adopt: %v", err)
			}
		}
		d := create(t, tr, "half", devicetest.NewMemory(4096), transport.Options{})
		closeDevice(t, d)
		if err := tr.records.put("gone", 78); err != nil {
			t.Fatal(err)
		}
		if left, err := tr.Leftovers(t.Context()); len(left) != 0 || err != nil {
			t.Errorf("leftovers %v, %v", left, err)
		}
		if _, err := tr.Adopt(t.Context(), "gone", devicetest.NewMemory(4096)); !errors.Is(err, transport.ErrNotFound) {
			t.Errorf("adopt of a record without a device: %v", err)
		}
		if _, err := tr.records.get("gone"); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("its record: %v", err)
		}
	}
}

// TestAdoptSmaller serves a device from a volume that could not be opened.
func TestAdoptSmaller(t *testing.T) {
	noLeftovers(t)
	dir := t.TempDir()
	s := startServer(t, dir, imageFile(t, 1<<20))
	dev := s.line("ready")
	s.kill()
	m := devicetest.NewMemory(blockSize)
	m.FailWith(unix.EIO)
	d, err := New(dir).Adopt(within(t, patience), "v", m)
	if err != nil {
		t.Fatal(err)
	}
	f := devicetest.Open(t, dev, os.O_RDWR)
	buf := devicetest.Aligned(t, blockSize)
	for _, off := range []int64{0, 512 << 10} {
		if _, err := f.ReadAt(buf, off); !errors.Is(err, unix.EIO) {
			t.Errorf("read at %d: %v", off, err)
		}
	}
	f.Close()
	if err := d.Abort(); err != nil {
		t.Error(err)
	}
}
