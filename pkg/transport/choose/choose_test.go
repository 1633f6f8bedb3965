package choose

import (
	"context"
	"errors"
	"io/fs"
	"slices"
	"testing"

	"github.com/snapmerge/snapmerge/pkg/transport"
)

// fake is a transport that works or not, and has leftovers or not.
type fake struct {
	transport.Transport
	name  string
	why   error
	dies  error // with its process
	left  []string
	tried bool
}

func (f *fake) Name() string                                { return f.name }
func (f *fake) Probe() error                                { f.tried = true; return f.why }
func (f *fake) Leftovers(context.Context) ([]string, error) { return f.left, nil }
func (f *fake) SurvivesRestart() error                      { return f.dies }
func (f *fake) MaxVolumes() (int64, error)                  { return 1, nil }
func (f *fake) Discard([]string) error                      { return f.why }

func (f *fake) Create(context.Context, string, transport.Backend, transport.Options) (transport.Device, error) {
	return &fakeDevice{name: f.name}, f.why
}

func (f *fake) Adopt(context.Context, string, transport.Backend) (transport.Device, error) {
	return &fakeDevice{name: f.name}, f.why
}

type fakeDevice struct {
	transport.Device
	name string
}

func (d *fakeDevice) Transport() string { return d.name }

func TestOpen(t *testing.T) {
	no := errors.New("no driver")
	for name, tt := range map[string]struct {
		choice    string
		ublk      fake
		fuse      fake
		want      string
		wantError error
	}{
		"the best":                {choice: Auto, want: "ublk"},
		"the one that works":      {choice: Auto, ublk: fake{why: no}, want: "fuse"},
		"none works":              {choice: Auto, ublk: fake{why: no}, fuse: fake{why: no}, wantError: no},
		"the one that survives":   {choice: Auto, ublk: fake{dies: no}, want: "fuse"},
		"no one survives":         {choice: Auto, ublk: fake{dies: no}, fuse: fake{dies: no}, want: "fuse"},
		"only a mortal works":     {choice: Auto, ublk: fake{dies: no}, fuse: fake{why: no}, want: "ublk"},
		"forced":                  {choice: "fuse", want: "fuse"},
		"forced and mortal":       {choice: "ublk", ublk: fake{dies: no}, want: "ublk"},
		"forced and missing":      {choice: "ublk", ublk: fake{why: no}, wantError: no},
		"unknown":                 {choice: "pigeon", wantError: ErrUnknown},
		"stays with its devices":  {choice: Auto, fuse: fake{left: []string{"v"}}, want: "fuse"},
		"forced and its devices":  {choice: "fuse", fuse: fake{left: []string{"v"}}, want: "fuse"},
		"forced, others' devices": {choice: "ublk", fuse: fake{left: []string{"v"}}, want: "ublk"},
		"devices of two":          {choice: Auto, ublk: fake{left: []string{"w"}}, fuse: fake{left: []string{"v"}}, want: "ublk"},
	} {
		t.Run(name, func(t *testing.T) {
			tt.ublk.name, tt.fuse.name = "ublk", "fuse"
			got, err := open(t.Context(), tt.choice, []Transport{&tt.ublk, &tt.fuse})
			if !errors.Is(err, tt.wantError) || tt.wantError == nil && err != nil {
				t.Fatalf("%v, want %v", err, tt.wantError)
			}
			if err == nil && got.Name() != tt.want {
				t.Errorf("%s, want %s", got.Name(), tt.want)
			}
			if len(tt.fuse.left) > 0 && tt.fuse.tried {
				t.Error("made a device beside those in service")
			}
		})
	}
}

// TestSet: new devices are of the transport that is asked for, old ones of the one
// that made them.
func TestSet(t *testing.T) {
	no := errors.New("no driver")
	ublk := &fake{name: "ublk", left: []string{"old", "both"}}
	fuse := &fake{name: "fuse", left: []string{"older", "both"}}
	nbd := &fake{name: "nbd", why: no}
	s, err := open(t.Context(), "fuse", []Transport{ublk, fuse, nbd})
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		volume, ask, want string
		wantError         error
	}{
		{"v", "", "fuse", nil},
		{"v", Auto, "fuse", nil},
		{"v", "ublk", "ublk", nil},
		{"v", "nbd", "", no},
		{"v", "nbd", "", ErrUnavailable},
		{"v", "pigeon", "", ErrUnknown},
	} {
		d, err := s.Create(t.Context(), tt.volume, nil, transport.Options{Transport: tt.ask})
		if !errors.Is(err, tt.wantError) || err == nil && d.Transport() != tt.want {
			t.Errorf("create %q by %q: %v", tt.volume, tt.ask, err)
		}
	}
	if _, err := s.Create(t.Context(), "old", nil, transport.Options{}); err == nil {
		t.Error("made a second device of a volume")
	}
	for volume, want := range map[string]string{"old": "ublk", "older": "fuse"} {
		if d, err := s.Adopt(t.Context(), volume, nil); err != nil || d.Transport() != want {
			t.Errorf("adopt %q: %v", volume, err)
		}
	}
	if _, err := s.Adopt(t.Context(), "none", nil); !errors.Is(err, transport.ErrNotFound) {
		t.Errorf("adopt nothing: %v", err)
	}
	if left, err := s.Leftovers(t.Context()); err != nil || !slices.Equal(left, []string{"both", "old", "older"}) {
		t.Errorf("leftovers %v, %v", left, err)
	}
	if err := s.Discard([]string{"v"}); !errors.Is(err, no) {
		t.Errorf("discard: %v", err)
	}
	nbd.why = fs.ErrNotExist
	if err := s.Discard([]string{"v"}); err != nil {
		t.Errorf("discard without a driver: %v", err)
	}
}

// TestNames: the list is that of what Open makes.
func TestNames(t *testing.T) {
	var names []string
	for _, tr := range transports(t.TempDir(), nil) {
		names = append(names, tr.Name())
	}
	if !slices.Equal(names, Names()) {
		t.Errorf("%v", names)
	}
}
