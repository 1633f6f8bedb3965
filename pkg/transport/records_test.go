package transport

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestRecords(t *testing.T) {
	r := Records{filepath.Join(t.TempDir(), "a", "b")}
	if recs, err := r.List(); len(recs) != 0 || err != nil {
		t.Errorf("no directory: %v, %v", recs, err)
	}
	if _, err := r.Get("v"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no record: %v", err)
	}
	if err := errors.Join(r.Drop("v"), r.Put("v", 1), r.Put("v", 5), r.Put("w/../x", 6)); err != nil {
		t.Fatal(err)
	}
	if tag, err := r.Get("v"); tag != 5 || err != nil {
		t.Errorf("tag %d, %v", tag, err)
	}
	if recs, err := r.List(); len(recs) != 2 || err != nil {
		t.Errorf("%v, %v", recs, err)
	}
	for _, bad := range []string{"", "{", `{"version":2,"volume":"v","tag":5}`, `{"version":1,"volume":"v"}`, `{"version":1,"tag":5}`} {
		if err := os.WriteFile(r.path("v"), []byte(bad), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := r.Get("v"); err == nil || !strings.Contains(err.Error(), r.path("v")) {
			t.Errorf("%q: %v", bad, err)
		}
		if recs, err := r.List(); len(recs) != 1 || err == nil {
			t.Errorf("%q: %v, %v", bad, recs, err)
		}
	}
	if err := os.Rename(r.path("w/../x"), r.path("v")); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Get("v"); err == nil {
		t.Error("took another volume's record")
	}
	if err := r.Drop("v"); err != nil {
		t.Error(err)
	}
	if a, b := NewTag(), NewTag(); a == b || a == 0 {
		t.Errorf("tags %x, %x", a, b)
	}
}
