package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/snapmerge/snapmerge/test/machine"
)

// nodeArgs are the flags of a node plugin and its keeper, all in dir.
func nodeArgs(t testing.TB, dir string) (keeper, node []string) {
	check(t, os.Mkdir(filepath.Join(dir, "state"), 0o700))
	keeper = []string{"keeper", "--socket", filepath.Join(dir, "run", "keeper.sock")}
	node = []string{"node", "--endpoint", "unix://" + filepath.Join(dir, "csi.sock"), "--node-id", "n1", "--state-dir", filepath.Join(dir, "state"),
		"--keeper", filepath.Join(dir, "run", "keeper.sock"), "--admin-socket", filepath.Join(dir, "run", "admin.sock")}
	return keeper, node
}

// TestNode runs keeper and node plugin as they are run in a pod.
func TestNode(t *testing.T) {
	needFUSE(t)
	dir := machine.SocketDir(t)
	keeperArgs, nodeArgs := nodeArgs(t, dir)
	keeper := start(t, append(keeperArgs, "--log-format", "json")...)
	start(t, nodeArgs...).wait().want(t, 1, "state", "--init")
	node := start(t, append(nodeArgs, "--init", "--log-format", "json", "-v", "4")...)
	socket := filepath.Join(dir, "run", "admin.sock")
	until(t, "answer", func() bool { return sm(t, "status", "--socket", socket).code == 0 })

	second := start(t, nodeArgs...)
	node.signal(syscall.SIGTERM)
	node.wait().want(t, 0)
	// The one that was waiting takes over.
	until(t, "answer of the next one", func() bool { return sm(t, "status", "--socket", socket).code == 0 })
	second.signal(syscall.SIGINT)
	second.wait().want(t, 0)
	keeper.signal(syscall.SIGTERM)
	keeper.wait().want(t, 0)

	for name, p := range map[string]*process{"keeper": keeper, "node": node} {
		log := strings.TrimSpace(p.err.String())
		if log == "" {
			t.Errorf("%s has logged nothing", name)
		}
		for line := range strings.Lines(log) {
			var o map[string]any
			if err := json.Unmarshal([]byte(line), &o); err != nil {
				t.Errorf("%s logs %q, which is not JSON: %v", name, line, err)
				continue
			}
			wantKeys(t, o, "time", "level", "msg")
		}
	}
}

// TestLogUnread: keeper and node plugin serve on when nobody reads their log.
func TestLogUnread(t *testing.T) {
	needFUSE(t)
	dir := machine.SocketDir(t)
	keeperArgs, nodeArgs := nodeArgs(t, dir)
	keeper, node := newProcess(t, keeperArgs...), newProcess(t, append(nodeArgs, "--init")...)
	for _, p := range []*process{keeper, node} {
		p.cmd.Stderr = unread(t)
		p.start()
	}
	until(t, "answer", func() bool {
		select {
		case <-keeper.done:
		case <-node.done:
		default:
			return sm(t, "status", "--socket", filepath.Join(dir, "run", "admin.sock")).code == 0
		}
		t.Fatal("one of them has ended")
		return false
	})
	node.end(0)
	keeper.end(0)
}

func TestNodeUsage(t *testing.T) {
	dir := machine.SocketDir(t)
	_, args := nodeArgs(t, dir)
	sm(t, "node").want(t, 2, "endpoint", "node-id", "state-dir")
	sm(t, append(args, "--endpoint", "tcp://host:1")...).want(t, 2, "tcp://host:1")
	sm(t, append(args, "--node-id", "")...).want(t, 2, "node id")
	sm(t, append(args, "--metrics-addr", "foo")...).want(t, 2, "foo")
	sm(t, append(args, "--kubelet-dir", "kubelet")...).want(t, 2, "kubelet")
	sm(t, append(args, "--merge-rate", "-5")...).want(t, 2, "-5")
	sm(t, append(args, "--merge-concurrency", "-5")...).want(t, 2)
	sm(t, append(args, "--state-dir", filepath.Join(dir, "none"))...).want(t, 1, "none")
	sm(t, "keeper", "now").want(t, 2, "now")
	sm(t, "keeper", "--socket", "").want(t, 2, "--socket")
}

func TestSecondKeeper(t *testing.T) {
	socket := machine.SocketPath(t, "keeper.sock")
	first := start(t, "keeper", "--socket", socket)
	until(t, "socket", func() bool {
		_, err := os.Stat(socket)
		return err == nil
	})
	start(t, "keeper", "--socket", socket).wait().want(t, 1, "another keeper")
	first.end(0)
}

func TestProbe(t *testing.T) {
	o := sm(t, "probe", "--json", "--state-dir", t.TempDir()).want(t, 0).object(t)
	wantKeys(t, o, "transports", "io_uring", "reflink", "device_mapper", "hand_over", "loop", "cap_sys_resource")
	for _, name := range []string{"fuse", "ublk", "dm-user", "nbd"} {
		tr, ok := o["transports"].(map[string]any)[name].(map[string]any)
		if !ok {
			t.Fatalf("no transport %s in %v", name, o)
		}
		if works := tr["ok"].(bool); works == (tr["why"] != nil) {
			t.Errorf("%s: %v", name, tr)
		}
	}
	if text := sm(t, "probe").want(t, 0).stdout; !strings.Contains(text, "transport fuse") {
		t.Errorf("%s", text)
	}
}
