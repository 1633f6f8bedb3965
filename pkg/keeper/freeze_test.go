package keeper

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/snapmerge/snapmerge/test/machine"
)

// mountExt4 mounts a new ext4 on a loop device and opens its root.
func mountExt4(t *testing.T) (dir *os.File) {
	t.Helper()
	machine.NeedDevices(t, machine.Loop)
	machine.NeedFS(t, "ext4")
	tmp := t.TempDir()
	img, mnt := filepath.Join(tmp, "img"), filepath.Join(tmp, "mnt")
	if err := os.Mkdir(mnt, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(img, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(img, 16<<20); err != nil {
		t.Fatal(err)
	}
	for _, cmd := range [][]string{{"mkfs.ext4", "-q", img}, {"mount", "-o", "loop", img, mnt}} {
		if out, err := exec.Command(cmd[0], cmd[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %v: %s", cmd, err, out)
		}
	}
	dir, err := os.Open(mnt)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		thawFS(int(dir.Fd()))
		dir.Close()
		// A child that has just been given up may hold it for a moment.
		eventually(t, "nobody holds the file system", func() bool {
			return exec.Command("umount", mnt).Run() == nil
		})
	})
	return dir
}

// isFrozen finds out by trying to freeze.
func isFrozen(t *testing.T, dir *os.File) bool {
	t.Helper()
	err := unix.IoctlSetInt(int(dir.Fd()), ioctlFreeze, 0)
	if errors.Is(err, unix.EBUSY) {
		return true
	}
	if err != nil {
		t.Fatalf("FIFREEZE: %v", err)
	}
	if err := thawFS(int(dir.Fd())); err != nil && !errors.Is(err, errNotFrozen) { // a watchdog was faster
		t.Fatal(err)
	}
	return false
}

func TestFreezeAndThaw(t *testing.T) {
	usual := settle
	settle = 100 * time.Millisecond
	t.Cleanup(func() { settle = usual }) // after the keeper's end
	dir := mountExt4(t)
	path := socketPath(t)
	start(t, path)
	c := connect(t, path)
	for i := range 3 {
		f, err := c.Freeze(t.Context(), "a", int(dir.Fd()), maxFreeze)
		if err != nil {
			t.Fatal(err)
		}
		if !isFrozen(t, dir) {
			t.Error("not frozen")
		}
		if i == 0 {
			if _, err := c.Freeze(t.Context(), "a", int(dir.Fd()), maxFreeze); err == nil || !strings.Contains(err.Error(), errFreezing.Error()) {
				t.Errorf("frozen twice: %v", err)
			}
			if !isFrozen(t, dir) {
				t.Error("a refused freeze thawed another one")
			}
		}
		if err := f.Thaw(t.Context()); err != nil {
			t.Error(err)
		}
		if isFrozen(t, dir) {
			t.Error("still frozen")
		}
	}
}

func TestWatchdogThaws(t *testing.T) {
	dir := mountExt4(t)
	path := socketPath(t)
	start(t, path)
	f, err := connect(t, path).Freeze(t.Context(), "a", int(dir.Fd()), 30*time.Millisecond)
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "watchdog thaws", func() bool { return !isFrozen(t, dir) })
	// A freeze that comes late, from wherever, must not stay either.
	if err := unix.IoctlSetInt(int(dir.Fd()), ioctlFreeze, 0); err != nil {
		t.Fatal(err)
	}
	eventually(t, "watchdog thaws again", func() bool { return !isFrozen(t, dir) })
	if err := f.Thaw(t.Context()); !errors.Is(err, ErrBroken) {
		t.Errorf("thaw after the watchdog: %v", err)
	}
}

// TestThawedByOthers: a freeze that somebody else ended is no cut.
func TestThawedByOthers(t *testing.T) {
	dir := mountExt4(t)
	path := socketPath(t)
	start(t, path)
	f, err := connect(t, path).Freeze(t.Context(), "a", int(dir.Fd()), maxFreeze)
	if err != nil {
		t.Fatal(err)
	}
	if err := thawFS(int(dir.Fd())); err != nil {
		t.Fatal(err)
	}
	if err := f.Thaw(t.Context()); !errors.Is(err, ErrBroken) {
		t.Errorf("thaw: %v", err)
	}
}

func TestContextEndsFreeze(t *testing.T) {
	dir := mountExt4(t)
	path := socketPath(t)
	start(t, path)
	c := connect(t, path)
	f, err := c.Freeze(t.Context(), "a", int(dir.Fd()), maxFreeze)
	if err != nil {
		t.Fatal(err)
	}
	over, cancel := context.WithCancel(t.Context())
	cancel()
	if err := f.Thaw(over); err == nil {
		t.Error("thaw with an ended context: no error")
	}
	eventually(t, "thawed", func() bool { return !isFrozen(t, dir) })
	if _, err := c.Freeze(over, "a", int(dir.Fd()), maxFreeze); err == nil {
		t.Error("freeze with an ended context: no error")
	}
	eventually(t, "thawed", func() bool { return !isFrozen(t, dir) })
}

// TestFrozenClientDies kills the process that froze.
func TestFrozenClientDies(t *testing.T) {
	dir := mountExt4(t)
	path := socketPath(t)
	start(t, path)
	cmd, out := helper(t, os.Args[0], "freeze", nil, path, dir.Name())
	if line, err := bufio.NewReader(out).ReadString('\n'); line != "frozen\n" {
		t.Fatalf("helper says %q, %v", line, err)
	}
	if !isFrozen(t, dir) {
		t.Fatal("not frozen")
	}
	begin := time.Now()
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	written := make(chan error, 1)
	go func() { written <- os.WriteFile(filepath.Join(dir.Name(), "f"), []byte("x"), 0o600) }()
	select {
	case err := <-written:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(maxFreeze / 2): // well before the watchdog
		t.Fatal("still frozen though the client is dead")
	}
	t.Logf("thawed %v after the death", time.Since(begin).Round(time.Microsecond))
}

// helperFreeze freezes the directory args[2] and waits to be killed.
func helperFreeze() {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	c, err := Dial(ctx, os.Args[1])
	if err == nil {
		var dir *os.File
		if dir, err = os.Open(os.Args[2]); err == nil {
			_, err = c.Freeze(ctx, "helper", int(dir.Fd()), maxFreeze)
		}
	}
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println("frozen")
	time.Sleep(time.Hour)
}

// TestFrozenKeeperDies kills the keeper, which thaws though the client lives.
func TestFrozenKeeperDies(t *testing.T) {
	dir := mountExt4(t)
	path := socketPath(t)
	cmd, _ := helper(t, os.Args[0], "serve", nil, path)
	f, err := connect(t, path).Freeze(t.Context(), "a", int(dir.Fd()), maxFreeze)
	if err != nil {
		t.Fatal(err)
	}
	begin := time.Now()
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	cmd.Wait()
	eventually(t, "thawed", func() bool { return !isFrozen(t, dir) })
	if took := time.Since(begin); took > maxFreeze/2 { // well before the watchdog
		t.Errorf("thawed after %v", took)
	}
	if err := f.Thaw(t.Context()); !errors.Is(err, ErrBroken) {
		t.Errorf("thaw without the keeper: %v", err)
	}
}

// TestFreezerDies kills the child that has frozen: whoever wanted it thaws.
func TestFreezerDies(t *testing.T) {
	dir := mountExt4(t)
	path := socketPath(t)
	start(t, path)
	c := connect(t, path)
	for name, freeze := range map[string]func() (*Frozen, error){
		"keeper": func() (*Frozen, error) { return c.Freeze(t.Context(), "a", int(dir.Fd()), maxFreeze) },
		"here":   func() (*Frozen, error) { return FreezeHere(t.Context(), "a", int(dir.Fd()), maxFreeze) },
	} {
		f, err := freeze()
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		pid := onlyChild(t)
		if err := unix.Kill(pid, unix.SIGTERM); err != nil { // as the end of a container does
			t.Fatal(err)
		}
		if !isFrozen(t, dir) {
			t.Errorf("%s: SIGTERM ends the freeze", name)
		}
		if err := unix.Kill(pid, unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
		eventually(t, "the child ends", func() bool { return len(childrenOf(t, os.Getpid())) == 0 })
		if !isFrozen(t, dir) {
			t.Fatalf("%s: not frozen, so this shows nothing", name)
		}
		if err := f.Thaw(t.Context()); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if isFrozen(t, dir) {
			t.Errorf("%s: still frozen", name)
		}
	}
}

// TestChildHasNothing: a child that waits must not hold what it waits for.
func TestChildHasNothing(t *testing.T) {
	dir := mountExt4(t)
	path := socketPath(t)
	start(t, path)
	c := connect(t, path)
	_, w := pipeFDs(t)
	defer unix.Close(w)
	if err := c.Put(t.Context(), "a", testMeta{}, w, w); err != nil {
		t.Fatal(err)
	}
	f, err := c.Freeze(t.Context(), "a", int(dir.Fd()), maxFreeze)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Thaw(t.Context())
	fds := fmt.Sprintf("/proc/%d/fd", onlyChild(t))
	names, err := os.ReadDir(fds)
	if err != nil {
		t.Fatal(err)
	}
	sockets, dirs := 0, 0
	for _, n := range names {
		to, err := os.Readlink(filepath.Join(fds, n.Name()))
		if err != nil {
			t.Fatal(err)
		}
		switch {
		case n.Name() <= "2" && len(n.Name()) == 1: // standard input, output, error
		case strings.HasPrefix(to, "anon_inode:"): // of Go's poller
		case strings.HasPrefix(to, "socket:"):
			sockets++
		case to == dir.Name():
			dirs++
		case strings.HasPrefix(to, "/sys/fs/cgroup/"): // of Go's scheduler
		default:
			t.Errorf("the child has %s", to)
		}
	}
	if sockets != 1 || dirs != 1 {
		t.Errorf("the child has %d sockets and the directory %d times", sockets, dirs)
	}
}

// onlyChild is the one child of this process that is left when those of earlier
// tests have ended.
func onlyChild(t *testing.T) (pid int) {
	t.Helper()
	eventually(t, "there is one child", func() bool {
		pids := childrenOf(t, os.Getpid())
		if len(pids) == 1 {
			pid = pids[0]
		}
		return len(pids) == 1
	})
	return pid
}

// childrenOf lists the processes that the process has started and that live.
func childrenOf(t *testing.T, pid int) (pids []int) {
	t.Helper()
	lists, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	if err != nil || len(lists) == 0 {
		t.Fatalf("no list of children: %v", err)
	}
	for _, list := range lists {
		b, err := os.ReadFile(list)
		if err != nil {
			continue // a thread that has ended
		}
		for _, f := range strings.Fields(string(b)) {
			n, err := strconv.Atoi(f)
			if err != nil {
				t.Fatal(err)
			}
			pids = append(pids, n)
		}
	}
	return pids
}

// TestKeeperIsSmall prints the memory of a keeper with many entries.
func TestKeeperIsSmall(t *testing.T) {
	path := socketPath(t)
	cmd, _ := helper(t, os.Args[0], "serve", nil, path)
	c := connect(t, path)
	_, w := pipeFDs(t)
	defer unix.Close(w)
	for i := range 200 {
		if err := c.Put(t.Context(), fmt.Sprint("volume-", i), testMeta{N: i}, w, w); err != nil {
			t.Fatal(err)
		}
	}
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	var rss int
	for line := range strings.Lines(string(status)) {
		fmt.Sscanf(line, "VmRSS: %d kB", &rss)
	}
	t.Logf("resident memory with 200 entries: %d KiB", rss)
	if rss == 0 || rss > 64<<10 {
		t.Errorf("resident memory %d KiB, want at most 64 MiB", rss)
	}
}
