package demo

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"
)

// TestCopyRealFiles: enough files are found on any machine, be the first ones
// large, or all of them few and small.
func TestCopyRealFiles(t *testing.T) {
	const limit = MinSize * 2 / 5
	for name, c := range map[string]struct{ large, small int }{
		"many large ones first":  {40, 2000},
		"few small ones":         {0, fewestFiles},
		"large ones, few others": {40, fewestFiles},
	} {
		t.Run(name, func(t *testing.T) {
			root, dir := t.TempDir(), t.TempDir()
			put := func(name string, size int64) {
				t.Helper()
				path := filepath.Join(root, name)
				if err := os.WriteFile(path, nil, 0o600); err != nil {
					t.Fatal(err)
				}
				if err := os.Truncate(path, size); err != nil {
					t.Fatal(err)
				}
			}
			for i := range c.large {
				put(fmt.Sprintf("a%05d", i), limit/20)
			}
			for i := range c.small {
				put(fmt.Sprintf("b%05d", i), 1<<10)
			}
			files, err := copyRealFiles(t.Context(), root, dir, limit)
			if err != nil {
				t.Fatal(err)
			}
			var total int64
			for _, f := range files {
				total += f.size
			}
			if len(files) < fewestFiles || len(files) > wantFiles || total > limit {
				t.Errorf("%d files of %d bytes", len(files), total)
			}
			if err := verify(t.Context(), dir, files); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestRing: a ring does not get larger than it was said to, and knows what it holds.
func TestRing(t *testing.T) {
	const pieces = 3
	dir := t.TempDir()
	w, err := createRing(dir, "ring", pieces*ringPiece)
	if err != nil {
		t.Fatal(err)
	}
	defer w.f.Close()
	for n := range int64(2*pieces + 2) {
		f := w.file()
		if want := min(n, pieces) * ringPiece; f.size != want {
			t.Errorf("%d bytes after %d writes, want %d", f.size, n, want)
		}
		if err := verify(t.Context(), dir, []file{f}); err != nil {
			t.Errorf("after %d writes: %v", n, err)
		}
		if err := w.write(); err != nil {
			t.Fatal(err)
		}
	}
}
