package volume

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"path"
	"strings"
	"sync"
	"testing"

	"k8s.io/klog/v2"

	"github.com/snapmerge/snapmerge/pkg/blockio"
	"github.com/snapmerge/snapmerge/pkg/blockio/crashfs"
	"github.com/snapmerge/snapmerge/pkg/cow"
	"github.com/snapmerge/snapmerge/test/cowgen"
)

const sectorSize = blockio.SectorSize

// oracle is what a volume must show: its content now, and per sector what a
// power cut may leave. One goroutine uses it.
type oracle struct {
	now     [][]byte   // by sector
	allowed [][][]byte // by sector: the flushed content and all written since
	// pending is the guest request in progress: its sectors may be old or new.
	pending map[int][]byte
	// frozen is the view below the cut in flight.
	frozen    []byte
	cutting   bool // a cut is in progress: it may be there or not
	endingCut bool
	growing   int // if not 0, the volume is being expanded from so many sectors
}

func newOracle(image []byte) *oracle {
	o := &oracle{pending: map[int][]byte{}}
	for i := 0; i < len(image); i += sectorSize {
		s := image[i : i+sectorSize]
		o.now = append(o.now, s)
		o.allowed = append(o.allowed, [][]byte{s})
	}
	return o
}

func (o *oracle) bytes() []byte { return bytes.Join(o.now, nil) }

func (o *oracle) begin(p []byte, off int64) {
	for i := 0; i < len(p); i += sectorSize {
		o.pending[int(off)/sectorSize+i/sectorSize] = p[i : i+sectorSize]
	}
}

// acknowledge ends the request that begin announced.
func (o *oracle) acknowledge() {
	for s, p := range o.pending {
		o.now[s] = p
		o.allowed[s] = append(o.allowed[s], p)
	}
	clear(o.pending)
}

// grow appends zeros; until Expand has returned they may be missing.
func (o *oracle) grow(sectors int) {
	o.growing = len(o.now)
	for range sectors {
		zero := make([]byte, sectorSize)
		o.now = append(o.now, zero)
		o.allowed = append(o.allowed, [][]byte{zero})
	}
}

func (o *oracle) flushed() {
	for s := range o.now {
		o.allowed[s] = [][]byte{o.now[s]}
	}
}

// check compares a view found after a crash. killed says that only the process
// died.
func (o *oracle) check(view []byte, killed bool) error {
	if n := len(view) / sectorSize; n != len(o.now) && n != o.growing {
		return fmt.Errorf("view of %d sectors, want %d", n, len(o.now))
	}
	for s := range len(view) / sectorSize {
		got := view[s*sectorSize : (s+1)*sectorSize]
		ok := bytes.Equal(got, o.pending[s])
		if killed {
			ok = ok || bytes.Equal(got, o.now[s])
		} else {
			for _, a := range o.allowed[s] {
				ok = ok || bytes.Equal(got, a)
			}
		}
		if !ok {
			return fmt.Errorf("sector %d (block %d) has content that it must not have; %d are allowed", s, s/8, len(o.allowed[s]))
		}
	}
	return nil
}

// session is a random life of a volume.
type session struct {
	t      testing.TB
	fs     *crashfs.FS
	v      *Volume
	o      *oracle
	rng    *rand.Rand
	images int
	per    int // crash images a step
	every  int // steps between crashes
	step   int
	bad    bool
	log    []string
	cuts   int
	writes int
	depth  int // crashes that this one follows

	// midway says that guest requests may come while a record is written, and
	// nested that one does.
	midway, nested bool
	// promoting says that they may come at any step. Amid a merge, which has another
	// goroutine, it stays as it is.
	promoting bool
	promoted  uint64 // bytes

	// The merge stages the next window in a goroutine of its own, whose steps
	// come at any time. busy is held over a guest request, during which the
	// oracle is not to be looked at from there; enum over crash images.
	busy, enum sync.Mutex
}

func openVolume(fs blockio.FS) (*Volume, error) {
	return Open(Config{FS: fs, Dir: "/s/v", IO: blockio.Sync, Log: klog.Background().V(9), ReadPromotion: true, chunkBlocks: 2})
}

func readAll(v *Volume) ([]byte, error) {
	p := make([]byte, v.Size())
	_, err := v.ReadAt(p, 0)
	return p, err
}

// finish runs background work to its end and checks that the view never
// changes and at last is the base.
func finish(v *Volume, want []byte) error {
	for range 1000 {
		if v.Idle() {
			break
		}
		if c := v.Record().Cut; c != nil {
			if err := v.EndCut(c.Snapshot); err != nil {
				return err
			}
		}
		if _, err := v.Step(context.Background()); err != nil {
			return fmt.Errorf("background work: %w", err)
		}
		got, err := readAll(v)
		if err != nil {
			return err
		}
		if err := cowgen.Check(got, want); err != nil {
			return fmt.Errorf("view after a step: %w", err)
		}
	}
	if !v.Idle() {
		return errors.New("stack does not get empty")
	}
	base := make([]byte, v.Size())
	if _, err := v.base.ReadAt(base, 0); err != nil {
		return err
	}
	if err := cowgen.Check(base, want); err != nil {
		return fmt.Errorf("base at the end: %w", err)
	}
	return nil
}

// afterCrash opens what a crash left and checks it.
func (s *session) afterCrash(fs *crashfs.FS, killed bool) error {
	v, err := openVolume(fs)
	if err != nil {
		return fmt.Errorf("open: %w", err)
	}
	defer v.Close()
	got, err := readAll(v)
	if err != nil {
		return err
	}
	if err := s.o.check(got, killed); err != nil {
		return err
	}
	fr := v.Frozen()
	switch {
	case fr == nil && s.o.frozen != nil && !s.o.cutting && !s.o.endingCut:
		return errors.New("cut is lost")
	case fr != nil && s.o.frozen == nil:
		return errors.New("there is a cut that was never made")
	case fr != nil:
		p := make([]byte, fr.Size())
		if _, err := fr.ReadAt(p, 0); err != nil {
			return err
		}
		if err := cowgen.Check(p, s.o.frozen); err != nil {
			return fmt.Errorf("frozen view: %w", err)
		}
	}
	if s.depth == 0 && s.rng.IntN(40) == 0 {
		return s.again(fs, v, got)
	}
	return finish(v, got)
}

// again goes on living after a crash, with another crash to come: what the first
// one left in the page cache may not be durable.
func (s *session) again(fs *crashfs.FS, v *Volume, got []byte) error {
	o := newOracle(got)
	for i := range o.allowed {
		o.allowed[i] = append(o.allowed[i], s.o.allowed[i]...)
		if p := s.o.pending[i]; p != nil {
			o.allowed[i] = append(o.allowed[i], p)
		}
	}
	if v.Frozen() != nil {
		o.frozen = s.o.frozen
	}
	n := &session{t: s.t, fs: fs, v: v, o: o, rng: s.rng, per: 2, every: 2, depth: 1, cuts: s.cuts, writes: s.writes + 1000,
		log: append(append([]string(nil), s.log[max(0, len(s.log)-6):]...), "CRASH")}
	fs.OnStep(n.onStep)
	defer fs.OnStep(nil)
	for range 6 {
		if err := n.act(); err != nil {
			return err
		}
		if n.bad {
			break
		}
	}
	s.images += n.images
	s.bad = n.bad
	fs.OnStep(nil)
	if n.v != v {
		defer n.v.Close()
	}
	return finish(n.v, o.bytes())
}

// onStep comes before every step of the disk: it may crash, and guests may write
// in the middle of background work.
func (s *session) onStep(at crashfs.Step) error {
	s.crash(at)
	may := s.promoting || s.midway && strings.HasPrefix(path.Base(at.Name), recordName)
	if !may || s.nested || s.rng.IntN(2) > 0 || !s.v.gate.TryRLock() {
		return nil
	}
	s.v.gate.RUnlock()
	s.nested = true
	defer func() { s.nested = false }()
	return s.guest()
}

func (s *session) crash(at crashfs.Step) {
	if path.Base(at.Name) == journalName {
		if !s.busy.TryLock() {
			return
		}
		defer s.busy.Unlock()
	}
	s.enum.Lock()
	defer s.enum.Unlock()
	s.step++
	if s.bad || s.step%s.every != 0 {
		return
	}
	for class, image := range s.fs.CrashImages(s.per, s.rng) {
		s.images++
		if err := s.afterCrash(image, class == "killed"); err != nil {
			s.bad = true
			s.t.Errorf("crash before %v, %s: %v\nlast: %v", at, class, err, s.log[max(0, len(s.log)-12):])
			return
		}
	}
}

func (s *session) note(format string, args ...any) {
	s.log = append(s.log, fmt.Sprintf(format, args...))
}

// guest does one random guest request.
func (s *session) guest() error {
	s.busy.Lock()
	defer s.busy.Unlock()
	size := s.v.Size()
	off := s.rng.Int64N(size/sectorSize) * sectorSize
	n := int64(1+s.rng.IntN(20)) * sectorSize
	if s.rng.IntN(2) == 0 { // as file systems do
		off, n = off/bs*bs, int64(1+s.rng.IntN(3))*bs
	}
	n = min(n, size-off)
	switch k := s.rng.IntN(10); {
	case k < 6:
		p := make([]byte, n)
		s.writes++
		for i := range p {
			p[i] = byte(s.writes) ^ byte(s.writes>>8*i)
		}
		s.note("write %d+%d", off, n)
		s.o.begin(p, off)
		if _, err := s.v.WriteAt(p, off); err != nil {
			return err
		}
		s.o.acknowledge()
	case k < 7:
		s.note("zero %d+%d", off, n)
		s.o.begin(make([]byte, n), off)
		if err := s.v.Zero(off, n); err != nil {
			return err
		}
		s.o.acknowledge()
	default:
		s.note("flush")
		if err := s.v.Flush(); err != nil {
			return err
		}
		s.o.flushed()
	}
	return nil
}

// readSome has a little read, and nothing else, so that it can be promoted.
func (s *session) readSome() error {
	s.busy.Lock()
	defer s.busy.Unlock()
	s.v.promotion.mu.Lock()
	s.v.promotion.resetLocked(nil)
	s.v.promotion.mu.Unlock()
	for range 1 + s.rng.IntN(3) {
		b := s.rng.Int64N(s.v.Size() / bs)
		s.note("promote block %d", b)
		if _, err := s.v.ReadAt(make([]byte, bs), b*bs); err != nil {
			return err
		}
	}
	return nil
}

// promote has what is read merged early.
func (s *session) promote() error {
	if err := s.readSome(); err != nil {
		return err
	}
	before := s.v.Counters().MergePromoted
	hook := s.v.onPace
	s.v.onPace = nil
	if !s.midway {
		s.promoting = true
		defer func() { s.promoting = false }()
	}
	_, err := s.v.promote(context.Background())
	s.v.onPace = hook
	s.promoted += s.v.Counters().MergePromoted - before
	return err
}

func (s *session) check() error {
	got, err := readAll(s.v)
	if err != nil {
		return err
	}
	if err := cowgen.Check(got, s.o.bytes()); err != nil {
		return fmt.Errorf("view: %w", err)
	}
	if fr := s.v.Frozen(); fr != nil {
		p := make([]byte, fr.Size())
		if _, err := fr.ReadAt(p, 0); err != nil {
			return err
		}
		if err := cowgen.Check(p, s.o.frozen); err != nil {
			return fmt.Errorf("frozen view: %w", err)
		}
	}
	return nil
}

// act does one random thing.
func (s *session) act() error {
	switch k := s.rng.IntN(22); {
	case k < 11:
		return s.guest()
	case k < 15:
		ctx, cancel := context.WithCancel(context.Background())
		defer cancel()
		left := 1 + s.rng.IntN(4)
		s.v.onPace = func(context.Context) {
			// In the middle of background work, unless the gate is closed.
			if s.v.gate.TryRLock() {
				s.v.gate.RUnlock()
				for range left % 3 {
					if err := s.promote(); err != nil {
						s.t.Fatal(err)
					}
				}
				if err := s.guest(); err != nil {
					s.t.Fatal(err)
				}
			}
			if left--; left == 0 {
				cancel()
			}
		}
		s.note("step")
		s.midway = true
		_, err := s.v.Step(ctx)
		s.v.onPace, s.midway = nil, false
		return err
	case k < 16 && s.o.frozen == nil:
		s.note("cut")
		s.cuts++
		err := s.v.Cut(fmt.Sprintf("snap-%d", s.cuts), func() (func(), error) {
			// What the guest writes until it is frozen belongs to the cut.
			for range s.rng.IntN(3) {
				if err := s.guest(); err != nil {
					return nil, err
				}
			}
			s.o.frozen, s.o.cutting = s.o.bytes(), true
			return func() {}, nil
		})
		s.o.cutting = false
		s.o.flushed() // log and base are flushed by it
		return err
	case k < 17 && s.o.frozen != nil:
		s.note("end of the cut")
		s.o.endingCut = true
		err := s.v.EndCut(fmt.Sprintf("snap-%d", s.cuts))
		s.o.frozen, s.o.endingCut = nil, false
		return err
	case k < 18:
		s.note("free")
		s.midway = true
		defer func() { s.midway = false }()
		return s.v.freeDead()
	case k >= 20:
		if err := s.promote(); err != nil {
			return err
		}
	case k < 19 && s.v.Size() < 32*bs && s.rng.IntN(3) == 0:
		blocks := 1 + s.rng.IntN(2)
		s.note("expand by %d", blocks)
		s.o.grow(blocks * bs / sectorSize)
		err := s.v.Expand(s.v.Size() + int64(blocks)*bs)
		s.o.growing = 0
		return err
	case k < 19:
		s.note("reopen")
		if err := s.v.Close(); err != nil {
			return err
		}
		s.o.flushed()
		v, err := openVolume(s.fs)
		if err != nil {
			return err
		}
		s.v = v
	}
	return s.check()
}

// run lives n acts of a volume made from the spec and returns the number of
// crash images.
func lifetime(t testing.TB, seed uint64, spec *cowgen.Spec, blocks, acts, per, every int) int {
	images, _ := promotingLifetime(t, seed, spec, blocks, acts, per, every)
	return images
}

// promotingLifetime also returns how many bytes were promoted.
func promotingLifetime(t testing.TB, seed uint64, spec *cowgen.Spec, blocks, acts, per, every int) (images int, promoted uint64) {
	rng := rand.New(rand.NewPCG(seed, 11))
	fs := crashfs.New("/s")
	im := cowgen.Image{Want: make([]byte, blocks*bs)}
	vs := Spec{ID: "v", Size: int64(blocks) * bs, SegmentBytes: 16 << 10, WindowBlocks: 3, Limits: Limits{}}
	if spec != nil {
		var err error
		if im, err = cowgen.Make(rng, *spec); err != nil {
			t.Fatal(err)
		}
		for name, content := range map[string][]byte{"base": im.Base, "data.cow": im.COW} {
			f, err := fs.Open("/s/"+name, blockio.Create)
			if err != nil {
				t.Fatal(err)
			}
			_, err = f.WriteAt(content, 0)
			if err := errors.Join(err, f.Flush(), f.Close()); err != nil {
				t.Fatal(err)
			}
		}
		vs.Size, vs.Base, vs.COWs = int64(len(im.Base)), "/s/base", []COWSource{{Path: "/s/data.cow", Link: rng.IntN(2) == 0}}
	}
	if err := errors.Join(Create(fs, "/s/v", vs), fs.SyncDir("/s"), fs.SyncDir("/")); err != nil {
		t.Fatal(err)
	}
	v, err := openVolume(fs)
	if err != nil {
		t.Fatal(err)
	}
	s := &session{t: t, fs: fs, v: v, o: newOracle(im.Want), rng: rng, per: per, every: every}
	fs.OnStep(s.onStep)
	for range acts {
		if err := s.act(); err != nil {
			t.Errorf("seed %d: %v\nlast: %v", seed, err, s.log[max(0, len(s.log)-12):])
			break
		}
		if s.bad {
			t.Errorf("seed %d", seed)
			break
		}
	}
	fs.OnStep(nil)
	if !s.bad {
		if err := finish(s.v, s.o.bytes()); err != nil {
			t.Errorf("seed %d: %v", seed, err)
		}
	}
	if err := s.v.Close(); err != nil {
		t.Error(err)
	}
	return s.images, s.promoted
}

func TestCrash(t *testing.T) {
	t.Parallel()
	lives, acts, per := 10, 60, 6
	if testing.Short() {
		lives, acts, per = 2, 30, 4
	}
	specs := map[string]*cowgen.Spec{
		"empty":    nil,
		"ordered":  {Blocks: 16, Copies: 8, Xors: 4},
		"replaces": {Blocks: 16, Replaces: 6, Zeros: 3, MaxBlock: 4 * bs, Compression: cow.LZ4},
		"mixed":    {Blocks: 20, Copies: 6, Xors: 3, Replaces: 4, Zeros: 2},
	}
	total := 0
	for name, spec := range specs {
		t.Run(name, func(t *testing.T) {
			promoted := uint64(0)
			for i := range lives {
				images, n := promotingLifetime(t, uint64(i+1), spec, 16, acts, per, 3)
				total, promoted = total+images, promoted+n
			}
			if spec != nil && spec.Replaces > 0 && promoted == 0 {
				t.Error("nothing was promoted")
			}
		})
	}
	t.Logf("%d crash images", total)
}
