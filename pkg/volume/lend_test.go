package volume

import (
	"bytes"
	"math/rand/v2"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"

	"github.com/snapmerge/snapmerge/pkg/blockio"
	"github.com/snapmerge/snapmerge/pkg/readahead"
	"github.com/snapmerge/snapmerge/test/cowgen"
	"github.com/snapmerge/snapmerge/test/devicetest"
)

// lentVolume is a volume in real files, without layers.
func lentVolume(t *testing.T, change func(*Config)) *Volume {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "v")
	if err := Create(blockio.OS(), dir, Spec{ID: "v", Size: 64 * bs}); err != nil {
		t.Fatal(err)
	}
	cfg := Config{FS: blockio.OS(), Dir: dir, IO: blockio.Auto, Log: klog.Background()}
	if change != nil {
		change(&cfg)
	}
	v, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := v.Close(); err != nil && v.failed() == nil {
			t.Error(err)
		}
	})
	return v
}

func wantNotLent(t *testing.T, what string, v *Volume, off, n int64, write bool) {
	t.Helper()
	if _, back, ok := v.Lend(off, n, write); ok {
		back(false)
		t.Errorf("%s: it was lent", what)
	}
}

// TestLend: what is done with a lent base is a request of the volume like others.
func TestLend(t *testing.T) {
	v := lentVolume(t, nil)
	buf := devicetest.Aligned(t, bs)
	copy(buf, "written")
	fd, back, ok := v.Lend(2*bs, bs, true)
	if !ok {
		t.Fatal("not lent")
	}
	if n := v.InFlight(); n != 1 {
		t.Errorf("%d in flight", n)
	}
	if v.gate.TryLock() {
		t.Error("the stack may be changed while it is written past")
	}
	v.baseDirty.Store(false)
	if _, err := unix.Pwrite(fd, buf, 2*bs); err != nil {
		t.Fatal(err)
	}
	back(true)
	if !v.baseDirty.Load() {
		t.Error("the next flush would leave out what was written")
	}
	if !v.gate.TryLock() {
		t.Fatal("the stack cannot be changed any more")
	}
	wantNotLent(t, "a write while the stack is changed", v, 0, bs, true)
	v.gate.Unlock()

	fd, back, ok = v.Lend(2*bs, bs, false)
	if !ok {
		t.Fatal("not lent")
	}
	clear(buf)
	if _, err := unix.Pread(fd, buf, 2*bs); err != nil || !bytes.HasPrefix(buf, []byte("written")) {
		t.Errorf("read %q, %v", buf[:7], err)
	}
	back(true)
	_, back, _ = v.Lend(0, bs, false)
	back(false) // it will come again
	c := v.Counters()
	if c.Write.Done != 1 || c.Write.Bytes != bs || c.ToBase != bs || c.Read.Done != 1 || c.Read.Bytes != bs || c.FromBase != bs || v.InFlight() != 0 {
		t.Errorf("%d in flight; %+v", v.InFlight(), c)
	}

	wantNotLent(t, "behind the end", v, 64*bs, bs, false)
	wantNotLent(t, "beyond the end", v, 63*bs, 2*bs, true)
	v.fail(unix.EIO)
	wantNotLent(t, "a write of a volume that takes none", v, 0, bs, true)
	if _, back, ok := v.Lend(0, bs, false); !ok {
		t.Error("such a volume is not read")
	} else {
		back(true)
	}
}

// TestLendNot: a volume that has something above its base is not lent, nor one whose
// base is read ahead, nor one that has no descriptor.
func TestLendNot(t *testing.T) {
	v := lentVolume(t, nil)
	if err := v.Cut("s", nil); err != nil {
		t.Fatal(err)
	}
	for _, write := range []bool{false, true} {
		wantNotLent(t, "a write log", v, 0, bs, write)
	}

	m := readahead.NewManager(readahead.Config{Mode: readahead.Async})
	t.Cleanup(func() {
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	})
	ahead := lentVolume(t, func(c *Config) { c.ReadAhead = m })
	wantNotLent(t, "read-ahead", ahead, 0, bs, false)

	_, simulated, _ := restoredVolume(t, rand.NewPCG(1, 2), cowgen.Spec{Blocks: 8})
	defer simulated.Close()
	wantNotLent(t, "no descriptor", simulated, 0, bs, false)
}
