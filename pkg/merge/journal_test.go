package merge

import (
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"math/rand/v2"
	"strings"
	"syscall"
	"testing"

	"github.com/google/uuid"

	"github.com/snapmerge/snapmerge/pkg/blockio"
	"github.com/snapmerge/snapmerge/pkg/blockio/crashfs"
	"github.com/snapmerge/snapmerge/test/cowgen"
)

// halfMerged is a journalled merge that was stopped in the middle of a window
// in which every op is logged.
func halfMerged(t testing.TB) (*crashfs.FS, *rig, cowgen.Image) {
	t.Helper()
	im, err := cowgen.Make(rand.New(rand.NewPCG(1, 1)), cowgen.Spec{Blocks: 20, Ops: cowgen.Shift(0, 19, 1)})
	if err != nil {
		t.Fatal(err)
	}
	fs := crashfs.New("/v")
	r := &rig{fsys: fs, dir: "/v", io: blockio.Sync, window: 4}
	if err := errors.Join(r.write("base", im.Base), r.write("cow", im.COW), fs.SyncDir("/"), r.open()); err != nil {
		t.Fatal(err)
	}
	stop := errors.New("stop")
	n := 0
	r.m.cfg.Pace = func(context.Context, int) error {
		if n++; n == 3 {
			return stop
		}
		return nil
	}
	if err := r.m.Run(context.Background()); !errors.Is(err, stop) {
		t.Fatal(err)
	}
	r.close()
	return fs.Kill(), r, im
}

func flip(t testing.TB, fs blockio.FS, name string, off int64, bit int) {
	t.Helper()
	f, err := fs.Open(name, 0)
	if err != nil {
		t.Fatal(err)
	}
	p := make([]byte, 1)
	if _, err := f.ReadAt(p, off); err != nil {
		t.Fatal(err)
	}
	p[0] ^= 1 << bit
	if _, err := f.WriteAt(p, off); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(f.Flush(), f.Close()); err != nil {
		t.Fatal(err)
	}
}

// TestJournalBitFlips: one damaged copy of a header does not matter; with both of
// any header damaged, or the file header, nothing can be trusted, and the merge
// is not begun anew.
func TestJournalBitFlips(t *testing.T) {
	fs, r, im := halfMerged(t)
	again := *r
	again.fsys = fs.Kill()
	if err := again.open(); err != nil {
		t.Fatal(err)
	}
	seq := again.journal.cur.seq
	older, newest := again.journal.slotOffset(seq+1), again.journal.slotOffset(seq)
	dataOfOlder, dataOfNewest := again.journal.dataOffset(seq+1), again.journal.dataOffset(seq)
	again.close()

	damage := func(offsets ...int64) *crashfs.FS {
		image := fs.Kill()
		for _, off := range offsets {
			flip(t, image, "/v/journal", off, int(off%8))
		}
		again.fsys = image
		return image
	}
	for off := range int64(slotHeaderCRC + 4) {
		for _, slot := range []int64{older, newest} {
			damage(slot + off)
			if err := again.checkAll(im.Want); err != nil {
				t.Fatalf("one bit at %d of the header at %d: %v", off, slot, err)
			}
			// With both copies gone it could be the newest, and then the base has parts
			// of a window that the other slot knows nothing of.
			image := damage(slot+off, slot+headerCopy+(off*7+3)%slotHeaderCRC)
			steps := image.Steps()
			err := again.open()
			if !errors.Is(err, ErrDamaged) || !strings.Contains(err.Error(), fmt.Sprint("byte ", slot)) {
				t.Fatalf("both copies of the header at %d damaged at %d: %v", slot, off, err)
			}
			if image.Steps() > steps+2 { // the flush and the sync of an opening
				t.Error("something was written")
			}
		}
	}
	// The window of the older slot is not needed.
	damage(dataOfOlder + 20)
	if err := again.checkAll(im.Want); err != nil {
		t.Errorf("window of the older slot damaged: %v", err)
	}
	damage(dataOfOlder+20, dataOfNewest+20)
	if err := again.open(); !errors.Is(err, ErrDamaged) || !strings.Contains(err.Error(), "no valid slot") {
		t.Errorf("both windows damaged: %v", err)
	}
	for _, off := range []int64{0, 9, 12, 20, 33, 61} {
		image := fs.Kill()
		flip(t, image, "/v/journal", off, 0)
		again := *r
		again.fsys = image
		if err := again.open(); !errors.Is(err, ErrDamaged) {
			t.Errorf("flip at %d: %v", off, err)
		}
	}
}

func TestMismatch(t *testing.T) {
	other, err := cowgen.Make(rand.New(rand.NewPCG(9, 9)), cowgen.Spec{Blocks: 20, Copies: 5, Replaces: 2})
	if err != nil {
		t.Fatal(err)
	}
	replace := func(t *testing.T, fs *crashfs.FS, name string, content []byte) {
		t.Helper()
		if err := fs.Remove("/v/" + name); err != nil {
			t.Fatal(err)
		}
		r := &rig{fsys: fs, dir: "/v"}
		if err := r.write(name, content); err != nil {
			t.Fatal(err)
		}
	}
	for name, change := range map[string]func(t *testing.T, fs *crashfs.FS){
		"another COW":         func(t *testing.T, fs *crashfs.FS) { replace(t, fs, "cow", other.COW) },
		"another base":        func(t *testing.T, fs *crashfs.FS) { replace(t, fs, "base", other.Base) },
		"smaller base":        func(t *testing.T, fs *crashfs.FS) { replace(t, fs, "base", other.Base[:16*bs]) },
		"missing journal":     func(t *testing.T, fs *crashfs.FS) { fs.Remove("/v/journal") },
		"another merge's":     func(t *testing.T, fs *crashfs.FS) { replaceJournal(t, fs) },
		"journal cut short":   func(t *testing.T, fs *crashfs.FS) { truncate(t, fs, "/v/journal", 3*bs) },
		"journal is empty":    func(t *testing.T, fs *crashfs.FS) { truncate(t, fs, "/v/journal", 0) },
		"attribute is no id":  func(t *testing.T, fs *crashfs.FS) { setXattr(t, fs, "nonsense") },
		"attribute of others": func(t *testing.T, fs *crashfs.FS) { setXattr(t, fs, uuid.NewString()) },
	} {
		t.Run(name, func(t *testing.T) {
			fs, r, _ := halfMerged(t)
			change(t, fs)
			before, _ := fs.ReadFile("/v/base")
			r.fsys = fs
			err := r.open()
			var small *BaseTooSmallError
			if !errors.Is(err, ErrMismatch) && !errors.Is(err, ErrDamaged) && !errors.As(err, &small) {
				t.Errorf("error %v", err)
			}
			after, _ := fs.ReadFile("/v/base")
			if string(before) != string(after) {
				t.Error("the base was written to")
			}
		})
	}
	t.Run("in place without the journal", func(t *testing.T) {
		fs, r, _ := halfMerged(t)
		r.fsys, r.inPlace = fs, true
		if err := r.open(); !errors.Is(err, ErrMismatch) {
			t.Errorf("error %v", err)
		}
	})
	t.Run("in place with a second name", func(t *testing.T) {
		fs, r, _ := halfMerged(t)
		if err := errors.Join(fs.Link("/v/cow", "/v/cow2"), replaceBase(fs)); err != nil {
			t.Fatal(err)
		}
		r.fsys, r.inPlace = fs, true
		if err := r.open(); err == nil || !strings.Contains(err.Error(), "names") {
			t.Errorf("error %v", err)
		}
	})
}

// TestRefusedBaseStaysRefused: whatever the refusal of another base is stopped in
// the middle of, that base is refused again. The base of the journal is accepted.
func TestRefusedBaseStaysRefused(t *testing.T) {
	fs, r, im := halfMerged(t)
	r.fsys = fs
	if err := errors.Join(fs.Rename("/v/base", "/v/right"), r.write("base", im.Base)); err != nil {
		t.Fatal(err)
	}
	var killed []*crashfs.FS
	fs.OnStep(func(crashfs.Step) error {
		killed = append(killed, fs.Kill())
		return nil
	})
	err := r.open()
	fs.OnStep(nil)
	if !errors.Is(err, ErrMismatch) {
		t.Fatalf("another base: %v", err)
	}
	for i, fs := range append(killed, fs) {
		r.fsys = fs
		if err := r.open(); !errors.Is(err, ErrMismatch) {
			t.Fatalf("another base, for the second time, after step %d of the first: %v", i, err)
		}
	}
	if err := errors.Join(fs.Rename("/v/base", "/v/wrong"), fs.Rename("/v/right", "/v/base"), r.checkAll(im.Want)); err != nil {
		t.Error(err)
	}
}

func replaceBase(fs *crashfs.FS) error {
	f, err := fs.Open("/v/base", 0)
	if err != nil {
		return err
	}
	return errors.Join(ReleaseBase(f), f.Close())
}

func replaceJournal(t *testing.T, fs *crashfs.FS) {
	t.Helper()
	_, r, _ := halfMerged(t)
	b, err := r.fsys.(*crashfs.FS).ReadFile("/v/journal")
	if err != nil {
		t.Fatal(err)
	}
	if err := fs.Remove("/v/journal"); err != nil {
		t.Fatal(err)
	}
	r.fsys = fs
	if err := r.write("journal", b); err != nil {
		t.Fatal(err)
	}
}

func truncate(t *testing.T, fs *crashfs.FS, name string, n int64) {
	t.Helper()
	f, err := fs.Open(name, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(f.Truncate(n), f.Close()); err != nil {
		t.Fatal(err)
	}
}

func setXattr(t *testing.T, fs *crashfs.FS, value string) {
	t.Helper()
	f, err := fs.Open("/v/base", 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(f.SetXattr(claimXattr, []byte(value)), f.Close()); err != nil {
		t.Fatal(err)
	}
}

// TestErrors fails every step of a merge once. The error is reported, the view
// stays, and after reopening the merge goes on to the right end.
func TestErrors(t *testing.T) {
	for _, mode := range []rig{{window: 3}, {inPlace: true}} {
		im, err := cowgen.Make(rand.New(rand.NewPCG(4, 4)), cowgen.Spec{Blocks: 18, Copies: 6, Xors: 3, Replaces: 3, Zeros: 2, Scratch: mode.inPlace})
		if err != nil {
			t.Fatal(err)
		}
		for fail := int64(1); ; fail++ {
			fs := crashfs.New("/v")
			r := mode
			r.fsys, r.dir, r.io = fs, "/v", blockio.Sync
			if err := errors.Join(r.write("base", im.Base), r.write("cow", im.COW), fs.SyncDir("/"), r.open()); err != nil {
				t.Fatal(err)
			}
			hit, err := failAt(fs, fail, func() error { return r.m.Run(context.Background()) })
			if hit && !errors.Is(err, syscall.EIO) {
				t.Fatalf("in place %v, step %d failed: error %v", mode.inPlace, fail, err)
			}
			got, err := r.view()
			if err != nil {
				t.Fatal(err)
			}
			if err := cowgen.Check(got, im.Want); err != nil {
				t.Fatalf("in place %v, step %d failed: view: %v", mode.inPlace, fail, err)
			}
			r.close()
			if err := r.checkAll(im.Want); err != nil {
				t.Fatalf("in place %v, step %d failed, reopened: %v", mode.inPlace, fail, err)
			}
			if !hit {
				break
			}
		}
	}
}

// TestFullDisk: a merge into a sparse base that runs out of space stops and goes
// on when there is room again, in the same Merger.
func TestFullDisk(t *testing.T) {
	im, err := cowgen.Make(rand.New(rand.NewPCG(5, 5)), cowgen.Spec{Blocks: 40, Copies: 10, Replaces: 15})
	if err != nil {
		t.Fatal(err)
	}
	fs := crashfs.New("/v")
	r := &rig{fsys: fs, dir: "/v", io: blockio.Sync, window: 4}
	if err := errors.Join(r.write("cow", im.COW), fs.SyncDir("/")); err != nil {
		t.Fatal(err)
	}
	// A base of zeros that is one hole, and what the COW makes of that.
	f, err := fs.Open("/v/base", blockio.Create)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(f.Truncate(int64(len(im.Base))), f.Flush(), f.Close(), r.open()); err != nil {
		t.Fatal(err)
	}
	want, err := r.view()
	if err != nil {
		t.Fatal(err)
	}
	used := int64(len(im.COW)) + JournalBytes(4)
	fs.SetCapacity(used + 3*bs)
	if err := r.m.Run(context.Background()); !errors.Is(err, syscall.ENOSPC) {
		t.Fatalf("full disk: %v", err)
	}
	if got, err := r.view(); err != nil || cowgen.Check(got, want) != nil {
		t.Fatalf("view on a full disk: %v, %v", err, cowgen.Check(got, want))
	}
	fs.SetCapacity(0)
	if err := r.m.Run(context.Background()); err != nil {
		t.Fatal(err)
	}
	r.close()
	if err := r.checkAll(want); err != nil {
		t.Error(err)
	}
}

// TestCreateJournalFails: a journal is made whole or not at all.
func TestCreateJournalFails(t *testing.T) {
	for fail := int64(1); ; fail++ {
		fs := crashfs.New("/v")
		n := int64(0)
		fs.OnStep(func(crashfs.Step) error {
			if n++; n == fail {
				return syscall.ENOSPC
			}
			return nil
		})
		err := CreateJournal(fs, "/v", "journal", JournalSpec{ID: uuid.New(), WindowBlocks: 2, BaseSize: bs, Layer: 1})
		fs.OnStep(nil)
		names, derr := fs.ReadDir("/v")
		if derr != nil {
			t.Fatal(derr)
		}
		if n < fail {
			if err != nil || fmt.Sprint(names) != "[journal]" {
				t.Fatalf("no step failed: %v, %v", err, names)
			}
			break
		}
		if !errors.Is(err, syscall.ENOSPC) {
			t.Errorf("step %d failed: %v", fail, err)
		}
		for _, name := range names {
			if name == "journal" {
				if _, err := OpenJournal(fs, "/v/journal"); err != nil {
					t.Errorf("step %d failed: %v", fail, err)
				}
			} else {
				t.Errorf("step %d failed: left: %v", fail, names)
			}
		}
	}
}

// TestSecondOwner: a journal that is open is not opened again.
func TestSecondOwner(t *testing.T) {
	fs, _, _ := halfMerged(t)
	j, err := OpenJournal(fs, "/v/journal")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := OpenJournal(fs, "/v/journal"); !errors.Is(err, blockio.ErrLocked) {
		t.Errorf("second owner: %v", err)
	}
	if err := j.Close(); err != nil {
		t.Fatal(err)
	}
	if j, err = OpenJournal(fs, "/v/journal"); err != nil {
		t.Fatal(err)
	}
	j.Close()
}

// FuzzJournal opens anything as a journal and attaches a COW to it: no panic,
// and no window that the COW doesn't have.
func FuzzJournal(f *testing.F) {
	fs, _, im := halfMerged(f)
	b, err := fs.ReadFile("/v/journal")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b, true)
	f.Add(b[:bs+100], false)
	fresh := crashfs.New("/v")
	if err := CreateJournal(fresh, "/v", "journal", JournalSpec{ID: uuid.New(), WindowBlocks: 2, BaseSize: bs, Layer: 1}); err != nil {
		f.Fatal(err)
	}
	if b, err = fresh.ReadFile("/v/journal"); err != nil {
		f.Fatal(err)
	}
	f.Add(b, true)
	r := newRig(f, rig{window: 2, promote: 1}, im)
	if err := r.m.Promote(allChunks(20)); err != nil {
		f.Fatal(err)
	}
	r.close()
	if b, err = r.fsys.ReadFile("/v/journal"); err != nil {
		f.Fatal(err)
	}
	f.Add(b, true)
	f.Add(b, false)
	f.Fuzz(func(t *testing.T, b []byte, mend bool) {
		if len(b) > 1<<20 {
			return
		}
		if mend {
			mendJournal(b)
		}
		fs := crashfs.New("/v")
		r := &rig{fsys: fs, dir: "/v", io: blockio.Sync}
		if err := errors.Join(r.write("base", im.Base), r.write("cow", im.COW), r.write("journal", b)); err != nil {
			t.Fatal(err)
		}
		if err := r.open(); err != nil {
			return
		}
		defer r.close()
		if _, err := r.view(); err != nil {
			t.Fatal(err)
		}
		if err := r.m.Run(context.Background()); err != nil && !errors.Is(err, ErrMismatch) {
			t.Fatal(err)
		}
	})
}

// mendJournal puts right checksums in, so that what lies behind them is reached.
func mendJournal(b []byte) {
	if len(b) < 2*bs {
		return
	}
	le.PutUint32(b[fileHeaderCRC:], crc32.Checksum(b[:fileHeaderCRC], castagnoli))
	capacity := int(le.Uint32(b[12:]))
	if capacity > 100 {
		return
	}
	for s := range int64(2) {
		o := bs + s*slotBytes(capacity)
		if o+slotBytes(capacity) > int64(len(b)) {
			return
		}
		p := b[o:]
		if n := int64(le.Uint32(p[36:])); n <= int64(capacity) {
			d := bs + roundUp(int64(capacity)*entryBytes)
			crc := crc32.Checksum(p[bs:bs+n*entryBytes], castagnoli)
			le.PutUint32(p[72:], crc32.Update(crc, castagnoli, p[d:d+n*bs]))
		}
		le.PutUint32(p[slotHeaderCRC:], crc32.Checksum(p[:slotHeaderCRC], castagnoli))
		copy(p[headerCopy:], p[:slotHeaderCRC+4])
	}
	for o := JournalBytes(capacity); o+blockio.SectorSize <= int64(len(b)); o += blockio.SectorSize {
		if p := b[o : o+blockio.SectorSize]; le.Uint32(p[promotedCRC:]) != 0 {
			le.PutUint32(p[promotedCRC:], crc32.Checksum(p[:promotedCRC], castagnoli))
		}
	}
}
