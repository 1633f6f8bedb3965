package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/spf13/cobra"
)

func TestWrongUsage(t *testing.T) {
	dir := t.TempDir()
	a, b := put(t, dir, "a", nil), put(t, dir, "b", nil)
	merge := []string{"merge", "--base", a, "--cow", b}
	for _, c := range []struct {
		args []string
		text string
	}{
		{nil, "command is missing"},
		{[]string{"cow"}, "command is missing"},
		{[]string{"restore-everything"}, "unknown command"},
		{[]string{"restore-everything", "--help"}, "unknown command"},
		{[]string{"cow", "destroy"}, "unknown command"},
		{[]string{"--loud"}, "--loud"},
		{[]string{"version", "now"}, "now"},
		{[]string{"version", "--log-format", "xml"}, "json"},
		{[]string{"version", "-v", "much"}, "much"},
		{[]string{"cow", "inspect"}, "1 arg"},
		{[]string{"cow", "inspect", a, b}, "1 arg"},
		{[]string{"cow", "inspect", "--label", "-1", a}, "-1"},
		{[]string{"cow", "verify", a, "--base", b}, "target"},
		{[]string{"cow", "verify", a, "--target", b}, "base"},
		{[]string{"cow", "extract", "--cow", a}, "out"},
		{[]string{"merge", "--cow", b, "--in-place"}, "base"},
		{[]string{"merge", "--base", a, "--in-place"}, "cow"},
		{merge, "in-place journal"},
		{append(merge, "--in-place", "--journal", "j"), "in-place journal"},
		{append(merge, "--in-place", "--window", "1MiB"), "in-place window"},
		{append(merge, "--journal", ""), "--journal"},
		{append(merge, "--journal", b), "--cow and --journal are the same file"},
		{[]string{"merge", "--base", a, "--cow", filepath.Join(dir, ".", "a"), "--in-place"}, "--base and --cow are the same file"},
		{append(merge, "--journal", "j", "--window", "5000"), "5000"},
		{append(merge, "--journal", "j", "--window", "0"), "--window 0"},
		{append(merge, "--journal", "j", "--window", "2GiB"), "--window"},
		{append(merge, "--journal", "j", "--window", "1,5MiB"), "not a size"},
		{append(merge, "--journal", "j", "--window", "-4KiB"), "not a size"},
		{append(merge, "--journal", "j", "--window", "big"), "not a size"},
		{append(merge, "--journal", "j", "--window", "9000000TiB"), "not a size"},
		{append(merge, "--in-place", "--rate", "-1"), "not a rate"},
		{append(merge, "--in-place", "--rate", "1.5"), "not a rate"},
		{append(merge, "--in-place", "--rate", "99999999999"), "not a rate"},
		{append(merge, "--in-place", "--io", "aio"), "uring, sync, auto"},
		{append(merge, "--in-place", "--read-ahead", "maybe"), "on, off"},
		{append(merge, "--in-place", "more"), "more"},
	} {
		t.Run(strings.Join(c.args, " "), func(t *testing.T) {
			if r := sm(t, c.args...).want(t, 2, c.text, "--help)"); r.stdout != "" {
				t.Errorf("stdout %q", r.stdout)
			}
		})
	}
}

func TestParseBytes(t *testing.T) {
	for s, want := range map[string]int64{
		"0": 0, "4096": 4096, "4KiB": 4096, "16 MiB": 16 << 20, "1.5GiB": 3 << 29, "2TiB": 2 << 40, "1MB": 1e6,
	} {
		if got, err := parseBytes(s); err != nil || got != want {
			t.Errorf("%q: %d, %v; want %d", s, got, err, want)
		}
	}
}

// TestHelp: every command and flag explains itself.
func TestHelp(t *testing.T) {
	root := newRoot()
	for _, c := range root.Commands() {
		if c.Short == "" {
			t.Errorf("%s has no help", c.CommandPath())
		}
	}
	twice := regexp.MustCompile(`.*\(default: [^)]*\) \(default .*`)
	each(root, func(c *cobra.Command) {
		if line := twice.FindString(c.Flags().FlagUsages()); line != "" {
			t.Errorf("%s: a flag has two defaults:\n%s", c.CommandPath(), line)
		}
	})
	if r := sm(t, "merge", "--help").want(t, 0); !strings.Contains(r.stdout, "--in-place") {
		t.Errorf("help: %q", r.stdout)
	}
}

func TestVersion(t *testing.T) {
	o := sm(t, "version", "--json").want(t, 0).object(t)
	wantKeys(t, o, "version", "commit", "go", "arch")
	if r := sm(t, "version").want(t, 0); !strings.HasPrefix(r.stdout, "snapmerge ") {
		t.Errorf("%q", r.stdout)
	}
}

func TestOneLine(t *testing.T) {
	err := errors.Join(errors.New("first\n"), fmt.Errorf("second: %w", context.Canceled))
	if got, want := oneLine(err), "first; second: interrupted"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}
