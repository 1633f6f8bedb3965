package main

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/snapmerge/snapmerge/pkg/blockio"
	"github.com/snapmerge/snapmerge/pkg/cow"
	"github.com/snapmerge/snapmerge/pkg/snapshot"
	"github.com/snapmerge/snapmerge/test/cowgen"
	"github.com/snapmerge/snapmerge/test/machine"
)

// generate makes an image on disk: base.img and cow.img in dir.
func generate(t testing.TB, dir string, spec cowgen.Spec) cowgen.Image {
	t.Helper()
	im, err := cowgen.Make(rand.New(rand.NewPCG(1, 2)), spec)
	check(t, err)
	put(t, dir, "base.img", im.Base)
	put(t, dir, "cow.img", im.COW)
	return im
}

// slow is an image whose merge takes seconds at 1 MiB/s, of which the first
// MiB is a burst.
var slow = cowgen.Spec{Blocks: 2048, Ops: cowgen.Shift(0, 1000, 1), Replaces: 400, Scratch: true}

// slowest takes so long at 1 MiB/s that it is interrupted in the middle on any
// machine.
var slowest = cowgen.Spec{Blocks: 8192, Ops: cowgen.Shift(0, 5000, 1), Replaces: 1000, Scratch: true}

// modes are the two homes of progress.
func modes(dir string) map[string][]string {
	base := []string{"merge", "--base", filepath.Join(dir, "base.img"), "--cow", filepath.Join(dir, "cow.img"), "--json", "--quiet"}
	return map[string][]string{
		"journal":  append(base[:len(base):len(base)], "--journal", filepath.Join(dir, "journal"), "--window", "512KiB"),
		"in place": append(base[:len(base):len(base)], "--in-place"),
	}
}

// begun starts a slow merge in a process and waits until it has written to the
// base.
func begun(t testing.TB, dir string, before []byte, args ...string) *process {
	t.Helper()
	p := start(t, append(args, "--rate", "1")...)
	until(t, "write to the base", func() bool {
		return !bytes.Equal(get(t, filepath.Join(dir, "base.img")), before)
	})
	return p
}

func TestInterruptAndResume(t *testing.T) {
	for name := range modes("") {
		for _, s := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGKILL} {
			t.Run(fmt.Sprintf("%s, %v", name, s), func(t *testing.T) {
				dir := t.TempDir()
				args := modes(dir)[name]
				im := generate(t, dir, slowest)
				p := begun(t, dir, im.Base, args...)
				p.signal(s)
				r := p.wait()
				if s != syscall.SIGKILL {
					r.want(t, 5, "interrupted", "base.img is merged in part")
					if o := r.object(t); o["done"] != false {
						t.Errorf("result %v", o)
					}
				}
				o := sm(t, args...).want(t, 0).object(t)
				wantKeys(t, o, "done", "seconds", "ops", "blocks", "bytes_read", "bytes_written", "scratch_bytes", "flushes", "io", "resumes")
				if o["done"] != true || o["resumes"] != 1.0 || o["ops"] != 6000.0 {
					t.Errorf("result %v", o)
				}
				wantSame(t, "the base", get(t, filepath.Join(dir, "base.img")), im.Want)
			})
		}
	}
}

func TestSecondOwner(t *testing.T) {
	dir := t.TempDir()
	// Longer than anybody waits for a lock.
	im := generate(t, dir, slowest)
	args := modes(dir)["journal"]
	p := begun(t, dir, im.Base, args...)
	sm(t, args...).want(t, 1, "base.img", "locked by another owner")
	p.signal(syscall.SIGINT)
	p.wait().want(t, 5)
}

func TestJournalTrouble(t *testing.T) {
	dir := t.TempDir()
	im := generate(t, dir, slowest)
	args := modes(dir)["journal"]
	p := begun(t, dir, im.Base, args...)
	p.signal(syscall.SIGINT)
	p.wait().want(t, 5)
	base, journal := filepath.Join(dir, "base.img"), filepath.Join(dir, "journal")
	halfBase, halfJournal := get(t, base), get(t, journal)

	// What follows must leave the base as it is.
	refused := func(t *testing.T, args []string, text ...string) {
		t.Helper()
		sm(t, args...).want(t, 3, text...)
		wantSame(t, "the base", get(t, base), halfBase)
	}
	with := func(flag, value string) []string {
		changed := append([]string(nil), args...)
		for i := range changed {
			if changed[i] == flag {
				changed[i+1] = value
			}
		}
		return changed
	}
	t.Run("missing", func(t *testing.T) {
		refused(t, with("--journal", filepath.Join(dir, "other")), "base.img", "half merged", "journal")
	})
	t.Run("in place instead", func(t *testing.T) {
		refused(t, modes(dir)["in place"], "base.img", "half merged")
	})
	t.Run("another COW", func(t *testing.T) {
		other := t.TempDir()
		spec := slowest
		spec.Replaces--
		generate(t, other, spec)
		refused(t, with("--cow", filepath.Join(other, "cow.img")), "journal", "COW")
	})
	t.Run("another base", func(t *testing.T) {
		other := put(t, t.TempDir(), "base.img", im.Base)
		sm(t, with("--base", other)...).want(t, 3, "journal", other)
		wantSame(t, "the other base", get(t, other), im.Base)
	})
	t.Run("damaged in both slots", func(t *testing.T) {
		bad := bytes.ReplaceAll(halfJournal, []byte("SNPMSLOT"), []byte("SNPMSLUT"))
		put(t, dir, "journal", bad)
		refused(t, args, journal, "byte 4096", "wrong magic")
		put(t, dir, "journal", halfJournal)
	})
	t.Run("cut off", func(t *testing.T) {
		put(t, dir, "journal", halfJournal[:5000])
		refused(t, args, journal, "byte 5000")
		put(t, dir, "journal", halfJournal)
	})
	t.Run("no journal at all", func(t *testing.T) {
		put(t, dir, "journal", im.COW)
		refused(t, args, journal, "byte 0", "magic")
		put(t, dir, "journal", halfJournal)
	})
	// And with the right one all is well.
	sm(t, args...).want(t, 0)
	wantSame(t, "the base", get(t, base), im.Want)
}

func TestBadBase(t *testing.T) {
	dir := t.TempDir()
	im := generate(t, dir, slow)
	for name, args := range modes(dir) {
		for _, size := range []int{0, 512, 4096, len(im.Base) / 2, len(im.Base) - 512} {
			put(t, dir, "base.img", im.Base[:size])
			sm(t, args...).want(t, 3, "base.img", fmt.Sprintf("byte %d", size))
			wantSame(t, "the base, "+name, get(t, filepath.Join(dir, "base.img")), im.Base[:size])
		}
	}
	wantSame(t, "the COW", get(t, filepath.Join(dir, "cow.img")), im.COW)
}

func TestDifference(t *testing.T) {
	dir := t.TempDir()
	im := generate(t, dir, cowgen.Spec{Blocks: 600, Copies: 100, Replaces: 100, Zeros: 20})
	base, file := filepath.Join(dir, "base.img"), filepath.Join(dir, "cow.img")
	verify := func(target []byte) result {
		return sm(t, "cow", "verify", file, "--base", base, "--target", put(t, dir, "target", target), "--json")
	}
	wantKeys(t, verify(im.Want).want(t, 0).object(t), "ok", "file", "structure", "sums", "view")
	bad := bytes.Clone(im.Want)
	bad[300*4096+17] ^= 1
	if r := verify(bad).want(t, 4, "block 300", "byte 1228800"); r.stdout != "" {
		t.Errorf("stdout %q", r.stdout)
	}
	verify(im.Want[:len(im.Want)-4096]).want(t, 4, "bytes")
	verify(append(bytes.Clone(im.Want), make([]byte, 4096)...)).want(t, 4, "bytes")
}

func TestBadData(t *testing.T) {
	dir := t.TempDir()
	im := generate(t, dir, cowgen.Spec{Blocks: 600, Replaces: 300, Compression: cow.Zstd})
	bad := bytes.Clone(im.COW)
	for i := len(bad) - 300; i < len(bad); i++ {
		bad[i] = 0xff
	}
	file := put(t, dir, "cow.img", bad)
	base, target := filepath.Join(dir, "base.img"), put(t, dir, "target", im.Want)
	sm(t, "cow", "verify", file, "--base", base, "--target", target).want(t, 3, file, "byte ")
	sm(t, "cow", "extract", "--cow", file, "--base", base, "--out", filepath.Join(dir, "out")).want(t, 3, file, "byte ")
	if _, err := os.Stat(filepath.Join(dir, "out")); !os.IsNotExist(err) {
		t.Errorf("half an image stays behind: %v", err)
	}
	for name := range modes("") {
		dir := t.TempDir()
		put(t, dir, "base.img", im.Base)
		file := put(t, dir, "cow.img", bad)
		t.Log(name)
		sm(t, modes(dir)[name]...).want(t, 3, file, "byte ")
	}
}

// TestSums: a sum beside a COW finds what its structure does not show.
func TestSums(t *testing.T) {
	dir := t.TempDir()
	im := generate(t, dir, cowgen.Spec{Blocks: 600, Replaces: 300})
	file := filepath.Join(dir, "cow.img")
	check(t, writeSums(t, file))
	if o := sm(t, "cow", "verify", file, "--json").want(t, 0).object(t); o["sums"] != true {
		t.Errorf("%v", o)
	}
	bad := bytes.Clone(im.COW)
	bad[len(bad)-100] ^= 1
	put(t, dir, "cow.img", bad)
	sm(t, "cow", "verify", file).want(t, 3, file, "byte ", "checksum")
}

func TestExtractWithoutBase(t *testing.T) {
	dir := t.TempDir()
	out := filepath.Join(dir, "out")
	generate(t, dir, cowgen.Spec{Blocks: 64, Copies: 10, Replaces: 10})
	file := filepath.Join(dir, "cow.img")
	sm(t, "cow", "extract", "--cow", file, "--out", out).want(t, 2, file, "needs a base")

	im := generate(t, dir, cowgen.Spec{Blocks: 64, Replaces: 60, Zeros: 4})
	sm(t, "cow", "extract", "--cow", file, "--out", out).want(t, 0)
	got := get(t, out)
	if len(got) == 0 || len(got) > len(im.Want) {
		t.Fatalf("%d bytes", len(got))
	}
	target := bytes.Clone(im.Want) // what the COW does not write is zero
	check(t, os.Truncate(out, int64(len(target))))
	for b := 0; b < len(target); b += 4096 {
		if bytes.Equal(target[b:b+4096], im.Base[b:b+4096]) {
			clear(target[b : b+4096])
		}
	}
	wantSame(t, "the image", get(t, out), target)
	sm(t, "cow", "verify", file, "--base", "none", "--target", out).want(t, 0)
	sm(t, "cow", "extract", "--cow", file, "--out", out).want(t, 1, out, "exists")
}

func TestMissingFiles(t *testing.T) {
	dir := t.TempDir()
	for _, args := range [][]string{
		{"cow", "inspect", filepath.Join(dir, "none")},
		{"cow", "verify", dir},
		modes(dir)["in place"],
		modes(dir)["journal"],
	} {
		sm(t, args...).want(t, 1, dir)
	}
}

func TestLabels(t *testing.T) {
	dir := t.TempDir()
	generate(t, dir, cowgen.Spec{Blocks: 64, Replaces: 10})
	file := filepath.Join(dir, "cow.img")
	sm(t, "cow", "inspect", file, "--label", "7").want(t, 3, file, "label 7")
}

// TestFullDisk: out of space in the middle stops the merge, and with more space
// it goes on.
func TestFullDisk(t *testing.T) {
	for _, fs := range []string{"tmpfs", "ext4"} {
		for name := range modes("") {
			t.Run(fs+", "+name, func(t *testing.T) {
				dir := smallFS(t, fs, 24<<20)
				ballast := put(t, dir, "ballast", make([]byte, 17<<20))
				full := cowgen.Spec{Blocks: 3072, Ops: cowgen.Shift(0, 100, 1), Replaces: 2000, Scratch: true}
				work := t.TempDir()
				im := generate(t, work, full)
				base := filepath.Join(dir, "base.img")
				sparse(t, base, im.Base, 101*4096)
				args := modes(dir)[name]
				for i := range args {
					if args[i] == "--cow" {
						args[i+1] = filepath.Join(work, "cow.img")
					}
				}
				for i := 101 * 4096; i < len(im.Want); i += 4096 {
					if bytes.Equal(im.Want[i:i+4096], im.Base[i:i+4096]) {
						clear(im.Want[i : i+4096])
					}
				}
				r := sm(t, args...).want(t, 5, "no space left")
				if o := r.object(t); o["done"] != false || o["ops"] == 2100.0 {
					t.Errorf("%v", o)
				}
				sm(t, args...).want(t, 5, "no space left") // still
				check(t, os.Remove(ballast))
				sm(t, args...).want(t, 0)
				wantSame(t, "the base", get(t, base), im.Want)
			})
		}
	}
}

// TestNoRoomForJournal: a merge that cannot even begin does not speak of a base that
// is merged in part.
func TestNoRoomForJournal(t *testing.T) {
	dir := t.TempDir()
	im := generate(t, dir, slow)
	args := modes(dir)["journal"]
	sm(t, append(args, "--journal", filepath.Join(smallFS(t, "tmpfs", 64<<10), "journal"))...).want(t, 5, "is not merged yet", "no space left")
	wantSame(t, "the base", get(t, filepath.Join(dir, "base.img")), im.Base)
}

// sparse writes the first n bytes of content and leaves the rest a hole.
func sparse(t testing.TB, path string, content []byte, n int) {
	t.Helper()
	check(t, os.WriteFile(path, content[:n], 0o600))
	check(t, os.Truncate(path, int64(len(content))))
}

// smallFS mounts a new file system of the size in bytes.
func smallFS(t testing.TB, kind string, size int64) string {
	t.Helper()
	needRoot(t)
	dir := t.TempDir()
	if kind == "tmpfs" {
		check(t, unix.Mount("tmpfs", dir, "tmpfs", 0, fmt.Sprintf("size=%d", size)))
	} else {
		machine.NeedFS(t, kind)
		dev := loopDevice(t, size)
		tool(t, "mkfs."+kind, "-q", dev)
		check(t, unix.Mount(dev, dir, kind, 0, ""))
	}
	t.Cleanup(func() { machine.Unmount(t, dir) })
	return dir
}

func loopDevice(t testing.TB, size int64) string {
	t.Helper()
	img := put(t, t.TempDir(), "disk.img", nil)
	check(t, os.Truncate(img, size))
	dev := tool(t, "losetup", "--find", "--show", img)
	t.Cleanup(func() { tool(t, "losetup", "--detach", dev) })
	return dev
}

func needRoot(t testing.TB) {
	t.Helper()
	machine.NeedDevices(t, machine.Loop)
}

// tool runs a program of the machine, without which the test is skipped.
func tool(t testing.TB, name string, args ...string) string {
	t.Helper()
	if _, err := exec.LookPath(name); err != nil {
		t.Skipf("needs %s: %v", name, err)
	}
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(string(out))
}

// TestBlockDevice: a base that is a device is merged, one that is mounted is
// left alone.
func TestBlockDevice(t *testing.T) {
	needRoot(t)
	dir := t.TempDir()
	im := generate(t, dir, slow)
	dev := loopDevice(t, int64(len(im.Base)))
	f, err := os.OpenFile(dev, os.O_WRONLY, 0)
	check(t, err)
	_, err = f.Write(im.Base)
	check(t, err)
	check(t, f.Sync())
	check(t, f.Close())
	args := []string{"merge", "--base", dev, "--cow", filepath.Join(dir, "cow.img"), "--journal", filepath.Join(dir, "journal"), "--verify", "--json"}
	sm(t, args...).want(t, 0)
	wantSame(t, "the device", get(t, dev), im.Want)

	tool(t, "mkfs.ext4", "-q", dev)
	mounted := t.TempDir()
	check(t, unix.Mount(dev, mounted, "ext4", unix.MS_RDONLY, ""))
	defer func() { check(t, unix.Unmount(mounted, 0)) }()
	before := get(t, dev)
	args[6] = filepath.Join(dir, "journal2")
	sm(t, args...).want(t, 1, dev, "mounted")
	wantSame(t, "the mounted device", get(t, dev), before)
}

func writeSums(t testing.TB, file string) error {
	return snapshot.WriteSums(t.Context(), blockio.OS(), file)
}
