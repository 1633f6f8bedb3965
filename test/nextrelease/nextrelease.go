// Package nextrelease builds snapmerge as it is and as the next release may be: with
// volume records of a newer format.
package nextrelease

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// Dir is the environment variable that names a directory in which the programs are
// already; This and Next are their names there.
const (
	Dir  = "SNAPMERGE_RELEASES"
	This = "snapmerge-this"
	Next = "snapmerge-next"
)

// changes make pkg/volume/record.go that of the next release: its records have a newer
// format, and a field more.
var changes = [][2]string{
	{"newestFormat = nativeFormat\n", "newestFormat = nativeFormat + 1\n"},
	{"type Record struct {\n", "type Record struct {\n\tUpgraded bool `json:\"upgraded\"`\n"},
	{"format() int {\n", "format() int {\n\tr.Upgraded = true\n\treturn newestFormat\n"},
}

// Build builds both programs in dir. It skips the test without a Go toolchain.
func Build(t testing.TB, dir string) {
	t.Helper()
	if _, err := exec.LookPath("go"); err != nil {
		t.Skipf("builds two releases: %v", err)
	}
	out, err := exec.Command("go", "list", "-f", "{{.Dir}}/record.go", "github.com/snapmerge/snapmerge/pkg/volume").Output()
	if err != nil {
		t.Fatal(err)
	}
	source := strings.TrimSpace(string(out))
	b, err := os.ReadFile(source)
	if err != nil {
		t.Fatal(err)
	}
	text := string(b)
	for _, c := range changes {
		if strings.Count(text, c[0]) != 1 {
			t.Fatalf("%s does not have %q once", source, c[0])
		}
		text = strings.Replace(text, c[0], c[1], 1)
	}
	work := t.TempDir()
	changed, overlay := filepath.Join(work, "record.go"), filepath.Join(work, "overlay.json")
	if b, err = json.Marshal(map[string]map[string]string{"Replace": {source: changed}}); err != nil {
		t.Fatal(err)
	}
	for name, data := range map[string][]byte{changed: []byte(text), overlay: b} {
		if err := os.WriteFile(name, data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, args := range [][]string{{"-o", filepath.Join(dir, This)}, {"-o", filepath.Join(dir, Next), "-overlay", overlay}} {
		args = append(append([]string{"build", "-trimpath", "-ldflags=-s -w"}, args...), "github.com/snapmerge/snapmerge/cmd/snapmerge")
		c := exec.Command("go", args...)
		c.Env = append(os.Environ(), "CGO_ENABLED=0")
		if msg, err := c.CombinedOutput(); err != nil {
			t.Fatalf("%v: %v: %s", c.Args, err, msg)
		}
	}
}
