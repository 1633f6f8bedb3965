package devicetest

import (
	"bytes"
	"context"
	"encoding/json"
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
)

// Kills is how often to kill a server: SNAPMERGE_VM_COUNT, or 5.
func Kills(t testing.TB) int {
	t.Helper()
	if s := os.Getenv("SNAPMERGE_VM_COUNT"); s != "" {
		n, err := strconv.Atoi(s)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	return 5
}

// Seeded makes a generator from SNAPMERGE_SEED, or from a seed of its own, which
// it prints.
func Seeded(t testing.TB) (uint64, *rand.Rand) {
	t.Helper()
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

// mostTakeover is how long a killed server's successor may take, on a slow machine.
const mostTakeover = 20 * time.Second

// KillUnderLoad kills the serving process with SIGKILL at random moments of a
// load that verifies what it reads, of that many workers with a request each. start
// starts a server of the image.
func KillUnderLoad(t *testing.T, workers int, start func(image string) *Server) {
	seed, rng := Seeded(t)
	s := start(Image(t, workers*region))
	dev := s.Line("ready")
	l := StartLoad(t, dev, workers, seed)
	var worst time.Duration
	n := Kills(t)
	for range n {
		time.Sleep(time.Duration(rng.IntN(1000)) * time.Millisecond) // some load
		begin := time.Now()
		if again := s.Restart(); again != dev {
			t.Fatalf("adopted %s, had %s", again, dev)
		}
		worst = max(worst, time.Since(begin))
	}
	ops, longest := l.Finish()
	t.Logf("%d kills, %d requests, 0 errors; longest stall of a request %v, from kill to service at most %v", n, ops, longest, worst)
	if worst > mostTakeover {
		t.Errorf("a server took %v to take over", worst)
	}
	s.Finish()
}

// KillFio does so under fio with verification, of 1 and of 4 jobs.
func KillFio(t *testing.T, start func(image string) *Server) {
	if _, err := exec.LookPath("fio"); err != nil {
		t.Skip("needs fio")
	}
	_, rng := Seeded(t)
	s := start(Image(t, 32<<20))
	dev := s.Line("ready")
	for _, jobs := range []int{1, 4} {
		stop, done := make(chan struct{}), make(chan struct{})
		var passes int
		var longest time.Duration
		go func() {
			defer close(done)
			for {
				took, err := verify(dev, jobs)
				if err != nil {
					t.Errorf("fio with %d jobs: %v", jobs, err)
					return
				}
				passes, longest = passes+1, max(longest, took)
				select {
				case <-stop:
					return
				default:
				}
			}
		}()
		for range Kills(t) {
			time.Sleep(time.Duration(rng.IntN(1500)) * time.Millisecond) // anywhere in a pass
			s.Restart()
		}
		close(stop)
		<-done
		if t.Failed() {
			break
		}
		t.Logf("fio verify with %d jobs: %d passes, %d kills, 0 errors; longest stall of a request %v", jobs, passes, Kills(t), longest)
	}
	s.Finish()
}

// verify has fio write and verify all of the device once, and returns how long the
// slowest request took.
func verify(dev string, jobs int) (longest time.Duration, err error) {
	out, err := exec.Command("fio", "--name=v", "--filename="+dev, "--direct=1", "--ioengine=io_uring", "--rw=randwrite", "--bsrange=4k-64k", "--iodepth=16",
		"--verify=crc32c", "--do_verify=1", "--verify_fatal=1", "--verify_state_save=0", "--randrepeat=0", "--size=8m",
		fmt.Sprint("--numjobs=", jobs), "--offset_increment=8m", "--group_reporting", "--output-format=json").Output()
	if err != nil {
		return 0, fmt.Errorf("%w: %s", err, out)
	}
	type side struct {
		Latency struct {
			Max int64 `json:"max"`
		} `json:"lat_ns"`
	}
	var report struct {
		Jobs []struct{ Read, Write side }
	}
	// With several jobs it may warn that they could overwrite each other's blocks.
	out = out[max(0, bytes.IndexByte(out, '{')):]
	if err := json.Unmarshal(out, &report); err != nil || len(report.Jobs) == 0 {
		return 0, fmt.Errorf("report of fio: %w: %s", err, out)
	}
	for _, j := range report.Jobs {
		longest = max(longest, time.Duration(max(j.Read.Latency.Max, j.Write.Latency.Max)))
	}
	return longest, nil
}

// KillWithMount kills the server under a mounted file system that is being
// written, and checks the file system afterwards. options are those of mount.
func KillWithMount(t *testing.T, start func(image string) *Server, options string) {
	for _, tt := range []struct{ fs, make, check string }{{"ext4", "mkfs.ext4 -q", "e2fsck -fn"}, {"xfs", "mkfs.xfs -q", "xfs_repair -n"}} {
		t.Run(tt.fs, func(t *testing.T) {
			_, rng := Seeded(t)
			s := start(Image(t, 320<<20))
			dev := s.Line("ready")
			if out, err := exec.Command("sh", "-c", tt.make+" "+dev).CombinedOutput(); err != nil {
				s.Finish()
				t.Skipf("%s: %v: %s", tt.make, err, out)
			}
			dir := t.TempDir()
			if err := unix.Mount(dev, dir, tt.fs, 0, options); err != nil {
				t.Fatal(err)
			}
			content := bytes.Repeat([]byte("0123456789abcdef"), 8<<10) // 128 KiB
			ctx, cancel := context.WithCancel(t.Context())
			written := make(chan int)
			var longest time.Duration
			go func() {
				n := 0
				for ; ctx.Err() == nil; n++ {
					begin := time.Now()
					if err := writeSynced(filepath.Join(dir, fmt.Sprint("file", n%20)), content); err != nil {
						t.Errorf("file %d: %v", n, err)
						break
					}
					longest = max(longest, time.Since(begin))
				}
				written <- n
			}()
			kills := max(3, Kills(t)/2)
			for range kills {
				time.Sleep(time.Duration(rng.IntN(500)) * time.Millisecond) // some load
				s.Restart()
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
			t.Logf("%d kills, %d files written and synced, the slowest in %v", kills, n, longest)
			s.Finish()
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
