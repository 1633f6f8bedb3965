package blockio_test

import (
	"errors"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/snapmerge/snapmerge/pkg/blockio"
	"github.com/snapmerge/snapmerge/pkg/blockio/crashfs"
)

const (
	oldRecord = "old"
	newRecord = "a longer new record"
)

// recordDisk has /d/record with the old content, or none, and perhaps what a
// crashed writer left.
func recordDisk(t *testing.T, withOld, withLeftover bool) *crashfs.FS {
	t.Helper()
	disk := crashfs.New("/d")
	put := func(name, data string) {
		if err := disk.Put(name, []byte(data)); err != nil {
			t.Fatal(err)
		}
	}
	if withOld {
		put("/d/record", oldRecord)
	}
	if withLeftover {
		put("/d/record.tmp", strings.Repeat("leftover", 1000))
	}
	return disk
}

// TestWriteFileAtomicCrash cuts the power before each step and after the last.
func TestWriteFileAtomicCrash(t *testing.T) {
	images := 0
	for _, withOld := range []bool{false, true} {
		for _, withLeftover := range []bool{false, true} {
			for k := int64(1); ; k++ {
				disk := recordDisk(t, withOld, withLeftover)
				cut := errors.New("power cut")
				disk.OnStep(func(s crashfs.Step) error {
					if s.N >= k {
						return cut
					}
					return nil
				})
				err := blockio.WriteFileAtomic(disk, "/d/record", []byte(newRecord))
				if err != nil && !errors.Is(err, cut) {
					t.Fatal(err)
				}
				for name, img := range disk.CrashImages(0, rand.New(rand.NewPCG(1, uint64(k)))) {
					images++
					checkRecord(t, img, withOld, err == nil, name)
					// And the next start can write the record again.
					if err := blockio.WriteFileAtomic(img, "/d/record", []byte("newest")); err != nil {
						t.Errorf("step %d, %s: again: %v", k, name, err)
					}
					if data, err := img.Crash(crashfs.Nothing).ReadFile("/d/record"); string(data) != "newest" {
						t.Errorf("step %d, %s: again: %q, %v", k, name, data, err)
					}
				}
				if err == nil {
					break
				}
			}
		}
	}
	t.Logf("%d crash images", images)
}

func checkRecord(t *testing.T, img *crashfs.FS, hadOld, done bool, when string) {
	t.Helper()
	data, err := img.ReadFile("/d/record")
	switch {
	case err == nil && string(data) == newRecord:
	case done:
		t.Errorf("%s: written, but now %q, %v", when, data, err)
	case hadOld && err == nil && string(data) == oldRecord:
	case !hadOld && errors.Is(err, fs.ErrNotExist):
	default:
		t.Errorf("%s: %q, %v", when, data, err)
	}
}

// TestWriteFileAtomicErrors fails each step in turn, once.
func TestWriteFileAtomicErrors(t *testing.T) {
	for k := int64(1); ; k++ {
		disk := recordDisk(t, true, true)
		failed := crashfs.Step{}
		disk.OnStep(func(s crashfs.Step) error {
			if s.N == k {
				failed = s
				return syscall.ENOSPC
			}
			return nil
		})
		err := blockio.WriteFileAtomic(disk, "/d/record", []byte(newRecord))
		if failed.N == 0 {
			if err != nil || k != 7 {
				t.Errorf("%d steps, %v", k-1, err)
			}
			return
		}
		if !errors.Is(err, syscall.ENOSPC) || !strings.Contains(err.Error(), "/d/record") {
			t.Errorf("%v: %v", failed, err)
		}
		if unchanged := errors.Is(err, blockio.ErrUnchanged); unchanged == (failed.Op == crashfs.OpRename || failed.Op == crashfs.OpSyncDir) {
			t.Errorf("%v: unchanged %v: %v", failed, unchanged, err)
		}
		want := oldRecord
		if failed.Op == crashfs.OpSyncDir {
			want = newRecord
		}
		if data, err := disk.ReadFile("/d/record"); string(data) != want {
			t.Errorf("%v: %q, %v", failed, data, err)
		}
		if left, _ := disk.Exists("/d/record.tmp"); left != (k == 1) {
			t.Errorf("%v: temporary file left: %v", failed, left)
		}
	}
}

func TestWriteFileAtomic(t *testing.T) {
	name := filepath.Join(t.TempDir(), "record")
	for _, want := range []string{oldRecord, newRecord, ""} {
		if err := blockio.WriteFileAtomic(blockio.OS(), name, []byte(want)); err != nil {
			t.Fatal(err)
		}
		if data, err := os.ReadFile(name); string(data) != want || err != nil {
			t.Errorf("%q, %v, want %q", data, err, want)
		}
	}
	if err := blockio.WriteFileAtomic(blockio.OS(), name+"/x", nil); !errors.Is(err, syscall.ENOTDIR) {
		t.Errorf("below a file: %v", err)
	}
}
