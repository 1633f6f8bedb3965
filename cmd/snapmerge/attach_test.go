package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/snapmerge/snapmerge/pkg/transport/fuseloop"
	"github.com/snapmerge/snapmerge/pkg/volume"
	"github.com/snapmerge/snapmerge/test/cowgen"
	"github.com/snapmerge/snapmerge/test/fixtures"
)

// needFUSE skips where the transport does not work.
func needFUSE(t testing.TB) {
	t.Helper()
	needRoot(t)
	if err := probeFUSE(); err != nil {
		t.Skip(err)
	}
}

var probeFUSE = sync.OnceValue(func() error { return fuseloop.New(nil).Probe() })

// attachArgs are the flags for what generate has made in dir.
func attachArgs(dir string, more ...string) []string {
	return append([]string{"attach", "--base", filepath.Join(dir, "base.img"), "--cow", filepath.Join(dir, "cow.img"),
		"--state", filepath.Join(dir, "state"), "--quiet"}, more...)
}

// lines returns the complete lines that a process has written so far.
func (p *process) lines() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	whole := p.out.String()
	return strings.SplitAfter(whole[:strings.LastIndexByte(whole, '\n')+1], "\n")
}

// attached starts attach and returns it with its device.
func attached(t testing.TB, args ...string) (*process, string) {
	t.Helper()
	p := start(t, args...)
	until(t, "device", func() bool {
		select {
		case <-p.done:
			t.Fatalf("attach has ended: %+v", p.wait())
		default:
		}
		return len(p.lines()) > 1
	})
	first := strings.TrimSpace(p.lines()[0])
	if strings.HasPrefix(first, "{") {
		var s volume.Status
		check(t, json.Unmarshal([]byte(first), &s))
		first = s.Device
	}
	if !strings.HasPrefix(first, "/dev/") {
		t.Fatalf("no device: %q", first)
	}
	return p, first
}

// end interrupts attach.
func (p *process) end(code int, text ...string) {
	p.t.Helper()
	p.signal(syscall.SIGINT)
	p.wait().want(p.t, code, text...)
}

func TestAttachFixtures(t *testing.T) {
	needFUSE(t)
	fixtures.Each(t, func(t *testing.T, c fixtures.Case) {
		sample(t)
		for _, w := range cowsOf(c) {
			dir := t.TempDir()
			base := put(t, dir, "base.img", c.Base)
			file := put(t, dir, "cow.img", w.data)
			p, dev := attached(t, append(attachArgs(dir, "--no-merge"), w.args...)...)
			wantSame(t, w.name+" on the device", get(t, dev), c.Expected)
			p.end(0)
			wantSame(t, "the base", get(t, base), c.Base)
			wantSame(t, "the COW", get(t, file), w.data)
		}
	})
}

// TestAttachMerges: writes to the device during a merge that is interrupted and
// resumed are all in the base in the end.
func TestAttachMerges(t *testing.T) {
	needFUSE(t)
	for name, s := range map[string]syscall.Signal{"interrupted": syscall.SIGINT, "killed": syscall.SIGKILL} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			im := generate(t, dir, slowest)
			args := attachArgs(dir, "--json")
			p, dev := attached(t, append(args, "--rate", "1")...)
			f, err := os.OpenFile(dev, os.O_RDWR|unix.O_DIRECT, 0)
			check(t, err)
			block := aligned(t, 4096)
			for b := 0; b < 2000; b += 37 {
				for i := range block {
					block[i] = byte(b + i)
				}
				_, err := f.WriteAt(block, int64(b)*4096)
				check(t, err)
				copy(im.Want[b*4096:], block)
			}
			check(t, f.Close())
			wantSame(t, "the device", get(t, dev), im.Want)
			p.signal(s)
			r := p.wait()
			if s == syscall.SIGINT {
				r.want(t, 5, "%", "interrupted")
			}

			p, dev = attached(t, args...)
			wantSame(t, "the device after the restart", get(t, dev), im.Want)
			until(t, "end of the merge", func() bool { return p.lastStatus().State == volume.Merged })
			wantSame(t, "the device after the merge", get(t, dev), im.Want)
			s := p.lastStatus()
			if s.Percent != 100 || s.Layers != 0 || s.Device != dev || s.Transport != "fuse" {
				t.Errorf("status %+v", s)
			}
			p.end(0)
			wantSame(t, "the base", get(t, filepath.Join(dir, "base.img")), im.Want)
			// And once more: there is nothing left to merge.
			p, dev = attached(t, args...)
			wantSame(t, "the device of a merged volume", get(t, dev), im.Want)
			p.end(0)
		})
	}
}

// lastStatus is the last status that was written.
func (p *process) lastStatus() (s volume.Status) {
	p.t.Helper()
	lines := p.lines()
	if len(lines) < 2 {
		return s
	}
	check(p.t, json.Unmarshal([]byte(lines[len(lines)-2]), &s))
	return s
}

// aligned is memory for direct I/O.
func aligned(t testing.TB, n int) []byte {
	t.Helper()
	p, err := unix.Mmap(-1, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	check(t, err)
	t.Cleanup(func() { check(t, unix.Munmap(p)) })
	return p
}

func TestAttachJSON(t *testing.T) {
	needFUSE(t)
	dir := t.TempDir()
	generate(t, dir, slow)
	p, _ := attached(t, attachArgs(dir, "--json", "--no-merge")...)
	p.signal(syscall.SIGTERM)
	for _, o := range p.wait().want(t, 0).objects(t) {
		wantKeys(t, o, statusKeys...)
		if o["state"] != "paused" {
			t.Errorf("state %v", o["state"])
		}
	}
}

// statusKeys are those that the contract names.
var statusKeys = []string{"id", "state", "percent", "bytes_done", "bytes_total", "rate_mib_s", "eta_seconds", "layers", "log_bytes", "transport", "device", "error"}

// TestAttachReadOnly: a device that refuses writes, whose COW is merged all the
// same unless that is not wanted.
func TestAttachReadOnly(t *testing.T) {
	needFUSE(t)
	dir := t.TempDir()
	im := generate(t, dir, slow)
	p, dev := attached(t, attachArgs(dir, "--read-only", "--no-merge", "--json")...)
	if f, err := os.OpenFile(dev, os.O_WRONLY, 0); err == nil {
		if _, err := f.Write(make([]byte, 4096)); err == nil {
			t.Error("the device takes writes")
		}
		f.Close()
	}
	wantSame(t, "the device", get(t, dev), im.Want)
	p.end(0)
	wantSame(t, "the base", get(t, filepath.Join(dir, "base.img")), im.Base)

	p, dev = attached(t, attachArgs(dir, "--read-only", "--json")...)
	until(t, "end of the merge", func() bool { return p.lastStatus().State == volume.Merged })
	wantSame(t, "the device after the merge", get(t, dev), im.Want)
	p.end(0)
	wantSame(t, "the base after the merge", get(t, filepath.Join(dir, "base.img")), im.Want)
}

// TestAttachLooksOnly: a base that was only looked at belongs to nobody.
func TestAttachLooksOnly(t *testing.T) {
	needFUSE(t)
	dir := t.TempDir()
	im := generate(t, dir, slow)
	p, _ := attached(t, attachArgs(dir, "--read-only", "--no-merge")...)
	sm(t, modes(dir)["journal"]...).want(t, 1, "base.img", "locked")
	p.end(0)
	sm(t, modes(dir)["journal"]...).want(t, 0)
	wantSame(t, "the base", get(t, filepath.Join(dir, "base.img")), im.Want)
}

// TestAttachHalfMerged: with a write log, or half merged, the base belongs to
// the state directory.
func TestAttachHalfMerged(t *testing.T) {
	needFUSE(t)
	dir := t.TempDir()
	generate(t, dir, slow)
	p, _ := attached(t, attachArgs(dir, "--no-merge")...)
	p.end(0)
	sm(t, modes(dir)["journal"]...).want(t, 3, "base.img", "journal")
	sm(t, modes(dir)["in place"]...).want(t, 3, "base.img", "journal")
}

// TestAttachStack serves two COWs, one above the other.
func TestAttachStack(t *testing.T) {
	needFUSE(t)
	dir := t.TempDir()
	im := generate(t, dir, cowgen.Spec{Blocks: 600, Copies: 100, Replaces: 100, Zeros: 20})
	upper := generate(t, t.TempDir(), cowgen.Spec{Blocks: 600, Replaces: 200, Zeros: 50})
	want := bytes.Clone(im.Want)
	for b := 0; b < len(want); b += 4096 {
		if !bytes.Equal(upper.Base[b:b+4096], upper.Want[b:b+4096]) {
			copy(want[b:b+4096], upper.Want[b:b+4096])
		}
	}
	args := attachArgs(dir, "--json", "--cow", put(t, dir, "upper.img", upper.COW))
	p, dev := attached(t, append(args, "--no-merge")...)
	wantSame(t, "the device", get(t, dev), want)
	p.end(0)
	p, dev = attached(t, args...)
	until(t, "end of the merge", func() bool { return p.lastStatus().State == volume.Merged })
	wantSame(t, "the device after the merge", get(t, dev), want)
	p.end(0)
	wantSame(t, "the base", get(t, filepath.Join(dir, "base.img")), want)
}

// TestAttachInUse: a device in use is not taken away at the first interrupt, but
// at the second.
func TestAttachInUse(t *testing.T) {
	needFUSE(t)
	dir := t.TempDir()
	im := generate(t, dir, slow)
	for _, forced := range []bool{false, true} {
		p := start(t, "attach", "--base", filepath.Join(dir, "base.img"), "--cow", filepath.Join(dir, "cow.img"), "--state", filepath.Join(dir, "state"), "--no-merge")
		until(t, "device", func() bool { return len(p.lines()) > 1 })
		dev := strings.TrimSpace(p.lines()[0])
		f, err := os.Open(dev)
		check(t, err)
		p.signal(syscall.SIGINT)
		until(t, "word of the device's users", func() bool {
			p.mu.Lock()
			defer p.mu.Unlock()
			return strings.Contains(p.err.String(), "waiting for the users of "+dev)
		})
		got := make([]byte, len(im.Want))
		_, err = f.ReadAt(got, 0)
		check(t, err)
		wantSame(t, "the device that is waited for", got, im.Want)
		if forced {
			p.signal(syscall.SIGINT)
			p.wait()
		}
		check(t, f.Close())
		if r := p.wait(); r.code != 0 {
			t.Errorf("forced %v: %+v", forced, r)
		}
	}
}

// TestAttachLeftAlone: without a reader of its output attach goes on, and when the
// terminal is lost it takes its device along.
func TestAttachLeftAlone(t *testing.T) {
	needFUSE(t)
	dir := t.TempDir()
	generate(t, dir, slow)
	p := newProcess(t, "attach", "--base", filepath.Join(dir, "base.img"), "--cow", filepath.Join(dir, "cow.img"), "--state", filepath.Join(dir, "state"), "--json")
	p.cmd.Stdout = unread(t)
	// Under nohup it would be ignored, and attach would rightly stay.
	hangUps := make(chan os.Signal, 1)
	signal.Notify(hangUps, syscall.SIGHUP)
	defer signal.Stop(hangUps)
	p.start()
	until(t, "merge", func() bool {
		select {
		case <-p.done:
			t.Fatalf("attach has ended: %+v", p.wait())
		default:
		}
		p.mu.Lock()
		defer p.mu.Unlock()
		return strings.Contains(p.err.String(), "stays in service until")
	})
	p.signal(syscall.SIGHUP)
	if r := p.wait(); r.code != 0 { // it has detached the device
		t.Errorf("%+v", r)
	}
}

func TestAttachRefuses(t *testing.T) {
	needFUSE(t)
	dir := t.TempDir()
	im := generate(t, dir, slow)
	other := t.TempDir()
	spec := slow
	spec.Replaces--
	generate(t, other, spec)
	base, file, state := filepath.Join(dir, "base.img"), filepath.Join(dir, "cow.img"), filepath.Join(dir, "state")

	sm(t, "attach", "--base", base, "--cow", file).want(t, 2, "state")
	sm(t, "attach", "--base", base, "--state", state).want(t, 2, "cow")
	sm(t, attachArgs(dir, "--state", "")...).want(t, 2, "--state")
	sm(t, "attach", "--base", base, "--cow", base, "--state", state).want(t, 2, "same file")
	sm(t, attachArgs(dir, "--transport", "pigeon")...).want(t, 2, "fuse")
	sm(t, attachArgs(other, "--base", filepath.Join(dir, "none"))...).want(t, 1, "none")
	sm(t, attachArgs(other, "--state", base)...).want(t, 1, base, "not a directory")

	small := put(t, dir, "small.img", im.Base[:4096])
	sm(t, attachArgs(dir, "--base", small)...).want(t, 3, small, "byte 4096")
	odd := put(t, dir, "odd.img", im.Base[:5000])
	sm(t, attachArgs(dir, "--base", odd)...).want(t, 3, odd, "byte 5000")
	broken := put(t, dir, "broken.img", im.COW[:len(im.COW)/2])
	sm(t, attachArgs(dir, "--cow", broken)...).want(t, 3, broken, "byte ")

	// What was refused has left no trace that matters.
	p, _ := attached(t, attachArgs(dir, "--no-merge")...)
	sm(t, attachArgs(dir)...).want(t, 1, "locked by another owner")
	p.end(0)

	for text, args := range map[string][]string{
		"is of base":     attachArgs(dir, "--base", filepath.Join(other, "base.img")),
		"COW 1 is":       {"attach", "--base", base, "--cow", filepath.Join(other, "cow.img"), "--state", state},
		"of 1 COWs":      attachArgs(dir, "--cow", filepath.Join(other, "cow.img")),
		"with read-only": attachArgs(dir, "--read-only"),
	} {
		sm(t, args...).want(t, 3, text)
	}
	put(t, dir, "cow.img", get(t, filepath.Join(other, "cow.img")))
	sm(t, attachArgs(dir)...).want(t, 3, file, "has changed")
	put(t, dir, "cow.img", im.COW)
	put(t, state, "attach.json", []byte("{"))
	sm(t, attachArgs(dir)...).want(t, 3, "attach.json")
	check(t, os.Remove(filepath.Join(state, "attach.json")))
	sm(t, attachArgs(dir)...).want(t, 3, "no attach.json")
	wantSame(t, "the base", get(t, base), im.Base)
}

// TestAttachBlockDevice: a base that is a device is served and merged; one that
// is mounted is left alone.
func TestAttachBlockDevice(t *testing.T) {
	needFUSE(t)
	dir := t.TempDir()
	im := generate(t, dir, slow)
	base := loopDevice(t, int64(len(im.Base)))
	f, err := os.OpenFile(base, os.O_WRONLY, 0)
	check(t, err)
	_, err = f.Write(im.Base)
	check(t, errors.Join(err, f.Sync(), f.Close()))
	args := attachArgs(dir, "--base", base, "--json")
	p, dev := attached(t, args...)
	until(t, "end of the merge", func() bool { return p.lastStatus().State == volume.Merged })
	wantSame(t, "the device", get(t, dev), im.Want)
	sm(t, "merge", "--base", base, "--cow", filepath.Join(dir, "cow.img"), "--in-place").want(t, 1, base, "in use")
	p.end(0)
	wantSame(t, "the base", get(t, base), im.Want)

	tool(t, "mkfs.ext4", "-q", base)
	mounted := t.TempDir()
	check(t, unix.Mount(base, mounted, "ext4", unix.MS_RDONLY, ""))
	defer func() { check(t, unix.Unmount(mounted, 0)) }()
	sm(t, args...).want(t, 1, base, "mounted")
}

// TestAttachFullDisk: without room for its state attach can be tried again.
func TestAttachFullDisk(t *testing.T) {
	needFUSE(t)
	dir := t.TempDir()
	im := generate(t, dir, slow)
	small := smallFS(t, "tmpfs", 1<<20)
	args := append(attachArgs(dir), "--state", filepath.Join(small, "state"), "--no-merge")
	sm(t, args...).want(t, 5, "no space left")
	check(t, unix.Mount("tmpfs", small, "tmpfs", unix.MS_REMOUNT, "size=256M"))
	p, dev := attached(t, args...)
	wantSame(t, "the device", get(t, dev), im.Want)
	p.end(0)
}

// TestThirdSignal: what the second signal sets going may hang, so a third ends
// the process. This test binary is that process too.
func TestThirdSignal(t *testing.T) {
	const asChild = "SNAPMERGE_TEST_SIGNALS"
	if os.Getenv(asChild) != "" {
		second, stop := secondSignal()
		defer stop()
		fmt.Println("watching")
		<-second
		fmt.Println("forced")
		select {}
	}
	cmd := exec.Command(os.Args[0], "-test.run=^TestThirdSignal$")
	cmd.Env = append(os.Environ(), asChild+"=1")
	out, err := cmd.StdoutPipe()
	check(t, err)
	check(t, cmd.Start())
	defer cmd.Process.Kill()
	lines := bufio.NewScanner(out)
	wait := func(want string) {
		t.Helper()
		for lines.Scan() {
			if lines.Text() == want {
				return
			}
		}
		t.Fatalf("it does not say %q", want)
	}
	wait("watching")
	check(t, cmd.Process.Signal(syscall.SIGTERM))
	// Two of one kind at once may be merged.
	check(t, cmd.Process.Signal(syscall.SIGINT))
	wait("forced")
	check(t, cmd.Process.Signal(syscall.SIGINT))
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	select {
	case err := <-ended:
		var exit *exec.ExitError
		if !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGINT {
			t.Errorf("it ends with %v", err)
		}
	case <-time.After(patience):
		t.Error("it is still there after the third signal")
	}
}
