package volume

import (
	"errors"
	"fmt"
	"io/fs"
	"path"
	"time"

	"github.com/google/uuid"

	"github.com/snapmerge/snapmerge/pkg/blockio"
	"github.com/snapmerge/snapmerge/pkg/cow"
	"github.com/snapmerge/snapmerge/pkg/merge"
	"github.com/snapmerge/snapmerge/pkg/snapshot"
	"github.com/snapmerge/snapmerge/pkg/volume/writelog"
)

// Spec describes a new volume.
type Spec struct {
	ID, Name string
	// Size is the length of the view in bytes, a multiple of 4096.
	Size int64
	// Base is an existing file or device, by absolute path; empty: a sparse file
	// of zeros is made in the volume's directory.
	Base string
	// COWs are the COW files above the base, the lowest first, by absolute path.
	COWs []COWSource
	// ReadOnly makes a volume without a log. Its COWs are merged all the same
	// if it is started.
	ReadOnly bool

	Blank  bool
	FSType string // of the snapshot restored, if known
	Grow   bool
	Source string // id of the snapshot restored
	Claim  Claim
	Params map[string]string
	Limits Limits
	Rate   int // MiB/s, 0: the node's
	Paused bool
	// ReadAhead is the mode, as package readahead has it; empty: the node's.
	ReadAhead string
	// ReadPromotion is PromotionOn or PromotionOff; empty: the node's.
	ReadPromotion string
	// WindowBlocks is the most ops of a merge window; 0: the default.
	WindowBlocks int
	// SegmentBytes is the segment length of write logs; 0: the default.
	SegmentBytes int64
}

// COWSource is a COW file that becomes a layer.
type COWSource struct {
	Path string
	// Label opens an unfinished file at a label.
	Label *uint64
	// Link takes the file by hard link, with its index and sums; else it is
	// opened where it lies.
	Link bool
}

// ErrExists says that there is a volume in the directory already.
var ErrExists = errors.New("volume exists")

// Create makes a volume in dir, which may exist if there is no volume in it.
// Its record is written last: a directory without one is a half-made volume
// that Create may go on with or anyone remove. When Create returns, the volume
// is durable but for the name of dir itself, and journal and a first piece of
// log have their space.
func Create(fsys blockio.FS, dir string, spec Spec) error {
	if spec.Size <= 0 || spec.Size%bs != 0 {
		return fmt.Errorf("volume size %d is not a multiple of %d", spec.Size, bs)
	}
	if err := fsys.Mkdir(dir); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	if ok, err := fsys.Exists(path.Join(dir, recordName)); err != nil {
		return err
	} else if ok {
		return fmt.Errorf("%s: %w", dir, ErrExists)
	}
	c := creator{fsys: fsys, dir: dir, spec: spec, rec: &Record{
		ID: spec.ID, Name: spec.Name, Size: spec.Size, Created: time.Now().UTC(), Journal: uuid.New(),
		NextLayer: 1, Blank: spec.Blank, FSType: spec.FSType, Restored: len(spec.COWs) > 0, Grow: spec.Grow, Source: spec.Source, Claim: spec.Claim, ReadOnly: spec.ReadOnly,
		Paused: spec.Paused, Rate: spec.Rate, Limits: spec.Limits, ReadAhead: spec.ReadAhead, ReadPromotion: spec.ReadPromotion, SegmentBytes: spec.SegmentBytes, Params: spec.Params,
	}}
	for _, step := range []func() error{c.clean, c.makeBase, c.makeLayers, c.makeJournal, c.makeLog} {
		if err := step(); err != nil {
			return err
		}
	}
	if err := fsys.SyncDir(dir); err != nil {
		return err
	}
	c.rec.Format = c.rec.format()
	return c.rec.save(fsys, dir)
}

// creator makes the files of a volume.
type creator struct {
	fsys blockio.FS
	dir  string
	spec Spec
	rec  *Record

	first   cow.Identity // of the lowest COW
	seed    *merge.Seed
	ordered uint64 // most ordered ops of a COW
}

// clean removes what an earlier attempt left.
func (c *creator) clean() error {
	names, err := c.fsys.ReadDir(c.dir)
	if err != nil {
		return err
	}
	for _, n := range names {
		if n == baseName || n == journalName || path.Ext(n) == ".new" || len(n) > len(layerPrefix) && n[:len(layerPrefix)] == layerPrefix {
			if err := c.fsys.Remove(path.Join(c.dir, n)); err != nil {
				return err
			}
		}
	}
	return nil
}

func (c *creator) makeBase() error {
	if c.spec.Base == "" {
		c.rec.Base = baseName
		f, err := c.fsys.Open(path.Join(c.dir, baseName), blockio.Create|blockio.Excl)
		if err != nil {
			return err
		}
		defer f.Close()
		if err := f.Truncate(c.spec.Size); err != nil {
			return err
		}
		return f.Flush()
	}
	c.rec.Base = c.spec.Base
	f, err := c.fsys.Open(c.spec.Base, blockio.ReadOnly)
	if err != nil {
		return err
	}
	defer f.Close()
	if f.Size() < c.spec.Size {
		return &merge.BaseTooSmallError{Need: c.spec.Size, Have: f.Size()}
	}
	return merge.CheckUnclaimed(f)
}

func (c *creator) makeLayers() error {
	for i, src := range c.spec.COWs {
		if err := c.makeLayer(i, src); err != nil {
			return err
		}
	}
	return nil
}

func (c *creator) makeLayer(i int, src COWSource) error {
	id := c.rec.NextLayer
	c.rec.NextLayer++
	file := src.Path
	if src.Link {
		file = cowName(id)
		if err := c.link(src.Path, file); err != nil {
			return err
		}
	}
	w, err := snapshot.OpenCOW(c.fsys, c.rec.file(c.dir, file), snapshot.OpenCOWOptions{Label: src.Label})
	if err != nil {
		return err
	}
	defer w.Close()
	blocks, source := w.Ops.Bounds()
	if need := max(int64(blocks)*bs, int64(source)); need > c.spec.Size {
		return &merge.BaseTooSmallError{Need: need, Have: c.spec.Size}
	}
	c.ordered = max(c.ordered, w.Ops.Ordered())
	c.rec.Layers = append(c.rec.Layers, LayerRecord{ID: id, File: file,
		COW: &COWRecord{Length: w.Identity.Length, CRC: w.Identity.CRC, Label: src.Label}})
	if i == 0 {
		c.first = w.Identity
		file, err := cow.Open(w.File, w.File.Size(), cow.OpenOptions{Label: src.Label})
		if err != nil {
			return err
		}
		c.seed, err = merge.ReadSeed(file, w.File, w.Ops)
		return err
	}
	if w.Header.NumMergeOps != 0 {
		return fmt.Errorf("%s is half merged and does not lie on a base but on another COW", src.Path)
	}
	return nil
}

// link gives the COW and the files beside it names in the volume's directory.
func (c *creator) link(from, file string) error {
	if err := c.fsys.Link(from, path.Join(c.dir, file)); err != nil {
		return err
	}
	names, old := companions(file), companions(from)
	for i := range names {
		err := c.fsys.Link(old[i], path.Join(c.dir, names[i]))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

func (c *creator) makeJournal() error {
	window := c.spec.WindowBlocks
	if window == 0 {
		window = merge.DefaultWindowBlocks
	}
	spec := merge.JournalSpec{
		ID: c.rec.Journal, WindowBlocks: int(min(uint64(window), c.ordered)), BaseSize: c.spec.Size,
		Layer: 1, Identity: c.first, Seed: c.seed,
	}
	return merge.CreateJournal(c.fsys, c.dir, journalName, spec)
}

// makeLog makes the log of a volume that has layers; one without needs none
// until its first cut.
func (c *creator) makeLog() error {
	if len(c.rec.Layers) == 0 || c.spec.ReadOnly {
		return nil
	}
	id := c.rec.NextLayer
	c.rec.NextLayer++
	c.rec.Layers = append(c.rec.Layers, LayerRecord{ID: id, File: logName(id), Log: &LogRecord{}})
	return writelog.Create(c.fsys, path.Join(c.dir, logName(id)), id, volumeHash(c.spec.ID), c.spec.SegmentBytes)
}

// companions are the names of the files that may lie beside a COW.
func companions(cow string) []string {
	return []string{snapshot.IndexPath(cow), snapshot.SumsPath(cow)}
}
