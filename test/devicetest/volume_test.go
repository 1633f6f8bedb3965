package devicetest_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"

	"github.com/snapmerge/snapmerge/pkg/blockio"
	"github.com/snapmerge/snapmerge/pkg/cow"
	"github.com/snapmerge/snapmerge/pkg/transport"
	"github.com/snapmerge/snapmerge/pkg/transport/choose"
	"github.com/snapmerge/snapmerge/pkg/volume"
	"github.com/snapmerge/snapmerge/test/cowgen"
	"github.com/snapmerge/snapmerge/test/devicetest"
	"github.com/snapmerge/snapmerge/test/fixtures"
	"github.com/snapmerge/snapmerge/test/machine"
)

// These are tests of whole volumes over each transport that the machine has: fuse where
// there is root, all of them in the virtual machine of `make test-vm`.

// each runs fn for each transport that works.
func each(t *testing.T, fn func(t *testing.T, tr transport.Transport)) {
	machine.NeedDevices(t, machine.Loop)
	for _, name := range choose.Names() {
		t.Run(name, func(t *testing.T) {
			tr, err := choose.Open(t.Context(), name, t.TempDir(), nil)
			if err != nil {
				t.Skip(err)
			}
			fn(t, tr)
		})
	}
}

// served is a volume with a device.
type served struct {
	t   *testing.T
	tr  transport.Transport
	v   *volume.Volume
	dev transport.Device
}

// serve makes the volume and its device.
func serve(t *testing.T, tr transport.Transport, spec volume.Spec) *served {
	t.Helper()
	spec.ID, spec.Limits = "v", volume.DefaultLimits
	dir := filepath.Join(t.TempDir(), "v")
	if err := volume.Create(blockio.OS(), dir, spec); err != nil {
		t.Fatal(err)
	}
	v, err := volume.Open(volume.Config{FS: blockio.OS(), Dir: dir, IO: blockio.Auto, Log: klog.Background()})
	if err != nil {
		t.Fatal(err)
	}
	s := &served{t: t, tr: tr, v: v}
	if s.dev, err = tr.Create(t.Context(), "v", v, transport.Options{}); err != nil {
		t.Fatal(errors.Join(err, v.Close()))
	}
	t.Cleanup(func() {
		if s.dev != nil {
			_ = s.dev.Abort()
			_ = s.v.Close()
		}
	})
	return s
}

// merge merges to the end.
func (s *served) merge() {
	s.t.Helper()
	if err := s.v.SetRate(10000); err != nil {
		s.t.Fatal(err)
	}
	s.v.Start()
	for end := time.Now().Add(devicetest.Patience); !s.v.Idle(); time.Sleep(5 * time.Millisecond) {
		if err := s.v.MergeError(); err != nil || time.Now().After(end) {
			s.t.Fatalf("the merge does not end: %+v, %v", s.v.Status(), err)
		}
	}
}

// close takes the device away, and closes the volume.
func (s *served) close() {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), devicetest.Patience)
	defer cancel()
	err := s.dev.Close(ctx)
	if err == nil {
		s.dev = nil
		err = s.v.Close()
	}
	if err != nil {
		s.t.Fatal(err)
	}
}

// content reads all of the device.
func (s *served) content() []byte {
	s.t.Helper()
	f, err := os.OpenFile(s.dev.Path(), os.O_RDONLY|unix.O_DIRECT, 0)
	if err != nil {
		s.t.Fatal(err)
	}
	defer f.Close()
	var all bytes.Buffer
	buf := devicetest.Aligned(s.t, 1<<20)
	for left := s.v.Size(); left > 0; {
		n, err := f.Read(buf[:min(left, int64(len(buf)))])
		if err != nil {
			s.t.Fatal(err)
		}
		all.Write(buf[:n])
		left -= int64(n)
	}
	return all.Bytes()
}

func put(t *testing.T, dir, name string, data []byte) string {
	t.Helper()
	path := filepath.Join(dir, name)
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func same(t *testing.T, what string, got, want []byte) {
	t.Helper()
	if err := cowgen.Check(got, want); err != nil {
		t.Errorf("%s: %v", what, err)
	}
}

// sampled tells whether a short run takes the case: one in twelve.
func sampled(name string) bool {
	h := fnv.New32a()
	h.Write([]byte(name))
	return !testing.Short() || h.Sum32()%12 == 0
}

// TestFixtures: files of Android's own writer have the right view on the device, and the
// right base when they are merged.
func TestFixtures(t *testing.T) {
	fixtures.Each(t, func(t *testing.T, c fixtures.Case) {
		if !sampled(c.Name) {
			t.Skip("short runs take a twelfth of the cases")
		}
		each(t, func(t *testing.T, tr transport.Transport) {
			dir := t.TempDir()
			base := put(t, dir, "base.img", c.Base)
			s := serve(t, tr, volume.Spec{Size: int64(len(c.Base)), Base: base, COWs: []volume.COWSource{{Path: put(t, dir, "cow.img", c.COW)}}})
			same(t, "the device", s.content(), c.Expected)
			s.merge()
			same(t, "the device when merged", s.content(), c.Expected)
			s.close()
			got, err := os.ReadFile(base)
			if err != nil {
				t.Fatal(err)
			}
			same(t, "the base", got, c.Expected)
		})
	})
}

// TestFio has fio verify what it writes with 1 and 4 jobs while the volume is merged.
func TestFio(t *testing.T) {
	if _, err := exec.LookPath("fio"); err != nil {
		t.Skip("needs fio")
	}
	each(t, func(t *testing.T, tr transport.Transport) {
		seed, rng := devicetest.Seeded(t)
		im, err := cowgen.Make(rng, cowgen.Spec{Blocks: 8192, Copies: 3000, Xors: 700, Replaces: 1500, Zeros: 300, Compression: cow.LZ4})
		if err != nil {
			t.Fatal(err)
		}
		dir := t.TempDir()
		s := serve(t, tr, volume.Spec{Size: int64(len(im.Base)), Base: put(t, dir, "base.img", im.Base), COWs: []volume.COWSource{{Path: put(t, dir, "cow.img", im.COW)}}})
		if err := s.v.SetRate(2); err != nil {
			t.Fatal(err)
		}
		s.v.Start()
		for _, jobs := range []int{1, 4} {
			out, err := exec.Command("fio", "--name=v", "--filename="+s.dev.Path(), "--direct=1", "--ioengine=libaio", "--rw=randwrite", "--bsrange=4k-64k",
				"--bs_unaligned=0", "--iodepth=16", "--fsync=32", "--verify=crc32c", "--do_verify=1", "--verify_fatal=1", "--verify_state_save=0",
				fmt.Sprint("--randseed=", seed>>1), "--size=4m", fmt.Sprint("--numjobs=", jobs), "--offset_increment=4m", "--group_reporting").CombinedOutput()
			if err != nil {
				t.Fatalf("fio with %d jobs: %v: %s", jobs, err, out)
			}
			t.Logf("fio with %d jobs: merged to %.0f %%", jobs, s.v.Status().Percent)
		}
		s.merge()
		const written = 16 << 20
		same(t, "what fio did not write", s.content()[written:], im.Want[written:])
		s.close()
	})
}

// TestFileSystems makes file systems, writes files, and checks both.
func TestFileSystems(t *testing.T) {
	each(t, func(t *testing.T, tr transport.Transport) {
		for _, tt := range []struct {
			fs, make, check string
			size            int64
		}{{"ext4", "mkfs.ext4 -q", "e2fsck -fn", 64 << 20}, {"xfs", "mkfs.xfs -q", "xfs_repair -n", 320 << 20}} {
			t.Run(tt.fs, func(t *testing.T) {
				machine.NeedFS(t, tt.fs)
				s := serve(t, tr, volume.Spec{Size: tt.size})
				if out, err := exec.Command("sh", "-c", tt.make+" "+s.dev.Path()).CombinedOutput(); err != nil {
					t.Fatalf("%s: %v: %s", tt.make, err, out)
				}
				dir := t.TempDir()
				want := make([]byte, 1<<20)
				chacha := rand.NewChaCha8([32]byte{1})
				_, _ = chacha.Read(want)
				for round := range 2 {
					if err := unix.Mount(s.dev.Path(), dir, tt.fs, 0, ""); err != nil {
						t.Fatal(err)
					}
					for i := range 8 {
						name := filepath.Join(dir, fmt.Sprint("file", i))
						if round == 0 {
							put(t, dir, filepath.Base(name), want)
						} else if got, err := os.ReadFile(name); err != nil || !bytes.Equal(got, want) {
							t.Errorf("%s: %d bytes, %v", name, len(got), err)
						}
					}
					machine.Unmount(t, dir)
				}
				if out, err := exec.Command("sh", "-c", tt.check+" "+s.dev.Path()).CombinedOutput(); err != nil {
					t.Errorf("%s: %v: %s", tt.check, err, out)
				}
				s.close()
			})
		}
	})
}

// TestDiscard: what the guest discards is zeros, and its room on the disk is free again.
// dm-user knows no discard; there it is zeroed.
func TestDiscard(t *testing.T) {
	each(t, func(t *testing.T, tr transport.Transport) {
		const size, from, n = 32 << 20, 8 << 20, 16 << 20
		base := emptyBase(t, size)
		s := serve(t, tr, volume.Spec{Size: size, Base: base})
		f := devicetest.Open(t, s.dev.Path(), os.O_RDWR)
		buf := devicetest.Aligned(t, 1<<20)
		for i := range buf {
			buf[i] = byte(i>>9) | 1
		}
		want := bytes.Repeat(buf, size/len(buf))
		for off := int64(0); off < size; off += int64(len(buf)) {
			if _, err := f.WriteAt(buf, off); err != nil {
				t.Fatal(err)
			}
		}
		if err := f.Sync(); err != nil {
			t.Fatal(err)
		}
		before := room(t, base)
		request, frees := uintptr(devicetest.Discard), true
		if tr.Name() == "dm-user" {
			request, frees = devicetest.ZeroOut, false
		}
		if err := errors.Join(devicetest.RangeIoctl(f, request, from, n), f.Sync(), f.Close()); err != nil {
			t.Fatal(err)
		}
		clear(want[from : from+n])
		same(t, "the device", s.content(), want)
		s.close()
		got, err := os.ReadFile(base)
		if err != nil {
			t.Fatal(err)
		}
		same(t, "the base", got, want)
		if after := room(t, base); frees && after > before-n*9/10 {
			t.Errorf("the base had %d bytes on disk, and has %d after a discard of %d", before, after, n)
		}
	})
}

// emptyBase is a base without data.
func emptyBase(t *testing.T, size int64) string {
	t.Helper()
	path := put(t, t.TempDir(), "base.img", nil)
	if err := os.Truncate(path, size); err != nil {
		t.Fatal(err)
	}
	return path
}

// room is how many bytes a file takes on disk.
func room(t *testing.T, name string) int64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(name, &st); err != nil {
		t.Fatal(err)
	}
	return st.Blocks * 512
}
