package driver

import (
	"os"
	"path/filepath"
	"testing"
)

func TestMemoryLimit(t *testing.T) {
	const none = int64(defaultMemory)
	share := func(n int64) int64 { return int64(float64(n) * memoryShare) }
	for name, c := range map[string]struct {
		self  string
		files map[string]string // memory.max by group
		want  int64
	}{
		"no cgroup v2":                {"5:memory:/a\n", nil, none},
		"no limit":                    {"0::/a/b\n", map[string]string{"a": "max\n", "a/b": "max\n"}, none},
		"own limit":                   {"0::/a/b\n", map[string]string{"a": "max\n", "a/b": "1073741824\n"}, share(gib)},
		"a smaller one above":         {"0::/a/b\n", map[string]string{"a": "536870912\n", "a/b": "1073741824\n"}, share(512 * mib)},
		"that of a container":         {"0::/\n", map[string]string{".": "1073741824\n"}, share(gib)},
		"a name that leads out":       {"0::/../../etc\n", map[string]string{".": "1073741824\n"}, share(gib)},
		"nonsense is as if not there": {"0::/a\n", map[string]string{"a": "lots\n"}, none},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			self := filepath.Join(dir, "cgroup")
			if err := os.WriteFile(self, []byte(c.self), 0o600); err != nil {
				t.Fatal(err)
			}
			root := filepath.Join(dir, "fs")
			for group, text := range c.files {
				if err := os.MkdirAll(filepath.Join(root, group), 0o700); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(filepath.Join(root, group, "memory.max"), []byte(text), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			if got := memoryLimit(self, root); got != c.want {
				t.Errorf("%d, want %d", got, c.want)
			}
		})
	}
	if got := memoryLimit(filepath.Join(t.TempDir(), "none"), "/"); got != none {
		t.Errorf("without a file: %d", got)
	}
}
