package bench

import (
	"errors"
	"strings"
	"testing"
)

func TestParseFio(t *testing.T) {
	const good = `fio: this note comes first
{"jobs": [{
	"read":  {"iops": 100.5, "clat_ns": {"percentile": {"50.000000": 1, "99.000000": 2000}}},
	"write": {"iops": 99.5, "clat_ns": {"percentile": {"99.000000": 3000}}},
	"sync":  {"lat_ns": {"percentile": {"99.000000": 4500}}}
}]}`
	if l, err := parseFio([]byte(good)); err != nil || l != (FioLoad{200, 2, 3, 4.5}) {
		t.Errorf("%+v, %v", l, err)
	}
	for _, bad := range []string{"", "no JSON", `{"jobs": []}`, strings.Replace(good, "4500", "0", 1), strings.Replace(good, `"sync"`, `"other"`, 1)} {
		if l, err := parseFio([]byte(bad)); err == nil {
			t.Errorf("%q: %+v", bad, l)
		}
	}
}

func TestNoFio(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	if _, err := MeasureForeground(t.Context(), ForegroundOptions{}); !errors.Is(err, ErrNoFio) {
		t.Error(err)
	}
}
