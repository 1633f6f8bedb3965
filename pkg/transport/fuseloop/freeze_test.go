package fuseloop

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/snapmerge/snapmerge/test/machine"
)

// ioctlThaw is FITHAW of linux/fs.h.
const ioctlThaw = 0xc0045878

// TestAllDieInFreeze kills everybody who serves a device while its file system is
// being frozen, or is frozen. Nobody may be left waiting for it.
func TestAllDieInFreeze(t *testing.T) {
	for _, c := range []struct {
		name           string
		keeper, frozen bool
	}{
		{"keeper, while it syncs", true, false},
		{"keeper, while frozen", true, true},
		{"no keeper, while it syncs", false, false},
		{"no keeper, while frozen", false, true},
	} {
		t.Run(c.name, func(t *testing.T) { allDieInFreeze(t, c.keeper, c.frozen) })
	}
}

func allDieInFreeze(t *testing.T, withKeeper, frozen bool) {
	needRoot(t)
	image := imageFile(t, 64<<20)
	noLeftovers(t, filepath.Base(image))
	socket, freezer := "", (*process)(nil)
	if withKeeper {
		socket = machine.SocketPath(t, "keeper.sock")
		freezer = startKeeper(t, socket)
	}
	server := startHelper(t, "server", socket, image)
	dev := server.line(t, "ready")[0]
	killed := []*process{server}
	if withKeeper {
		killed = append(killed, freezer)
	} else {
		freezer = server
	}
	conn := connOf(t, server.cmd.Process.Pid)
	mkfsExt4(t, dev)
	dir := t.TempDir()
	if err := unix.Mount(dev, dir, "ext4", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if !t.Failed() {
			return
		}
		// Whatever waits for the device must end, and so must the test.
		if err := abortConn(conn); err != nil {
			t.Error(err)
		}
		if f, err := os.Open(dir); err == nil {
			unix.IoctlSetInt(int(f.Fd()), ioctlThaw, 0)
			f.Close()
		}
		unix.Unmount(dir, unix.MNT_DETACH)
	})
	if err := os.WriteFile(filepath.Join(dir, "dirty"), make([]byte, 4<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	if frozen {
		server.tell(t, "freeze "+dir)
		server.line(t, "frozen")
		server.tell(t, "hang")
		server.line(t, "hangs")
	} else {
		server.tell(t, "hang")
		server.line(t, "hangs")
		server.tell(t, "freeze "+dir)
	}
	child := 0
	eventually(t, "a child freezes", func() bool {
		pids := childrenOf(t, freezer.cmd.Process.Pid)
		if len(pids) == 1 {
			child = pids[0]
		}
		return child != 0 && (frozen || hasThreadIn(t, child, 'D'))
	})
	for _, p := range killed {
		p.cmd.Process.Signal(unix.SIGKILL) // before anybody waits for anybody
	}
	for _, p := range killed {
		p.kill(t)
	}
	eventually(t, "the child ends", func() bool {
		state, err := stateOf(fmt.Sprintf("/proc/%d/stat", child))
		return err != nil || state == 'Z' // whoever has it now may be late to reap it
	})
	written := make(chan error, 1)
	go func() {
		f, err := os.Create(filepath.Join(dir, "late"))
		if err == nil {
			err = errors.Join(f.Sync(), f.Close())
		}
		written <- err
	}()
	select {
	case err := <-written:
		if err == nil {
			t.Error("a file can be synced though its device is dead")
		}
	case <-within(t, patience).Done():
		t.Fatal("still frozen though all are dead")
	}
	// Of the child's threads the first may be gone before those that hold the
	// directory.
	eventually(t, "unmount", func() bool { return unix.Unmount(dir, 0) == nil })
	// A new pair can serve the volume.
	if withKeeper {
		startKeeper(t, socket)
	}
	server = startHelper(t, "server", socket, image)
	server.line(t, "ready")
	server.finish(t)
}

// connOf is the number of the connection that the process has a mount of.
func connOf(t *testing.T, pid int) uint32 {
	t.Helper()
	fds, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	if err != nil {
		t.Fatal(err)
	}
	for _, fd := range fds {
		var fs unix.Statfs_t
		var st unix.Stat_t
		if unix.Statfs(fd, &fs) == nil && fs.Type == unix.FUSE_SUPER_MAGIC && unix.Stat(fd, &st) == nil {
			return unix.Minor(st.Dev)
		}
	}
	t.Fatal("the process has no mount of a FUSE file system")
	return 0
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

// hasThreadIn tells whether the process has a thread in the state.
func hasThreadIn(t *testing.T, pid int, state byte) bool {
	t.Helper()
	stats, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", pid))
	if err != nil {
		t.Fatal(err)
	}
	for _, stat := range stats {
		if s, err := stateOf(stat); err == nil && s == state {
			return true
		}
	}
	return false
}

// stateOf is the third field of a stat file of proc(5).
func stateOf(path string) (byte, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	_, rest, ok := strings.Cut(string(b), ") ")
	if !ok || rest == "" {
		return 0, fmt.Errorf("%s: %q", path, b)
	}
	return rest[0], nil
}
