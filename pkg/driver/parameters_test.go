package driver

import (
	"flag"
	"fmt"
	"os"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"

	"github.com/snapmerge/snapmerge/pkg/volume"
)

var update = flag.Bool("update", false, "rewrite docs/parameters.md and golden files")

func TestVolumeParameters(t *testing.T) {
	def := volume.DefaultLimits
	for _, c := range []struct {
		name  string
		given map[string]string
		want  volumeParameters
		err   string // a part of it
	}{
		{"none", nil, volumeParameters{limits: def}, ""},
		{"sidecar's", map[string]string{"csi.storage.k8s.io/pvc/name": "a", "csi.storage.k8s.io/fstype": "x"}, volumeParameters{limits: def}, ""},
		{"all", map[string]string{"mergeRate": "7", "logSoftLimit": "100MiB", "logHardLimit": "1Gi", "readAhead": "sync", "readPromotion": "on"},
			volumeParameters{7, volume.Limits{Soft: 100 << 20, Hard: 1 << 30}, "sync", "on"}, ""},
		{"bytes", map[string]string{"logSoftLimit": "67108864"}, volumeParameters{0, volume.Limits{Soft: 64 << 20, Hard: def.Hard}, "", ""}, ""},
		{"snapshots", map[string]string{"snapshots": "offline"}, volumeParameters{limits: def}, ""},
		{"other snapshots", map[string]string{"snapshots": "never"}, volumeParameters{}, "snapshots"},
		{"unknown", map[string]string{"mergeRat": "7"}, volumeParameters{}, `"mergeRat"`},
		{"fsType", map[string]string{"fsType": "xfs"}, volumeParameters{}, `"fsType"`},
		{"snapshot's", map[string]string{"compression": "lz4"}, volumeParameters{}, `"compression"`},
		{"empty key", map[string]string{"": ""}, volumeParameters{}, `""`},
		{"no number", map[string]string{"mergeRate": "fast"}, volumeParameters{}, "mergeRate"},
		{"fraction", map[string]string{"mergeRate": "1.5"}, volumeParameters{}, "mergeRate"},
		{"negative rate", map[string]string{"mergeRate": "-1"}, volumeParameters{}, "mergeRate"},
		{"huge rate", map[string]string{"mergeRate": "99999999"}, volumeParameters{}, "mergeRate"},
		{"read-ahead", map[string]string{"readAhead": "on"}, volumeParameters{}, "readAhead"},
		{"promotion", map[string]string{"readPromotion": "true"}, volumeParameters{}, "readPromotion"},
		{"empty size", map[string]string{"logSoftLimit": ""}, volumeParameters{}, "logSoftLimit"},
		{"negative size", map[string]string{"logSoftLimit": "-1GiB"}, volumeParameters{}, "logSoftLimit"},
		{"comma", map[string]string{"logHardLimit": "8,5GiB"}, volumeParameters{}, "logHardLimit"},
		{"tiny size", map[string]string{"logSoftLimit": "1MiB"}, volumeParameters{}, "at least"},
		{"overflow", map[string]string{"logHardLimit": "999999999999EiB"}, volumeParameters{}, "logHardLimit"},
		{"hard below soft", map[string]string{"logHardLimit": "100MiB"}, volumeParameters{}, "less than"},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := parseVolumeParameters(c.given)
			if c.err == "" {
				if err != nil || got != c.want {
					t.Errorf("%+v, %v; want %+v", got, err, c.want)
				}
				return
			}
			if code(err) != codes.InvalidArgument || !strings.Contains(err.Error(), c.err) {
				t.Errorf("error %v, want InvalidArgument with %q", err, c.err)
			}
		})
	}
}

func TestSnapshotParameters(t *testing.T) {
	for _, c := range []struct {
		value string
		ok    bool
	}{
		{"none", true}, {"lz4", true}, {"zstd", true}, {"zstd,1", true}, {"zstd,22", true},
		{"zstd,23", false}, {"zstd,", false}, {"none,1", false}, {"gz", false}, {"brotli", false}, {"", false}, {"LZ4", false},
	} {
		p, err := parseSnapshotParameters(map[string]string{"compression": c.value})
		if (err == nil) != c.ok || err == nil && p.compression != c.value {
			t.Errorf("%q: %q, %v", c.value, p.compression, err)
		}
		if err != nil && code(err) != codes.InvalidArgument {
			t.Errorf("%q: code %v", c.value, code(err))
		}
	}
	if p, err := parseSnapshotParameters(map[string]string{"csi.storage.k8s.io/snapshotter-secret-name": "x"}); err != nil || p.compression != "lz4" {
		t.Errorf("default is %q, %v", p.compression, err)
	}
	if _, err := parseSnapshotParameters(map[string]string{"mergeRate": "1"}); code(err) != codes.InvalidArgument {
		t.Errorf("a StorageClass's parameter: %v", err)
	}
}

// TestParametersPage keeps the page for users in step with the code. -update
// writes its tables anew.
func TestParametersPage(t *testing.T) {
	const page = "../../docs/parameters.md"
	b, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	text := string(b)
	for name, table := range map[string]string{
		"StorageClass":        parameterTable(storageClass),
		"VolumeSnapshotClass": parameterTable(snapshotClass),
	} {
		begin, end := fmt.Sprintf("<!-- begin %s -->\n", name), fmt.Sprintf("<!-- end %s -->", name)
		_, rest, ok := strings.Cut(text, begin)
		have, _, ok2 := strings.Cut(rest, end)
		if !ok || !ok2 {
			t.Fatalf("%s has no lines %q and %q", page, begin, end)
		}
		if have == table {
			continue
		}
		if !*update {
			t.Errorf("the table %s of %s is not that of the code (go test -run %s -update):\n%s", name, page, t.Name(), table)
			continue
		}
		text = strings.Replace(text, begin+have+end, begin+table+end, 1)
	}
	if *update {
		if err := os.WriteFile(page, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

func parameterTable[T any](params []parameter[T]) string {
	b := &strings.Builder{}
	b.WriteString("| parameter | unit | default | meaning |\n| --- | --- | --- | --- |\n")
	for _, p := range params {
		fmt.Fprintf(b, "| `%s` | %s | %s | %s |\n", p.name, p.unit, p.initial, p.doc)
	}
	return b.String()
}
