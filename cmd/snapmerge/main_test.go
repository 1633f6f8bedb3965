package main

import (
	"bytes"
	"context"
	"encoding/json"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/snapmerge/snapmerge/pkg/exitcode"
)

// asCommand makes the test binary behave as the command.
const asCommand = "SNAPMERGE_TEST_AS_COMMAND"

func TestMain(m *testing.M) {
	prepareChild()
	if os.Getenv(asCommand) != "" {
		main()
	}
	os.Exit(m.Run())
}

// result is how a command line ended.
type result struct {
	code           int
	stdout, stderr string
}

// sm runs a command line in this process.
func sm(t testing.TB, args ...string) result {
	t.Helper()
	var out, err bytes.Buffer
	code := run(t.Context(), args, &out, &err)
	return result{code, out.String(), err.String()}
}

// want fails the test unless the command line ended with the code, and with one
// line on stderr that holds the text if that code is not 0.
func (r result) want(t testing.TB, code int, text ...string) result {
	t.Helper()
	if r.code != code {
		t.Fatalf("exit code %d, want %d\nstdout: %s\nstderr: %s", r.code, code, r.stdout, r.stderr)
	}
	if code == exitcode.Done {
		if r.stderr != "" {
			t.Errorf("stderr of a success: %q", r.stderr)
		}
		return r
	}
	if !strings.HasPrefix(r.stderr, "snapmerge: ") || strings.Count(r.stderr, "\n") != 1 || !strings.HasSuffix(r.stderr, "\n") {
		t.Errorf("stderr is not one line that starts with %q: %q", "snapmerge: ", r.stderr)
	}
	for _, s := range text {
		if !strings.Contains(r.stderr, s) {
			t.Errorf("stderr %q lacks %q", r.stderr, s)
		}
	}
	return r
}

// object parses stdout as one JSON object.
func (r result) object(t testing.TB) map[string]any {
	t.Helper()
	list := r.objects(t)
	if len(list) != 1 {
		t.Fatalf("%d objects on stdout, want 1: %q", len(list), r.stdout)
	}
	return list[0]
}

// objects parses stdout as JSON objects, one a line.
func (r result) objects(t testing.TB) []map[string]any {
	t.Helper()
	var list []map[string]any
	for line := range strings.Lines(r.stdout) {
		var o map[string]any
		if err := json.Unmarshal([]byte(line), &o); err != nil {
			t.Fatalf("line %q is not a JSON object: %v", line, err)
		}
		list = append(list, o)
	}
	return list
}

// wantKeys checks that the object has all the keys.
func wantKeys(t testing.TB, o map[string]any, keys ...string) {
	t.Helper()
	for _, k := range keys {
		if _, ok := o[k]; !ok {
			t.Errorf("key %q is missing; there are %q", k, slices.Sorted(maps.Keys(o)))
		}
	}
}

// process is a command line that runs in a process of its own.
type process struct {
	t    testing.TB
	cmd  *exec.Cmd
	done chan struct{}

	mu       sync.Mutex // of what it has written
	out, err bytes.Buffer
}

// locked is a buffer that is written under a lock.
type locked struct {
	mu *sync.Mutex
	b  *bytes.Buffer
}

func (l locked) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

// start starts the command in a process, which ends with the test.
func start(t testing.TB, args ...string) *process {
	t.Helper()
	p := newProcess(t, args...)
	p.start()
	return p
}

// newProcess is a process that is not started yet.
func newProcess(t testing.TB, args ...string) *process {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	p := &process{t: t, cmd: exec.Command(exe, args...), done: make(chan struct{})}
	p.cmd.Env = append(os.Environ(), asCommand+"=1")
	p.cmd.Stdout, p.cmd.Stderr = locked{&p.mu, &p.out}, locked{&p.mu, &p.err}
	return p
}

// unread is a pipe that nobody reads.
func unread(t testing.TB) *os.File {
	t.Helper()
	r, w, err := os.Pipe()
	check(t, err)
	check(t, r.Close())
	t.Cleanup(func() { w.Close() })
	return w
}

func (p *process) start() {
	p.t.Helper()
	check(p.t, p.cmd.Start())
	go func() {
		_ = p.cmd.Wait()
		close(p.done)
	}()
	p.t.Cleanup(func() {
		_ = p.cmd.Process.Signal(syscall.SIGTERM) // so that it takes its device with it
		select {
		case <-p.done:
		case <-time.After(30 * time.Second):
			_ = p.cmd.Process.Kill()
			<-p.done
		}
	})
}

func (p *process) signal(s syscall.Signal) {
	p.t.Helper()
	if err := p.cmd.Process.Signal(s); err != nil {
		p.t.Fatal(err)
	}
}

// patience is how long anything may take before a test gives up.
const patience = 5 * time.Minute

// wait waits for the end.
func (p *process) wait() result {
	p.t.Helper()
	select {
	case <-p.done:
	case <-time.After(patience):
		p.t.Fatalf("%v does not end", p.cmd.Args)
	}
	return result{p.cmd.ProcessState.ExitCode(), p.out.String(), logLine.ReplaceAllString(p.err.String(), "")}
}

// logLine is a line of the log, as text or JSON.
var logLine = regexp.MustCompile(`(?m)^([IWE]\d{4} .*|\{"time":.*)\n`)

// until waits until ok, and fails the test if that takes too long.
func until(t testing.TB, what string, ok func() bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	for tick := time.NewTicker(10 * time.Millisecond); ; {
		if ok() {
			return
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			t.Fatalf("no %s after %v", what, patience)
		}
	}
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// put writes a file into the directory and returns its path.
func put(t testing.TB, dir, name string, content []byte) string {
	t.Helper()
	path := filepath.Join(dir, name)
	check(t, os.WriteFile(path, content, 0o600))
	return path
}

func get(t testing.TB, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	check(t, err)
	return b
}

// wantSame compares images.
func wantSame(t testing.TB, what string, got, want []byte) {
	t.Helper()
	if len(got) != len(want) {
		t.Errorf("%s has %d bytes, want %d", what, len(got), len(want))
		return
	}
	for i := range got {
		if got[i] != want[i] {
			t.Errorf("%s differs from byte %d on (block %d)", what, i, i/4096)
			return
		}
	}
}
