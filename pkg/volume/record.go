package volume

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"path"
	"time"

	"github.com/google/uuid"

	"github.com/snapmerge/snapmerge/pkg/blockio"
	"github.com/snapmerge/snapmerge/pkg/cow"
	"github.com/snapmerge/snapmerge/pkg/volume/writelog"
)

const (
	recordName  = "volume.json"
	baseName    = "base.img"
	journalName = "journal"
)

// Formats of a record. A new field takes a new one, which becomes the newest. A release
// reads all formats up to its newest and refuses to start where there is a newer one.
const (
	recordFormat = 1
	nativeFormat = 2 // with Native
	newestFormat = nativeFormat
)

// Record is what is durably known of a volume: volume.json in its directory,
// replaced as a whole. Names of files are relative to the directory unless they
// are absolute.
type Record struct {
	Format int    `json:"format"`
	ID     string `json:"id"`
	// Name is what the volume was asked for by, if that was something else.
	Name    string    `json:"name,omitempty"`
	Size    int64     `json:"size"` // bytes
	Created time.Time `json:"created"`
	Base    string    `json:"base"`
	Journal uuid.UUID `json:"journal"`
	// Layers are the layers above the base, the lowest first.
	Layers    []LayerRecord `json:"layers,omitempty"`
	NextLayer uint64        `json:"nextLayer"`
	// Merged is how many bytes the COWs wrote that are merged and gone.
	Merged int64 `json:"mergedBytes,omitempty"`
	// MergedAt is when the last of them was; zero: never, or one is left.
	MergedAt time.Time `json:"mergedAt,omitzero"`
	// Native says that requests of the guest may go to the base past the volume. There
	// is no layer then, and no cut.
	Native NativeState `json:"native,omitempty"`
	// Cut is the snapshot that is being encoded.
	Cut *CutRecord `json:"cut,omitempty"`

	// Blank: created empty and never formatted or written by us or the guest.
	Blank bool `json:"blank,omitempty"`
	// FSType is the file system on the volume as far as it is known.
	FSType string `json:"fsType,omitempty"`
	// Restored: made from a snapshot, so that its file system's identity may be
	// that of another volume of this node.
	Restored bool `json:"restored,omitempty"`
	// Grow: the file system may be smaller than the volume.
	Grow bool `json:"grow,omitempty"`
	// Source is the snapshot the volume was made from.
	Source string `json:"source,omitempty"`
	// Claim is what the volume was made for.
	Claim Claim `json:"claim,omitzero"`

	ReadOnly bool   `json:"readOnly,omitempty"`
	Paused   bool   `json:"paused,omitempty"`
	Rate     int    `json:"rateMiBPerSecond,omitempty"`
	Limits   Limits `json:"limits"`
	// ReadAhead is the mode, as package readahead has it; empty: the node's.
	ReadAhead string `json:"readAhead,omitempty"`
	// ReadPromotion is PromotionOn or PromotionOff; empty: the node's.
	ReadPromotion string `json:"readPromotion,omitempty"`
	// SegmentBytes is the segment length of new logs; 0: the default.
	SegmentBytes int64             `json:"segmentBytes,omitempty"`
	Params       map[string]string `json:"parameters,omitempty"`
	Stage        *StageRecord      `json:"stage,omitempty"`
}

// Claim names the Kubernetes objects that a volume was made for, as far as the
// provisioner has told (csi-provisioner --extra-create-metadata). Names only: the
// objects may be gone, or others of that name be there.
type Claim struct {
	Namespace string `json:"namespace,omitempty"`
	// PVC is the name of the PersistentVolumeClaim, PV that of its volume.
	PVC string `json:"pvc,omitempty"`
	PV  string `json:"pv,omitempty"`
}

// LayerRecord describes one layer. Exactly one of COW and Log is set.
type LayerRecord struct {
	ID   uint64     `json:"id"` // grows from the base upwards, never used twice
	File string     `json:"file"`
	COW  *COWRecord `json:"cow,omitempty"`
	Log  *LogRecord `json:"log,omitempty"`
}

// COWRecord names the COW that a layer is.
type COWRecord struct {
	Length int64  `json:"length"` // bytes
	CRC    uint32 `json:"crc"`    // see cow.Identity
	// Label is where an unfinished file was opened.
	Label *uint64 `json:"label,omitempty"`
}

func (c *COWRecord) identity() cow.Identity { return cow.Identity{Length: c.Length, CRC: c.CRC} }

// LogRecord is what has to be known of a write log beside its file.
type LogRecord struct {
	Sealed bool             `json:"sealed,omitempty"`
	Last   uint64           `json:"last,omitempty"` // last record of a sealed log
	Freed  []writelog.Freed `json:"freed,omitempty"`
}

// CutRecord says that the layers below a log are frozen for a snapshot.
type CutRecord struct {
	Snapshot string    `json:"snapshot"`
	Layer    uint64    `json:"layer"` // the log above the frozen view
	Time     time.Time `json:"time"`
	Size     int64     `json:"size"` // of the volume at the cut, bytes
	// Compression of the snapshot, as snapshot.EncodeOptions takes it.
	Compression string `json:"compression,omitempty"`
}

// StageRecord is how the volume was staged, kept for a restart of the node
// plugin.
type StageRecord struct {
	Path     string `json:"path"`
	Block    bool   `json:"block,omitempty"`
	FSType   string `json:"fsType,omitempty"`
	ReadOnly bool   `json:"readOnly,omitempty"`
}

// Limits bound a volume's write log, in bytes of disk.
type Limits struct {
	// Soft: above it the merge runs at full rate.
	Soft int64 `json:"soft,omitempty"`
	// Hard: above it guest writes slow down.
	Hard int64 `json:"hard,omitempty"`
}

// DefaultLimits are the limits of a volume that asked for none.
var DefaultLimits = Limits{Soft: 1 << 30, Hard: 4 << 30}

var (
	// ErrRecord says that a volume's record cannot be used.
	ErrRecord = errors.New("volume record cannot be used")
	// ErrNewer says that a newer release has written the record. It is left alone.
	ErrNewer = errors.New("volume record of a newer release of snapmerge")
)

// format is the lowest format that can say what the record says: an earlier release
// goes on with whatever it can understand in full.
func (r *Record) format() int {
	if r.Native != "" {
		return nativeFormat
	}
	return recordFormat
}

func (r *Record) save(fsys blockio.FS, dir string) error {
	b, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	return blockio.WriteFileAtomic(fsys, path.Join(dir, recordName), append(b, '\n'))
}

// ReadRecord reads the record of the volume in dir. It fails with ErrNewer or
// ErrRecord.
func ReadRecord(fsys blockio.FS, dir string) (*Record, error) {
	name := path.Join(dir, recordName)
	b, err := fsys.ReadFile(name)
	if err != nil {
		return nil, err
	}
	// Nothing is said about the rest of a newer record.
	var version struct {
		Format int `json:"format"`
	}
	if err := json.Unmarshal(b, &version); err != nil {
		return nil, fmt.Errorf("%w: %s: %v", ErrRecord, name, err)
	}
	if version.Format > newestFormat {
		return nil, fmt.Errorf("%w: %s has format %d, this release knows formats up to %d", ErrNewer, name, version.Format, newestFormat)
	}
	r := &Record{}
	// A field that is not known would be lost when the record is written next.
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	err = d.Decode(r)
	if err == nil {
		err = r.check()
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %s: %v", ErrRecord, name, err)
	}
	return r, nil
}

func (r *Record) check() error {
	switch {
	case r.Format < recordFormat:
		return fmt.Errorf("format %d is none", r.Format)
	case r.Native != "" && r.Native != GoneNative && r.Native != Returning:
		return fmt.Errorf("native state %q is unknown", r.Native)
	case r.Native != "" && (len(r.Layers) > 0 || r.Cut != nil):
		return errors.New("handed over to its base, and has layers or a cut")
	case r.ID == "" || r.Size <= 0 || r.Size%blockio.BlockSize != 0 || r.Base == "":
		return errors.New("id, size or base is missing or wrong")
	}
	last := uint64(0)
	for i, l := range r.Layers {
		switch {
		case l.ID <= last || l.ID >= r.NextLayer || l.File == "":
			return fmt.Errorf("layer %d: id %d or file is wrong", i, l.ID)
		case (l.COW == nil) == (l.Log == nil):
			return fmt.Errorf("layer %d is not one of COW and log", l.ID)
		case l.Log != nil && !l.Log.Sealed && i < len(r.Layers)-1:
			return fmt.Errorf("layer %d is an open log below another layer", l.ID)
		}
		last = l.ID
	}
	if r.Cut != nil && r.layer(r.Cut.Layer) == nil {
		return fmt.Errorf("cut above layer %d, which is missing", r.Cut.Layer)
	}
	return nil
}

// layer returns the record of a layer, or nil.
func (r *Record) layer(id uint64) *LayerRecord {
	for i := range r.Layers {
		if r.Layers[i].ID == id {
			return &r.Layers[i]
		}
	}
	return nil
}

// clone returns a copy that shares nothing that is ever changed.
func (r *Record) clone() *Record {
	c := *r
	c.Layers = make([]LayerRecord, len(r.Layers))
	for i, l := range r.Layers {
		if l.Log != nil {
			log := *l.Log
			l.Log = &log
		}
		c.Layers[i] = l
	}
	if r.Cut != nil {
		cut := *r.Cut
		c.Cut = &cut
	}
	if r.Stage != nil {
		st := *r.Stage
		c.Stage = &st
	}
	return &c
}

func (r *Record) file(dir, name string) string {
	if path.IsAbs(name) {
		return name
	}
	return path.Join(dir, name)
}
