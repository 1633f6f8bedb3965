package volume

import (
	"encoding/json"
	"errors"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/snapmerge/snapmerge/pkg/blockio"
	"github.com/snapmerge/snapmerge/pkg/blockio/crashfs"
)

// rewriteRecord changes a record as another release would.
func rewriteRecord(t *testing.T, fs *crashfs.FS, dir string, change func(r map[string]any)) {
	t.Helper()
	b, err := fs.ReadFile(dir + "/" + recordName)
	var r map[string]any
	if err == nil {
		err = json.Unmarshal(b, &r)
	}
	if err != nil {
		t.Fatal(err)
	}
	change(r)
	if b, err = json.Marshal(r); err == nil {
		err = blockio.WriteFileAtomic(fs, dir+"/"+recordName, b)
	}
	if err != nil {
		t.Fatal(err)
	}
}

func TestRecordFormats(t *testing.T) {
	for name, tt := range map[string]struct {
		change func(r map[string]any)
		want   error
	}{
		"ours":                            {func(map[string]any) {}, nil},
		"newest":                          {func(r map[string]any) { r["format"] = newestFormat }, nil},
		"newer":                           {func(r map[string]any) { r["format"] = newestFormat + 1 }, ErrNewer},
		"newer, all changed":              {func(r map[string]any) { r["format"], r["size"], r["new"] = newestFormat+7, "large", 1 }, ErrNewer},
		"unknown field":                   {func(r map[string]any) { r["new"] = 1 }, ErrRecord},
		"no format":                       {func(r map[string]any) { delete(r, "format") }, ErrRecord},
		"format of a record that is none": {func(r map[string]any) { r["format"] = "new" }, ErrRecord},
	} {
		t.Run(name, func(t *testing.T) {
			fs, v := handoverVolume(t)
			v.Close()
			rewriteRecord(t, fs, "/s/v", tt.change)
			if _, err := ReadRecord(fs, "/s/v"); !errors.Is(err, tt.want) || (err == nil) != (tt.want == nil) {
				t.Errorf("%v, want %v", err, tt.want)
			}
		})
	}
}

// TestRecordRenewed: a record in a format that this release would not write is written
// again, durably, when the volume is opened. If that fails the volume is there all the
// same.
func TestRecordRenewed(t *testing.T) {
	fs, v := handoverVolume(t)
	v.Close()
	rewriteRecord(t, fs, "/s/v", func(r map[string]any) { r["format"] = nativeFormat })
	full := errors.New("no room")
	fs.OnStep(func(s crashfs.Step) error {
		if strings.HasSuffix(s.Name, ".tmp") {
			return full
		}
		return nil
	})
	v, err := openVolume(fs)
	fs.OnStep(nil)
	if err != nil {
		t.Fatal(err)
	}
	if r, err := ReadRecord(fs, "/s/v"); err != nil || r.Format != nativeFormat {
		t.Errorf("%+v, %v", r, err)
	}
	v.Close()
	if v, err = openVolume(fs); err != nil {
		t.Fatal(err)
	}
	defer v.Close()
	for class, image := range fs.CrashImages(8, rand.New(rand.NewPCG(1, 1))) {
		if r, err := ReadRecord(image, "/s/v"); err != nil || r.Format != recordFormat {
			t.Errorf("%s: %+v, %v", class, r, err)
		}
	}
}

// TestNewerRecord: an earlier release does not start, so that guests go on waiting, and
// changes nothing.
func TestNewerRecord(t *testing.T) {
	start, stop, tr, fs := deviceNode(t)
	attached(t, start(), "v")
	stop()
	rewriteRecord(t, fs, "/n/volumes/v", func(r map[string]any) { r["format"], r["new"] = newestFormat+1, true })
	served := tr.devices["v"].b
	fs.OnStep(func(s crashfs.Step) error {
		if strings.HasPrefix(s.Name, "/n/volumes/v") {
			t.Errorf("%v", s)
		}
		return nil
	})
	cfg := managerConfig(fs)
	cfg.Transport = tr
	m, err := OpenManager(t.Context(), cfg)
	if !errors.Is(err, ErrNewer) || !strings.Contains(err.Error(), "/n/volumes/v/volume.json") {
		t.Errorf("%v", err)
	}
	if m != nil {
		m.Close()
	}
	if d := tr.devices["v"]; d == nil || d.aborted || d.b != served {
		t.Error("the device was touched")
	}
	fs.OnStep(nil)
	rewriteRecord(t, fs, "/n/volumes/v", func(r map[string]any) { r["format"] = newestFormat; delete(r, "new") })
	if st, err := start().Status("v"); err != nil || st.Device == "" || st.DeviceDown {
		t.Errorf("%+v, %v", st, err)
	}
}
