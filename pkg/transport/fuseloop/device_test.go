package fuseloop

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/snapmerge/snapmerge/pkg/transport"
)

// TestRandomIO works on two devices at once and compares with a model.
func TestRandomIO(t *testing.T) {
	volumes := []string{"random-a", "random-b"}
	noLeftovers(t, volumes...)
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	tr := New(nil)
	var wg sync.WaitGroup
	defer wg.Wait()
	for i, v := range volumes {
		m := newMemBackend(8 << 20)
		d := create(t, tr, v, m, transport.Options{})
		f := openGuest(t, d.Path(), os.O_RDWR)
		buf := aligned(t, 1<<20)
		wg.Go(func() { randomIO(t, f, m, buf, rand.New(rand.NewPCG(seed, uint64(i)))) })
	}
	wg.Wait()
}

func randomIO(t *testing.T, f *os.File, m *memBackend, buf []byte, rng *rand.Rand) {
	const blocks = 8 << 20 / blockSize
	model := make([]byte, 8<<20)
	for i := range 400 {
		n := 1 + rng.IntN(len(buf)/blockSize)
		if rng.IntN(2) == 0 {
			n = 1 + rng.IntN(4)
		}
		off := int64(rng.IntN(blocks-n+1)) * blockSize
		p, want := buf[:n*blockSize], model[off:off+int64(n)*blockSize]
		var err error
		switch rng.IntN(6) {
		case 0, 1:
			for j := range p {
				p[j] = byte(rng.Uint32())
			}
			copy(want, p)
			_, err = f.WriteAt(p, off)
		case 2:
			clear(want)
			err = rangeIoctl(f, ioctlDiscard, off, int64(len(p)))
		case 3:
			clear(want)
			err = rangeIoctl(f, ioctlZeroOut, off, int64(len(p)))
		case 4:
			flushes := m.flushes.Load()
			if err = f.Sync(); err == nil && m.flushes.Load() == flushes {
				t.Errorf("step %d: a flush did not reach the backend", i)
			}
		default:
			_, err = f.ReadAt(p, off)
			if err == nil && !bytes.Equal(p, want) {
				t.Errorf("step %d: read %d blocks at %d wrong", i, n, off)
			}
		}
		if err != nil {
			t.Errorf("step %d: %v", i, err)
			return
		}
	}
	if !bytes.Equal(m.content(0, m.Size()), model) {
		t.Error("the backend has not what was written")
	}
	if m.zeros.Load() == 0 {
		t.Error("discards did not reach the backend")
	}
	if n := m.unaligned.Load(); n > 0 {
		t.Errorf("%d transfers with memory that is not page aligned", n)
	}
}

// TestCreateAtOnce has devices made at the same time, so that some find the loop
// device that they were to have taken; that is no end of theirs.
func TestCreateAtOnce(t *testing.T) {
	const makers, rounds = 8, 6
	var volumes []string
	for i := range makers {
		volumes = append(volumes, fmt.Sprintf("at-once-%d", i))
	}
	noLeftovers(t, volumes...)
	var wg sync.WaitGroup
	defer wg.Wait()
	for _, v := range volumes {
		wg.Go(func() {
			tr := New(nil)
			for range rounds {
				d, err := tr.Create(t.Context(), v, newMemBackend(1<<20), transport.Options{})
				if err != nil {
					t.Error(err)
					return
				}
				select {
				case <-d.(*device).srv.released:
					t.Errorf("%s: device is over as soon as it is made", v)
				default:
				}
				if err := d.Close(t.Context()); err != nil {
					t.Errorf("%s: %v", v, err)
					return
				}
			}
		})
	}
}

// TestDiscardIsWithin: what is discarded as dead is only ever one's own.
func TestDiscardIsWithin(t *testing.T) {
	noLeftovers(t)
	a, b := filepath.Join(t.TempDir(), "a"), t.TempDir()
	early := New(nil).Within(a)
	if err := os.Mkdir(a, 0o700); err != nil { // what makes the volumes makes it after the transport
		t.Fatal(err)
	}
	d := create(t, early, "same", newMemBackend(1<<20), transport.Options{})
	if err := New(nil).Within(b).Discard([]string{"same"}); err != nil {
		t.Fatal(err)
	}
	other := create(t, New(nil).Within(b), "same", newMemBackend(1<<20), transport.Options{})
	for _, d := range []*device{d, other} {
		if err := d.loop.check(); err != nil {
			t.Errorf("%s: %v", d.Path(), err)
		}
	}
	// Of the same place, as after a restart without a keeper.
	if err := New(nil).Within(a).Discard([]string{"same"}); err != nil {
		t.Fatal(err)
	}
	if err := d.loop.check(); err != errNotOurs {
		t.Errorf("%s is still there: %v", d.Path(), err)
	}
}

// TestDiscardNeedsToLook: where devices cannot be listed there is not nothing to discard.
func TestDiscardNeedsToLook(t *testing.T) {
	var had unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &had); err != nil {
		t.Fatal(err)
	}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 0, Max: had.Max}); err != nil {
		t.Fatal(err)
	}
	err := New(nil).Discard([]string{"v"})
	if e := unix.Setrlimit(unix.RLIMIT_NOFILE, &had); e != nil {
		t.Fatal(e)
	}
	if !errors.Is(err, unix.EMFILE) {
		t.Errorf("without a descriptor to look with: %v", err)
	}
}

// TestLargeIO checks that the kernel splits large transfers no further than it
// must: a request has 128 segments, which for scattered pages is 512 KiB.
func TestLargeIO(t *testing.T) {
	noLeftovers(t, "large")
	m := newMemBackend(8 << 20)
	d := create(t, New(nil), "large", m, transport.Options{})
	f := openGuest(t, d.Path(), os.O_RDWR)
	for _, mib := range []int{1, 8} {
		buf := aligned(t, mib<<20)
		var reads, writes int64
		most := int64(2*mib + 1)
		for range 5 { // others may be reading the new device, as udev does
			reads, writes = m.reads.Load(), m.writes.Load()
			if _, err := f.WriteAt(buf, 0); err != nil {
				t.Fatal(err)
			}
			if _, err := f.ReadAt(buf, 0); err != nil {
				t.Fatal(err)
			}
			reads, writes = m.reads.Load()-reads, m.writes.Load()-writes
			t.Logf("%d MiB became %d reads and %d writes, the largest of %d bytes", mib, reads, writes, m.largest.Load())
			if reads <= most && writes <= most {
				break
			}
		}
		if reads > most || writes > most {
			t.Errorf("%d MiB became %d reads and %d writes, want at most %d", mib, reads, writes, most)
		}
	}
}

func TestDeviceShape(t *testing.T) {
	noLeftovers(t, "shape")
	d := create(t, New(nil), "shape", newMemBackend(1<<20), transport.Options{})
	name := filepath.Base(d.Path())
	for file, want := range map[string]string{
		"size":                      "2048",
		"ro":                        "0",
		"queue/logical_block_size":  "4096",
		"queue/discard_granularity": "4096",
		"loop/dio":                  "1",
		"loop/backing_file":         "/disk-" + volumeHash("shape"),
	} {
		b, err := os.ReadFile(filepath.Join("/sys/block", name, file))
		if got := strings.TrimSpace(string(b)); err != nil || got != want {
			t.Errorf("%s is %q, want %q (%v)", file, got, want, err)
		}
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(mounts)) {
		// Other programs of ours may have mounts just now.
		if _, source, _ := strings.Cut(line, " - "); strings.HasPrefix(source, "fuse") && strings.Contains(source, "snapmerge") {
			t.Errorf("visible in the mount table: %s", line)
		}
	}
}

// TestHoldsNothing checks what must never be open in a serving process, and that
// a child inherits nothing.
func TestHoldsNothing(t *testing.T) {
	noLeftovers(t, "nothing")
	d := create(t, New(nil), "nothing", newMemBackend(1<<20), transport.Options{})
	for _, name := range openFiles(t) {
		if strings.Contains(name, "/disk-") || name == d.Path() {
			t.Errorf("holds %s", name)
		}
	}
	out, err := exec.Command("ls", "-l", "/proc/self/fd").CombinedOutput()
	if err != nil {
		t.Fatal(err)
	}
	if s := string(out); strings.Contains(s, "fuse") || strings.Contains(s, "eventpoll") || strings.Contains(s, "-> /\n") {
		t.Errorf("a child has inherited descriptors:\n%s", s)
	}
}

func TestErrorsReachTheGuest(t *testing.T) {
	noLeftovers(t, "errors")
	m := newMemBackend(1 << 20)
	d := create(t, New(nil), "errors", m, transport.Options{})
	f := openGuest(t, d.Path(), os.O_RDWR)
	buf := aligned(t, blockSize)
	for _, tt := range []struct{ give, want error }{
		{unix.ENOSPC, unix.ENOSPC},
		{fmt.Errorf("write log: %w", unix.ENOSPC), unix.ENOSPC},
		{unix.EIO, unix.EIO},
		{errors.New("no errno at all"), unix.EIO},
		{unix.ENOSYS, unix.EIO},
		{unix.EINTR, unix.EIO},
		{unix.EAGAIN, unix.EIO},
	} {
		m.failWith(tt.give)
		if _, err := f.WriteAt(buf, 0); !errors.Is(err, tt.want) {
			t.Errorf("backend's %v: write gives %v, want %v", tt.give, err, tt.want)
		}
		if _, err := f.ReadAt(buf, 0); !errors.Is(err, tt.want) {
			t.Errorf("backend's %v: read gives %v, want %v", tt.give, err, tt.want)
		}
		if err := f.Sync(); !errors.Is(err, unix.EIO) { // the loop driver knows no other
			t.Errorf("backend's %v: flush gives %v", tt.give, err)
		}
		if err := rangeIoctl(f, ioctlDiscard, 0, blockSize); err == nil {
			t.Errorf("backend's %v: discard succeeds", tt.give)
		}
		m.failWith(nil)
		// No error may have taught the kernel not to ask any more.
		flushes, zeros := m.flushes.Load(), m.zeros.Load()
		if err := errors.Join(f.Sync(), rangeIoctl(f, ioctlDiscard, 0, blockSize)); err != nil {
			t.Errorf("after %v: %v", tt.give, err)
		}
		if m.flushes.Load() == flushes || m.zeros.Load() == zeros {
			t.Errorf("after %v flush or discard do not arrive any more", tt.give)
		}
	}
}

func TestReadOnly(t *testing.T) {
	noLeftovers(t, "ro")
	m := newMemBackend(1 << 20)
	copy(m.data[blockSize:], "hello")
	d := create(t, New(nil), "ro", m, transport.Options{ReadOnly: true})
	f := openGuest(t, d.Path(), os.O_RDONLY)
	buf := aligned(t, blockSize)
	if _, err := f.ReadAt(buf, blockSize); err != nil || string(buf[:5]) != "hello" {
		t.Errorf("read %q, %v", buf[:5], err)
	}
	if w, err := os.OpenFile(d.Path(), os.O_RDWR, 0); err == nil {
		if _, err := w.WriteAt(make([]byte, blockSize), 0); err == nil {
			err = w.Sync()
			t.Errorf("write to a read-only device succeeds, sync says %v", err)
		}
		w.Close()
	}
	if m.writes.Load()+m.zeros.Load() != 0 {
		t.Error("the backend was written")
	}
	if b, err := os.ReadFile("/sys/block/" + filepath.Base(d.Path()) + "/ro"); err != nil || string(b) != "1\n" {
		t.Errorf("ro is %q, %v", b, err)
	}
	f.Close()
}

func TestResizeUnderIO(t *testing.T) {
	noLeftovers(t, "resize")
	const first, step, steps = 4 << 20, 4096 * 3, 40
	m := newMemBackend(first)
	d := create(t, New(nil), "resize", m, transport.Options{})
	f := openGuest(t, d.Path(), os.O_RDWR)
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	for i := range 3 {
		buf := aligned(t, 64<<10)
		wg.Go(func() {
			for off := int64(i) << 20; ctx.Err() == nil; off = (off + 64<<10) % first {
				if _, err := f.WriteAt(buf, off); err != nil {
					t.Errorf("write during resize: %v", err)
					return
				}
			}
		})
	}
	buf := aligned(t, blockSize)
	for i := range steps {
		size := int64(first + (i+1)*step)
		m.grow(size)
		if err := d.Resize(); err != nil {
			t.Fatal(err)
		}
		copy(buf, fmt.Sprint(size))
		if _, err := f.WriteAt(buf, size-blockSize); err != nil {
			t.Fatalf("last block of %d: %v", size, err)
		}
		if !bytes.HasPrefix(m.content(size-blockSize, blockSize), []byte(fmt.Sprint(size))) {
			t.Fatal("written elsewhere")
		}
	}
	cancel()
	wg.Wait()
	if err := d.Resize(); err != nil {
		t.Errorf("resize to the same size: %v", err)
	}
	m.grow(first + steps*step + 512)
	if err := d.Resize(); err == nil {
		t.Error("resize to half a block succeeds")
	}
	m.mu.Lock()
	m.data = m.data[:first]
	m.mu.Unlock()
	if err := d.Resize(); err == nil {
		t.Error("shrinking succeeds")
	}
	f.Close()
	closeDevice(t, d)
	if err := d.Resize(); err == nil {
		t.Error("resize of a closed device succeeds")
	}
}

func TestCreateRefuses(t *testing.T) {
	noLeftovers(t, "a")
	tr := New(nil)
	create(t, tr, "a", newMemBackend(1<<20), transport.Options{})
	over, cancel := context.WithCancel(context.Background())
	cancel()
	for _, tt := range []struct {
		name, volume string
		size         int64
		ctx          context.Context
		want         string
	}{
		{"no size", "b", 0, t.Context(), "not a multiple"},
		{"half a block", "b", 4096 + 512, t.Context(), "not a multiple"},
		{"no id", "", 4096, t.Context(), "empty volume id"},
		{"twice", "a", 4096, t.Context(), "already"},
	} {
		if _, err := tr.Create(tt.ctx, tt.volume, newMemBackend(tt.size), transport.Options{}); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v", tt.name, err)
		}
	}
	// With an ended context it works or not, but leaves nothing.
	if d, err := tr.Create(over, "b", newMemBackend(4096), transport.Options{}); err == nil {
		closeDevice(t, d)
	}
	create(t, tr, "b", newMemBackend(4096), transport.Options{})
	if _, err := tr.Adopt(t.Context(), "c", newMemBackend(4096)); !errors.Is(err, transport.ErrNotFound) {
		t.Errorf("adopt without a keeper: %v", err)
	}
}
