package main

import (
	"context"
	"path/filepath"
	"strings"
	"testing"

	"k8s.io/klog/v2"

	"github.com/snapmerge/snapmerge/pkg/admin"
	"github.com/snapmerge/snapmerge/pkg/blockio"
	"github.com/snapmerge/snapmerge/pkg/volume"
	"github.com/snapmerge/snapmerge/test/cowgen"
	"github.com/snapmerge/snapmerge/test/machine"
)

// manyCommits is merged at 2 MiB/s with a commit every second.
var manyCommits = cowgen.Spec{Blocks: 8192, Ops: cowgen.Shift(0, 100, 1), Replaces: 6000}

// serveVolume runs the volumes of a node, one of them with a COW that is to be
// merged, and returns the socket for commands.
func serveVolume(t *testing.T) (socket string) {
	t.Helper()
	dir := t.TempDir()
	generate(t, dir, manyCommits)
	cfg := volume.ManagerConfig{FS: blockio.OS(), StateDir: t.TempDir(), Init: true, IO: blockio.Sync, MergeRate: 2, Log: klog.Background()}
	m, err := volume.OpenManager(t.Context(), cfg)
	check(t, err)
	check(t, m.Close())
	check(t, volume.Create(cfg.FS, filepath.Join(cfg.StateDir, "volumes", "v1"), volume.Spec{
		ID: "v1", Size: int64(manyCommits.Blocks) * 4096, Base: filepath.Join(dir, "base.img"), Paused: true,
		COWs: []volume.COWSource{{Path: filepath.Join(dir, "cow.img")}},
	}))
	m, err = volume.OpenManager(t.Context(), cfg)
	check(t, err)
	_, err = m.CreateVolume(t.Context(), volume.VolumeSpec{ID: "v2", Size: 1 << 20})
	check(t, err)
	socket = machine.SocketPath(t, "admin.sock")
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error)
	go func() { ended <- admin.Serve(ctx, socket, m) }()
	t.Cleanup(func() {
		cancel()
		check(t, <-ended)
		check(t, m.Close())
	})
	until(t, "answer", func() bool { return sm(t, "status", "--socket", socket).code == 0 })
	return socket
}

func TestStatus(t *testing.T) {
	socket := serveVolume(t)
	all := sm(t, "status", "--socket", socket, "--json").want(t, 0).objects(t)
	if len(all) != 2 || all[0]["id"] != "v1" || all[1]["id"] != "v2" {
		t.Fatalf("status of all: %v", all)
	}
	for _, o := range all {
		wantKeys(t, o, statusKeys...)
	}
	o := sm(t, "status", "v1", "--socket", socket, "--json").want(t, 0).object(t)
	if o["state"] != "paused" || o["percent"] != 0.0 || o["layers"] != 2.0 || o["bytes_total"] != 6100.0*4096 {
		t.Errorf("status %v", o)
	}
	table := sm(t, "status", "--socket", socket).want(t, 0).stdout
	if lines := strings.Split(table, "\n"); len(lines) != 4 || !strings.HasPrefix(lines[0], "VOLUME ") || !strings.HasPrefix(lines[1], "v1 ") {
		t.Errorf("table:\n%s", table)
	}
	sm(t, "status", "v3", "--socket", socket).want(t, 1, "v3", "no such volume")
}

func TestControl(t *testing.T) {
	socket := serveVolume(t)
	state := func() any {
		return sm(t, "status", "v1", "--socket", socket, "--json").want(t, 0).object(t)["state"]
	}
	if r := sm(t, "resume", "v1", "--socket", socket).want(t, 0); !strings.HasPrefix(r.stdout, "v1: ") {
		t.Errorf("resume says %q", r.stdout)
	}
	until(t, "some progress", func() bool {
		return sm(t, "status", "v1", "--socket", socket, "--json").want(t, 0).object(t)["percent"] != 0.0
	})
	o := sm(t, "pause", "v1", "--socket", socket, "--json").want(t, 0).object(t)
	wantKeys(t, o, statusKeys...)
	if state() != "paused" {
		t.Errorf("state %v after pause", state())
	}
	sm(t, "rate", "v1", "500", "--socket", socket).want(t, 0)
	sm(t, "resume", "v1", "--socket", socket).want(t, 0)
	until(t, "end of the merge", func() bool { return state() == "merged" })

	sm(t, "pause", "v3", "--socket", socket).want(t, 1, "no such volume")
	sm(t, "resume", "v3", "--socket", socket).want(t, 1, "no such volume")
	sm(t, "rate", "v3", "1", "--socket", socket).want(t, 1, "no such volume")
	sm(t, "rate", "v1", "fast", "--socket", socket).want(t, 2, "fast")
	sm(t, "rate", "v1", "--", "-1").want(t, 2, "-1")
	sm(t, "rate", "v1", "--socket", socket).want(t, 2, "2 arg")
	sm(t, "pause", "--socket", socket).want(t, 2, "1 arg")
	sm(t, "status", "v1", "v2", "--socket", socket).want(t, 2, "1 arg")
}

// TestWatch follows a merge to its end.
func TestWatch(t *testing.T) {
	socket := serveVolume(t)
	p := start(t, "status", "v1", "--watch", "--json", "--socket", socket)
	until(t, "first status", func() bool { return p.lastStatus().ID == "v1" })
	sm(t, "rate", "v1", "500", "--socket", socket).want(t, 0)
	sm(t, "resume", "v1", "--socket", socket).want(t, 0)
	until(t, "end of the merge", func() bool { return p.lastStatus().State == volume.Merged })
	p.end(0)
	for _, o := range p.wait().objects(t) {
		wantKeys(t, o, statusKeys...)
	}
}

func TestNoNodePlugin(t *testing.T) {
	socket := machine.SocketPath(t, "admin.sock")
	for _, args := range [][]string{{"status"}, {"status", "--watch"}, {"pause", "v"}, {"resume", "v"}, {"rate", "v", "1"}} {
		sm(t, append(args, "--socket", socket)...).want(t, 1, "no node plugin answers at "+socket)
	}
}
