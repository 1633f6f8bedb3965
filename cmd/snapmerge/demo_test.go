package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestDemo runs the demo to its end. It checks itself; what is left to see here
// is that it says so and leaves other people's files alone.
func TestDemo(t *testing.T) {
	needFUSE(t)
	if testing.Short() {
		t.Skip("takes 15 s")
	}
	dir := t.TempDir()
	precious := filepath.Join(dir, "precious")
	check(t, os.WriteFile(precious, []byte("precious"), 0o600))
	r := start(t, "demo", "--size", "256MiB", "--dir", dir).wait().want(t, 0)
	for _, text := range []string{"checksums are right", "no error, the longest waited", "an ordinary image again", "Clean:"} {
		if !strings.Contains(r.stdout, text) {
			t.Errorf("the demo does not say %q:\n%s", text, r.stdout)
		}
	}
	start(t, "demo", "--size", "1024GiB", "--dir", dir).wait().want(t, 1, "free")
	names, err := os.ReadDir(dir)
	check(t, err)
	if len(names) != 1 || names[0].Name() != "precious" {
		t.Errorf("the directory has now %v", names)
	}
}
