// Package layering keeps the shape of the module: which package may import
// which, how large a file may get, what a package may not be called.
package layering

import (
	"bufio"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/snapmerge/snapmerge/"

// tiers lists the packages from the bottom up. A package imports only packages
// of lower tiers.
var tiers = [][]string{
	{"pkg/unixsocket", "pkg/devmapper", "pkg/localnode"},
	{"pkg/cow", "pkg/uring", "pkg/progress", "pkg/keeper", "pkg/transport", "pkg/tracing"},
	{"pkg/blockio", "pkg/transport/handover", "pkg/transport/dmuser", "pkg/transport/fuseloop", "pkg/transport/nbd", "pkg/transport/ublk"},
	{"pkg/transport/choose", "pkg/blockio/crashfs", "pkg/merge", "pkg/readahead", "pkg/volume/writelog", "pkg/volume/pacing", "pkg/snapshot"},
	{"pkg/volume", "pkg/offline"},
	{"pkg/health", "pkg/metrics", "pkg/admin", "pkg/attach", "pkg/probe", "pkg/bench"},
	{"pkg/kube"},
	{"pkg/driver"},
	{"pkg/demo", "pkg/exitcode", "pkg/forget", "pkg/nodebench"},
	{"cmd/snapmerge"},
}

type listed struct {
	ImportPath, Dir string
	Imports         []string
	GoFiles         []string
}

func packages(t *testing.T) []listed {
	t.Helper()
	cmd := exec.Command("go", "list", "-json=ImportPath,Dir,Imports,GoFiles", module+"...")
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	var all []listed
	for d := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p listed
		err := d.Decode(&p)
		if errors.Is(err, io.EOF) {
			return all
		}
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, p)
	}
}

func tier(name string) int {
	return slices.IndexFunc(tiers, func(names []string) bool { return slices.Contains(names, name) })
}

func TestImports(t *testing.T) {
	for _, p := range packages(t) {
		name := strings.TrimPrefix(p.ImportPath, module)
		if strings.HasPrefix(name, "test/") {
			continue
		}
		own := tier(name)
		if own < 0 {
			t.Errorf("%s has no tier", name)
			continue
		}
		for _, imp := range p.Imports {
			dep, ours := strings.CutPrefix(imp, module)
			if ours && tier(dep) >= own {
				t.Errorf("%s imports %s, which is not below it", name, dep)
			}
		}
		for _, bad := range []string{"util", "utils", "common", "helper", "helpers", "types", "misc"} {
			if filepath.Base(name) == bad {
				t.Errorf("%s says nothing about what is in it", name)
			}
		}
	}
}

// maxLines bounds a file: one subject.
const maxLines = 600

func TestFileSize(t *testing.T) {
	for _, p := range packages(t) {
		for _, name := range p.GoFiles {
			f, err := os.Open(filepath.Join(p.Dir, name))
			if err != nil {
				t.Fatal(err)
			}
			n := 0
			for s := bufio.NewScanner(f); s.Scan(); {
				n++
			}
			f.Close()
			if n > maxLines {
				t.Errorf("%s/%s has %d lines", p.ImportPath, name, n)
			}
		}
	}
}

// TestDependencies wants a reason beside every direct dependency.
func TestDependencies(t *testing.T) {
	b, err := os.ReadFile("../../go.mod")
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(string(b), "\n")
	for _, line := range lines {
		line = strings.TrimSpace(line)
		if !strings.Contains(line, ".") || !strings.Contains(line, " v") || strings.Contains(line, "// indirect") {
			continue
		}
		if !strings.Contains(line, "//") {
			t.Errorf("go.mod does not say why: %s", line)
		}
	}
}
