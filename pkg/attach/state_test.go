package attach

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/snapmerge/snapmerge/pkg/cow"
)

func TestCheck(t *testing.T) {
	label := func(n uint64) *uint64 { return &n }
	have := arguments{Base: "/b", COWs: []cowArgument{{Path: "/c", Length: 100, CRC: 1}, {Path: "/d", Label: label(3), Length: 200, CRC: 2}}}
	for name, tt := range map[string]struct {
		change func(a *arguments)
		fits   bool
	}{
		"the same":          {func(*arguments) {}, true},
		"COW gone":          {func(a *arguments) { a.COWs[0].Length, a.COWs[0].CRC = 0, 0 }, true},
		"another base":      {func(a *arguments) { a.Base = "/x" }, false},
		"read-only":         {func(a *arguments) { a.ReadOnly = true }, false},
		"one COW less":      {func(a *arguments) { a.COWs = a.COWs[:1] }, false},
		"one COW more":      {func(a *arguments) { a.COWs = append(a.COWs, cowArgument{}) }, false},
		"another COW":       {func(a *arguments) { a.COWs[0].Path = "/x" }, false},
		"another order":     {func(a *arguments) { a.COWs[0], a.COWs[1] = a.COWs[1], a.COWs[0] }, false},
		"longer":            {func(a *arguments) { a.COWs[0].Length++ }, false},
		"another content":   {func(a *arguments) { a.COWs[0].CRC++ }, false},
		"no label":          {func(a *arguments) { a.COWs[1].Label = nil }, false},
		"a label":           {func(a *arguments) { a.COWs[0].Label = label(3) }, false},
		"another label":     {func(a *arguments) { a.COWs[1].Label = label(4) }, false},
		"equal label again": {func(a *arguments) { a.COWs[1].Label = label(3) }, true},
	} {
		asked := have
		asked.COWs = append([]cowArgument(nil), have.COWs...)
		tt.change(&asked)
		err := have.check(asked)
		if tt.fits && err != nil || !tt.fits && !errors.Is(err, ErrState) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// config is that of a base and an empty COW in a new directory.
func config(t *testing.T) *Config {
	t.Helper()
	dir := t.TempDir()
	cfg := &Config{Base: filepath.Join(dir, "base"), COWs: []string{filepath.Join(dir, "cow")}, StateDir: filepath.Join(dir, "state")}
	check(t, os.WriteFile(cfg.Base, make([]byte, 4096), 0o600))
	check(t, os.Mkdir(cfg.StateDir, 0o700))
	writeCOW(t, cfg.COWs[0], 0)
	return cfg
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

type sink struct{ *os.File }

func (s sink) Flush() error { return s.Sync() }

// writeCOW writes a COW that zeroes one block.
func writeCOW(t *testing.T, name string, block uint64) {
	t.Helper()
	f, err := os.Create(name)
	check(t, err)
	w, err := cow.NewWriter(sink{f}, cow.WriterOptions{Version: 2})
	check(t, err)
	check(t, errors.Join(w.Zero(block, 1), w.Finalize(), f.Close()))
}

// TestStateBeforeVolume: until there is a volume the arguments may change, as
// long as what is there is ours.
func TestStateBeforeVolume(t *testing.T) {
	cfg := config(t)
	first, err := cfg.state()
	check(t, err)
	if first.ID == "" || len(first.COWs) != 1 || first.COWs[0].Length == 0 {
		t.Errorf("arguments %+v", first)
	}
	writeCOW(t, cfg.COWs[0], 7)
	second, err := cfg.state()
	check(t, err)
	if second.COWs[0] == first.COWs[0] {
		t.Errorf("the COW has changed, the arguments have not: %+v", second)
	}
	check(t, os.WriteFile(filepath.Join(cfg.StateDir, argumentsName), []byte("{"), 0o600))
	_, err = cfg.state()
	check(t, err)

	// Somebody else's folder of that name is left alone.
	check(t, os.Remove(filepath.Join(cfg.StateDir, argumentsName)))
	check(t, os.Mkdir(cfg.volumeDir(), 0o700))
	if _, err := cfg.state(); !errors.Is(err, ErrState) {
		t.Errorf("a folder of somebody else's: %v", err)
	}
}

// TestStateWithVolume: once there is a volume the arguments count.
func TestStateWithVolume(t *testing.T) {
	cfg := config(t)
	first, err := cfg.state()
	check(t, err)
	check(t, os.Mkdir(cfg.volumeDir(), 0o700))
	check(t, os.WriteFile(filepath.Join(cfg.volumeDir(), "volume.json"), nil, 0o600))
	again, err := cfg.state()
	check(t, err)
	if again.ID != first.ID {
		t.Errorf("id %s, then %s", first.ID, again.ID)
	}
	check(t, os.Remove(cfg.COWs[0])) // merged and gone
	_, err = cfg.state()
	check(t, err)
	writeCOW(t, cfg.COWs[0], 7)
	for _, spoil := range []func(){
		func() {},
		func() {
			check(t, os.WriteFile(filepath.Join(cfg.StateDir, argumentsName), []byte(`{"format":9,"id":"x"}`), 0o600))
		},
		func() { check(t, os.WriteFile(filepath.Join(cfg.StateDir, argumentsName), []byte(`{`), 0o600)) },
		func() { check(t, os.Remove(filepath.Join(cfg.StateDir, argumentsName))) },
	} {
		spoil()
		if _, err := cfg.state(); !errors.Is(err, ErrState) {
			t.Errorf("%v", err)
		}
	}
}
