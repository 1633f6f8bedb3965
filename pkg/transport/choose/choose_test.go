package choose

import (
	"context"
	"errors"
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
		"forced, others' devices": {choice: "ublk", fuse: fake{left: []string{"v"}}, wantError: ErrOther},
		"devices of two":          {choice: Auto, ublk: fake{left: []string{"w"}}, fuse: fake{left: []string{"v"}}, wantError: ErrOther},
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
