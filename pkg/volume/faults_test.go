package volume

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"path"
	"syscall"
	"testing"

	"github.com/snapmerge/snapmerge/pkg/blockio/crashfs"
	"github.com/snapmerge/snapmerge/test/cowgen"
)

// newVolume makes a volume on a disk of its own and opens it.
func newVolume(t *testing.T, fs *crashfs.FS, spec Spec) *Volume {
	t.Helper()
	spec.ID, spec.SegmentBytes, spec.WindowBlocks = "v", 16<<10, 3
	if err := errors.Join(Create(fs, "/s/v", spec), fs.SyncDir("/s"), fs.SyncDir("/")); err != nil {
		t.Fatal(err)
	}
	v, err := openVolume(fs)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// restoredVolume is a new volume of a base and a COW, and what they were made of.
func restoredVolume(t *testing.T, seed rand.Source, spec cowgen.Spec) (*crashfs.FS, *Volume, cowgen.Image) {
	t.Helper()
	im, err := cowgen.Make(rand.New(seed), spec)
	if err != nil {
		t.Fatal(err)
	}
	fs := crashfs.New("/s")
	for name, content := range map[string][]byte{"base": im.Base, "data.cow": im.COW} {
		if err := fs.Put("/s/"+name, content); err != nil {
			t.Fatal(err)
		}
	}
	v := newVolume(t, fs, Spec{Size: int64(spec.Blocks) * bs, Base: "/s/base", COWs: []COWSource{{Path: "/s/data.cow", Link: true}}})
	return fs, v, im
}

// TestFaults has the disk fail for one to four steps in a row, at every step of a
// volume's life: with ENOSPC, and with EIO. Requests may fail then, but what was
// acknowledged stays, the volume can be opened again, and once the disk works it
// is merged to its end.
func TestFaults(t *testing.T) {
	t.Parallel()
	lives, poisoned := 0, 0
	for _, errno := range []syscall.Errno{syscall.ENOSPC, syscall.EIO} {
		for n := range int64(4) {
			for first := int64(1); ; first++ {
				hit, failed := faultyLife(t, errno, first, n+1)
				if !hit || t.Failed() {
					break
				}
				lives++
				if failed {
					poisoned++
				}
				if failed && errno == syscall.ENOSPC {
					t.Fatalf("a full disk at step %d takes the volume out of service", first)
				}
			}
		}
	}
	t.Logf("%d lives, %d of which ended in a volume that takes no writes", lives, poisoned)
}

// faultyLife lives with n failing steps from the first on. It returns whether
// there were that many steps and whether the volume took no writes any more.
func faultyLife(t *testing.T, errno syscall.Errno, first, n int64) (hit, poisoned bool) {
	fs, v, im := restoredVolume(t, rand.NewPCG(9, 9), cowgen.Spec{Blocks: 16, Copies: 5, Xors: 2, Replaces: 2, Zeros: 1})
	f := &faulty{v: v, o: newOracle(im.Want), unsure: map[int]bool{}}
	start := fs.Steps()
	var at []crashfs.Step
	passed := 0
	fs.OnStep(func(s crashfs.Step) error {
		if d := s.N - start - first; d < 0 || d >= n {
			return nil
		}
		if errno == syscall.ENOSPC && s.Op != crashfs.OpWrite && s.Op != crashfs.OpCreate && s.Op != crashfs.OpAllocate { // these need room
			passed++
			return nil
		}
		at = append(at, s)
		return errno
	})
	f.live()
	fs.OnStep(nil)
	poisoned = v.failed() != nil
	err := f.check(v)
	if err == nil && !poisoned { // the disk works again, and so must the volume
		_, err = v.WriteAt(bytes.Repeat([]byte{99}, bs), 0)
		for i := range bs / sectorSize {
			f.unsure[i] = true
		}
	}
	after := fs.Kill()
	v.closeFiles()
	if err == nil {
		err = f.reopen(after)
	}
	if err != nil {
		t.Errorf("%v at %v: %v", errno, at, err)
	}
	return len(at)+passed > 0, poisoned
}

// faulty is a life whose requests may fail.
type faulty struct {
	v      *Volume
	o      *oracle
	unsure map[int]bool // sectors that a failed request may have written, or not
}

func (f *faulty) write(off, n int, c byte) {
	p := bytes.Repeat([]byte{c}, n)
	f.o.begin(p, int64(off))
	if _, err := f.v.WriteAt(p, int64(off)); err == nil {
		f.o.acknowledge()
		return
	}
	for s := range f.o.pending {
		f.unsure[s] = true
	}
	clear(f.o.pending)
}

// live passes through everything that touches the disk. Errors are what it is
// about, so it goes on.
func (f *faulty) live() {
	steps := func(n int) {
		for range n {
			_, _ = f.v.Step(context.Background())
		}
	}
	f.write(0, bs, 1)
	f.write(5*bs, sectorSize, 2)
	_ = f.v.Flush()
	_ = f.v.Cut("s1", nil)
	f.write(6*bs, 3*bs, 3)
	steps(3)
	_ = f.v.Flush()
	_ = f.v.SetRate(1 << 20)
	_ = f.v.EndCut("s1")
	for i := range 6 {
		f.write(i*2*bs+sectorSize, bs, byte(10+i))
	}
	_ = f.v.Flush()
	_ = f.v.freeDead()
	steps(6)
	f.write(9*bs, bs, 30)
	_ = f.v.Flush()
	steps(6)
}

func (f *faulty) check(v *Volume) error {
	got, err := readAll(v)
	if err != nil {
		return err
	}
	for s, want := range f.o.now {
		if !f.unsure[s] && !bytes.Equal(got[s*sectorSize:(s+1)*sectorSize], want) {
			return fmt.Errorf("sector %d has lost what was acknowledged", s)
		}
	}
	return nil
}

func (f *faulty) reopen(fs *crashfs.FS) error {
	v, err := openVolume(fs)
	if err != nil {
		return fmt.Errorf("cannot be opened any more: %w", err)
	}
	defer v.Close()
	if err := f.check(v); err != nil {
		return fmt.Errorf("opened again: %w", err)
	}
	got, err := readAll(v)
	if err != nil {
		return err
	}
	if fr := v.Frozen(); fr != nil {
		if err := v.EndCut(v.Record().Cut.Snapshot); err != nil {
			return err
		}
	}
	return finish(v, got)
}

// TestFlushDuringZero: a flush that comes while zeros are being written must not
// make the next one believe that there is nothing to flush.
func TestFlushDuringZero(t *testing.T) {
	fs := crashfs.New("/s")
	v := newVolume(t, fs, Spec{Size: 16 * bs})
	if _, err := v.WriteAt(bytes.Repeat([]byte{7}, bs), 0); err != nil {
		t.Fatal(err)
	}
	if err := v.Flush(); err != nil {
		t.Fatal(err)
	}
	between := 0
	fs.OnStep(func(s crashfs.Step) error {
		if s.Op != crashfs.OpZero || path.Base(s.Name) != baseName {
			return nil
		}
		fs.OnStep(nil)
		between++
		return v.Flush()
	})
	if err := v.Zero(0, bs); err != nil {
		t.Fatal(err)
	}
	if err := v.Flush(); err != nil {
		t.Fatal(err)
	}
	if between != 1 {
		t.Fatalf("%d flushes in between", between)
	}
	again, err := openVolume(fs.Crash(crashfs.Nothing))
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	got := make([]byte, bs)
	if _, err := again.ReadAt(got, 0); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, make([]byte, bs)) {
		t.Error("after a power cut the old data is back, though the zeros were flushed")
	}
}

// TestFullDiskHeals: a log that has filled the disk up goes away, and makes room, without
// anything else being freed.
func TestFullDiskHeals(t *testing.T) {
	fs := crashfs.New("/s")
	v := newVolume(t, fs, Spec{Size: 16 * bs})
	defer v.Close()
	want := make([]byte, 16*bs)
	if _, err := v.WriteAt(want, 0); err != nil { // the base takes all its room
		t.Fatal(err)
	}
	if err := errors.Join(v.Flush(), v.Cut("s1", nil)); err != nil {
		t.Fatal(err)
	}
	const rest = 2 * bs // too little for a segment, enough for a record
	fs.SetCapacity(fs.Used() + 2*v.Record().SegmentBytes + rest)
	var err error
	for i := 0; err == nil; i++ {
		p := bytes.Repeat([]byte{byte(i + 1)}, bs)
		if _, err = v.WriteAt(p, int64(i%16)*bs); err == nil {
			copy(want[i%16*bs:], p)
		}
	}
	if !errors.Is(err, syscall.ENOSPC) {
		t.Fatal(err)
	}
	if err := errors.Join(v.Flush(), v.EndCut("s1")); err != nil {
		t.Fatalf("on a full disk: %v", err)
	}
	if err := finish(v, want); err != nil {
		t.Error(err)
	}
	if _, err := v.WriteAt(want, 0); err != nil {
		t.Errorf("the log is gone: %v", err)
	}
}
