package main

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/snapmerge/snapmerge/test/machine"
)

// TestDemo runs the demo to its end. It checks itself; what is left to see here
// is that it says so and leaves other people's files alone.
func TestDemo(t *testing.T) {
	needFUSE(t)
	if testing.Short() {
		t.Skip("takes 15 s")
	}
	dir := machine.SocketDir(t)
	precious := filepath.Join(dir, "precious")
	check(t, os.WriteFile(precious, []byte("precious"), 0o600))
	r := start(t, "demo", "--size", "64MiB", "--dir", dir).wait().want(t, 0) // the least that it takes
	for _, text := range []string{"checksums are right", "no error, the longest waited", "an ordinary image again", "Clean:"} {
		if !strings.Contains(r.stdout, text) {
			t.Errorf("the demo does not say %q:\n%s", text, r.stdout)
		}
	}
	start(t, "demo", "--size", "1024GiB", "--dir", dir).wait().want(t, 1, "free")
	deep := filepath.Join(t.TempDir(), strings.Repeat("deep/", 20))
	check(t, os.MkdirAll(deep, 0o700))
	start(t, "demo", "--size", "256MiB", "--dir", deep).wait().want(t, 1, deep, "too long")
	names, err := os.ReadDir(dir)
	check(t, err)
	if len(names) != 1 || names[0].Name() != "precious" {
		t.Errorf("the directory has now %v", names)
	}
}

// TestDemoInterrupted: an interrupt leaves nothing behind either, be it in the middle
// of a call or under load, and nothing else is said to be wrong.
func TestDemoInterrupted(t *testing.T) {
	needFUSE(t)
	if testing.Short() {
		t.Skip("takes 10 s")
	}
	dir := machine.SocketDir(t)
	for _, title := range []string{"2. A volume", "7. kill -9"} {
		p := start(t, "demo", "--size", "64MiB", "--dir", dir)
		until(t, title, func() bool { return strings.Contains(strings.Join(p.lines(), ""), title) })
		p.signal(syscall.SIGTERM)
		equal(t, "stderr", p.wait().want(t, 5).stderr, "snapmerge: interrupted\n")
		if names, err := os.ReadDir(dir); err != nil || len(names) > 0 {
			t.Errorf("the directory has now %v %v", names, err)
		}
	}
}
