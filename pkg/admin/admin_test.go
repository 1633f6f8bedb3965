package admin

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	"k8s.io/klog/v2"

	"github.com/snapmerge/snapmerge/pkg/blockio"
	"github.com/snapmerge/snapmerge/pkg/volume"
	"github.com/snapmerge/snapmerge/test/machine"
)

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// node is a manager with some blank volumes, served at a socket.
func node(t *testing.T, volumes ...string) (*Client, *volume.Manager, string) {
	t.Helper()
	m, err := volume.OpenManager(t.Context(), volume.ManagerConfig{FS: blockio.OS(), StateDir: t.TempDir(), Init: true, IO: blockio.Sync, Log: klog.Background()})
	check(t, err)
	for _, id := range volumes {
		_, err := m.CreateVolume(t.Context(), volume.VolumeSpec{ID: id, Size: 1 << 20})
		check(t, err)
	}
	socket := machine.SocketPath(t, "run/admin.sock")
	serve(t, socket, m)
	t.Cleanup(func() { check(t, m.Close()) })
	return NewClient(socket), m, socket
}

// serve serves until the test ends or stop is called, and waits until there is
// a socket.
func serve(t *testing.T, socket string, m *volume.Manager) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- Serve(ctx, socket, m) }()
	ended := false
	stop = func() {
		if ended {
			return
		}
		ended = true
		cancel()
		if err := <-done; err != nil {
			t.Errorf("server ended with %v", err)
		}
	}
	t.Cleanup(stop)
	for {
		c, err := net.Dial("unix", socket)
		if err == nil {
			c.Close()
			return stop
		}
		select {
		case err := <-done:
			t.Fatalf("server: %v", err)
		case <-t.Context().Done():
			t.Fatal("no server")
		case <-time.After(time.Millisecond):
		}
	}
}

func TestStatus(t *testing.T) {
	c, m, _ := node(t, "b", "a")
	all, err := c.List(t.Context())
	check(t, err)
	if len(all) != 2 || all[0].ID != "a" || all[1].ID != "b" || all[0].State != volume.Unstaged || all[0].Size != 1<<20 {
		t.Errorf("list is %+v", all)
	}
	one, err := c.Get(t.Context(), "b")
	check(t, err)
	if want, _ := m.Status("b"); one != want {
		t.Errorf("status is %+v, want %+v", one, want)
	}
	check(t, m.DeleteVolume("a"))
	check(t, m.DeleteVolume("b"))
	if all, err := c.List(t.Context()); err != nil || len(all) != 0 {
		t.Errorf("list of no volumes is %+v, %v", all, err)
	}
}

func TestControl(t *testing.T) {
	c, m, _ := node(t, "v")
	record := func() *volume.Record {
		v, err := m.Get("v")
		check(t, err)
		return v.Record()
	}
	for _, paused := range []bool{true, false} {
		s, err := c.SetPaused(t.Context(), "v", paused)
		check(t, err)
		if s.ID != "v" || record().Paused != paused {
			t.Errorf("paused %v: status %+v, record %v", paused, s, record().Paused)
		}
	}
	for _, mib := range []int{50, 0, MaxRate} {
		s, err := c.SetRate(t.Context(), "v", mib)
		check(t, err)
		if s.ID != "v" || record().Rate != mib {
			t.Errorf("rate %d: status %+v, record %d", mib, s, record().Rate)
		}
	}
	for _, mib := range []int{-1, MaxRate + 1} {
		if _, err := c.SetRate(t.Context(), "v", mib); err == nil || record().Rate != MaxRate {
			t.Errorf("rate %d: %v, record %d", mib, err, record().Rate)
		}
	}
}

func TestNotFound(t *testing.T) {
	c, _, _ := node(t, "v")
	for _, id := range []string{"w", "../v", "v/paused", "", ".", "..", "%", "a b"} {
		_, err := c.Get(t.Context(), id)
		if !errors.Is(err, volume.ErrNotFound) {
			t.Errorf("status of %q: %v", id, err)
		}
		_, err = c.SetPaused(t.Context(), id, true)
		if !errors.Is(err, volume.ErrNotFound) {
			t.Errorf("pause of %q: %v", id, err)
		}
		_, err = c.SetRate(t.Context(), id, 1)
		if !errors.Is(err, volume.ErrNotFound) {
			t.Errorf("rate of %q: %v", id, err)
		}
	}
}

// TestBadRequests sends what the client would not.
func TestBadRequests(t *testing.T) {
	c, m, _ := node(t, "v")
	for _, r := range []struct {
		method, path, body string
		code               int
	}{
		{"PUT", "/volumes/v/paused", ``, 400},
		{"PUT", "/volumes/v/paused", `{}`, 400},
		{"PUT", "/volumes/v/paused", `{"paused":1}`, 400},
		{"PUT", "/volumes/v/paused", `{"paused":true,"rate":1}`, 400},
		{"PUT", "/volumes/v/paused", `{"paused":true` + strings.Repeat(" ", maxBody), 400},
		{"PUT", "/volumes/v/rate", `{"mib_s":1.5}`, 400},
		{"PUT", "/volumes/v/rate", `{}`, 400},
		{"POST", "/volumes/v/rate", `{"mib_s":1}`, 405},
		{"DELETE", "/volumes/v", ``, 405},
		{"GET", "/", ``, 404},
	} {
		req, err := http.NewRequestWithContext(t.Context(), r.method, "http://node"+r.path, strings.NewReader(r.body))
		check(t, err)
		resp, err := c.http.Do(req)
		check(t, err)
		body, err := io.ReadAll(resp.Body)
		check(t, err)
		resp.Body.Close()
		if resp.StatusCode != r.code {
			t.Errorf("%s %s %.40s: %s %s", r.method, r.path, r.body, resp.Status, body)
		}
		var e errorReply
		if r.code == 400 && (json.Unmarshal(body, &e) != nil || e.Error == "") {
			t.Errorf("%s %s %.40s: no error in %q", r.method, r.path, r.body, body)
		}
	}
	v, err := m.Get("v")
	check(t, err)
	if rec := v.Record(); rec.Paused || rec.Rate != 0 {
		t.Errorf("record has changed: %+v", rec)
	}
}

func TestSocket(t *testing.T) {
	c, m, socket := node(t, "v")
	st, err := os.Stat(socket)
	check(t, err)
	if st.Mode().Perm() != 0o600 {
		t.Errorf("mode of the socket is %v", st.Mode())
	}
	// A living server is not replaced.
	if err := Serve(t.Context(), socket, m); err == nil || !strings.Contains(err.Error(), "another process") {
		t.Errorf("second server: %v", err)
	}
	_, err = c.List(t.Context())
	check(t, err)

	// What a dead one has left is.
	other := machine.SocketPath(t, "admin.sock")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: other, Net: "unix"})
	check(t, err)
	l.SetUnlinkOnClose(false)
	check(t, l.Close())
	stop := serve(t, other, m)
	_, err = NewClient(other).List(t.Context())
	check(t, err)
	stop()
	if _, err := NewClient(other).List(t.Context()); err == nil || !strings.Contains(err.Error(), other) {
		t.Errorf("without a server: %v", err)
	}
}

// TestInterrupted: the end of a context is told from a plugin that is away.
func TestInterrupted(t *testing.T) {
	socket := machine.SocketPath(t, "s")
	l, err := net.Listen("unix", socket)
	check(t, err)
	defer l.Close() // nobody answers
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		if c, err := l.Accept(); err == nil {
			cancel()
			<-t.Context().Done()
			c.Close()
		}
	}()
	if _, err := NewClient(socket).List(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
}
