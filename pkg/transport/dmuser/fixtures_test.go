package dmuser

import (
	"hash/fnv"
	"os"
	"path/filepath"
	"testing"
	"time"

	"k8s.io/klog/v2"

	"github.com/snapmerge/snapmerge/pkg/blockio"
	"github.com/snapmerge/snapmerge/pkg/transport"
	"github.com/snapmerge/snapmerge/pkg/volume"
	"github.com/snapmerge/snapmerge/test/cowgen"
	"github.com/snapmerge/snapmerge/test/dmusermock"
	"github.com/snapmerge/snapmerge/test/fixtures"
)

// TestFixtures: files of Android's own writer have the right view through the channels,
// before the merge and after it. The real driver has this in package devicetest.
func TestFixtures(t *testing.T) {
	fixtures.Each(t, func(t *testing.T, c fixtures.Case) {
		h := fnv.New32a()
		h.Write([]byte(c.Name))
		if testing.Short() && h.Sum32()%6 != 0 {
			t.Skip("short runs take a sixth of the cases")
		}
		dir := t.TempDir()
		for name, data := range map[string][]byte{"base.img": c.Base, "cow.img": c.COW} {
			if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		at := filepath.Join(dir, "v")
		if err := volume.Create(blockio.OS(), at, volume.Spec{ID: "v", Size: int64(len(c.Base)), Base: filepath.Join(dir, "base.img"),
			COWs: []volume.COWSource{{Path: filepath.Join(dir, "cow.img")}}}); err != nil {
			t.Fatal(err)
		}
		v, err := volume.Open(volume.Config{FS: blockio.OS(), Dir: at, IO: blockio.Auto, Log: klog.Background()})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { // after the device's end
			if err := v.Close(); err != nil {
				t.Error(err)
			}
		})
		_, target := create(t, newMock(), v, transport.Options{})
		check := func(when string) {
			t.Helper()
			if err := cowgen.Check(readAll(t, target, len(c.Base)), c.Expected); err != nil {
				t.Errorf("%s: %v", when, err)
			}
		}
		check("before the merge")
		v.Start()
		for end := time.Now().Add(patience); !v.Idle(); time.Sleep(time.Millisecond) {
			if err := v.MergeError(); err != nil || time.Now().After(end) {
				t.Fatalf("the merge does not end: %+v, %v", v.Status(), err)
			}
		}
		check("after it")
	})
}

// readAll reads a target's device by several requests at a time.
func readAll(t *testing.T, target *dmusermock.Target, size int) []byte {
	t.Helper()
	all := make([]byte, size)
	var done []<-chan error
	const piece = 256 << 10
	for off := 0; off < size; off += piece {
		done = append(done, target.Submit(dmusermock.Read, 0, int64(off), all[off:min(off+piece, size)]))
	}
	for _, d := range done {
		if err := answered(t, d); err != nil {
			t.Fatal(err)
		}
	}
	return all
}
