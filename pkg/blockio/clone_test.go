package blockio

import (
	"bytes"
	"errors"
	"path/filepath"
	"syscall"
	"testing"
)

// TestClone: on file systems that can share space, and on one that cannot.
func TestClone(t *testing.T) {
	const n = 256 << 10
	for kind, can := range map[string]bool{"xfs": true, "btrfs": true, "ext4": false} {
		t.Run(kind, func(t *testing.T) {
			f := open(t, filepath.Join(smallFS(t, kind, 512<<20), "f"), Create|Direct)
			want := bytes.Repeat([]byte("0123456789abcdef"), 3*n/16)
			for i := range want {
				want[i] += byte(i / 4096)
			}
			_, err := f.WriteAt(want, 0)
			ok(t, err)
			err = f.Clone(2*n, 0, n)
			if can != (err == nil) || err != nil && !errors.Is(err, errors.ErrUnsupported) {
				t.Fatalf("clone: %v", err)
			}
			if can {
				copy(want[2*n:], want[:n])
			}
			ok(t, f.Flush())
			got := make([]byte, 3*n)
			_, err = f.ReadAt(got, 0)
			ok(t, err)
			if !bytes.Equal(got, want) {
				t.Error("wrong content")
			}
			for _, bad := range [][3]int64{{0, 4096, 8192}, {4096, 0, 8192}, {0, 0, 4096}, {100, 8192, 4096}, {0, 8192, 100}, {-4096, 8192, 4096}, {0, 8192, 0}} {
				if err := f.Clone(bad[0], bad[1], bad[2]); !errors.Is(err, syscall.EINVAL) {
					t.Errorf("clone %v: %v", bad, err)
				}
			}
		})
	}
}
