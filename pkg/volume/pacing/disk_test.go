package pacing

import (
	"os"
	"path/filepath"
	"testing"
	"time"
)

func TestReadUsage(t *testing.T) {
	dir := t.TempDir()
	file := func(name, content string) string {
		t.Helper()
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	stat := file("stat", "     100     0   2000   30   200   0   6000   70   3   1500   100   0   0   0   0   9   1\n")
	old := file("old", "100 0 2000 30 200 0 6000 70 3 1500 100\n") // kernels before 4.18
	self := file("io", "rchar: 1\nwchar: 2\nsyscr: 3\nsyscw: 4\nread_bytes: 4096\nwrite_bytes: 8192\ncancelled_write_bytes: 512\n")
	psi := file("psi", "some avg10=1.00 avg60=2.00 avg300=3.00 total=2500000\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=7\n")
	none := filepath.Join(dir, "none")
	short, words, no := file("short", "1 2 3\n"), file("words", "a b c d e f g h i j k\n"), file("no", "read_bytes: 1\n")
	badNumber := file("bad", "read_bytes: 1\nwrite_bytes: many\n")

	for _, c := range []struct {
		name            string
		stat, self, psi string
		want            usage // none: an error
	}{
		{"all", stat, self, psi, usage{8000 * 512, 12288, 2500 * time.Millisecond}},
		{"no pressure", stat, self, none, usage{8000 * 512, 12288, 1500 * time.Millisecond}},
		{"pressure of another kind", stat, self, words, usage{8000 * 512, 12288, 1500 * time.Millisecond}},
		{"old kernel", old, self, psi, usage{8000 * 512, 12288, 2500 * time.Millisecond}},
		{"no device", none, self, psi, usage{}},
		{"short", short, self, psi, usage{}},
		{"words", words, self, psi, usage{}},
		{"no account", stat, none, psi, usage{}},
		{"half an account", stat, no, psi, usage{}},
		{"no number", stat, badNumber, psi, usage{}},
	} {
		got, err := readUsage(c.stat, c.self, c.psi)
		if (err != nil) != (c.want == usage{}) || err == nil && got != c.want {
			t.Errorf("%s: %+v, %v; want %+v", c.name, got, err, c.want)
		}
	}
}

// TestThisDisk reads the machine's own files.
func TestThisDisk(t *testing.T) {
	if d := newDisk(filepath.Join(t.TempDir(), "none")); d.read != nil || d.crowded(time.Second) {
		t.Error("a directory that is not there has a disk")
	}
	d := newDisk(t.TempDir())
	if d.read == nil {
		t.Skip("the temporary directory is not on a block device with an account in /sys")
	}
	if u, err := d.read(); err != nil || u.device <= 0 {
		t.Errorf("%+v, %v", u, err)
	}
}
