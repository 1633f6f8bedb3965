package snapshot

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"regexp"
	"time"
)

// recordVersion is the format version of records.
const recordVersion = 1

// State is how far a snapshot is.
type State string

const (
	// Pending: cut, and being encoded; encoding starts again after a restart.
	Pending State = "pending"
	// Ready: the COW is complete and durable.
	Ready State = "ready"
	// Failed: there is no COW and there will be none; the message says why.
	Failed State = "failed"
)

// Record describes a snapshot. It is kept as JSON.
type Record struct {
	FormatVersion int `json:"formatVersion"`
	// ID names the snapshot's directory, see CheckID.
	ID string `json:"id"`
	// Name is what whoever asked for the snapshot calls it.
	Name           string `json:"name"`
	SourceVolumeID string `json:"sourceVolumeID"`
	// Size is that of the image in bytes.
	Size      int64     `json:"sizeBytes"`
	CreatedAt time.Time `json:"createdAt"`
	State     State     `json:"state"`
	// Message says why the snapshot has failed.
	Message string `json:"message,omitempty"`
	// FSType is the file system on the image; empty for a raw block volume.
	FSType string `json:"fsType,omitempty"`
	// Blank: the volume had never been formatted or written, so the image is
	// empty and what is restored from it may be formatted.
	Blank bool `json:"blank,omitempty"`
	// COW is set when the snapshot is ready.
	COW *Info `json:"cow,omitempty"`
}

var (
	// ErrNotFound says that there is no snapshot of that id.
	ErrNotFound = errors.New("no such snapshot")
	// ErrExists says that there is a snapshot of that id.
	ErrExists = errors.New("the snapshot exists")
	// ErrInvalidID says that an id cannot be the name of a directory of the store.
	ErrInvalidID = errors.New("invalid snapshot id")
	// ErrDamaged says that a record cannot be understood. It is kept.
	ErrDamaged = errors.New("damaged snapshot record")
	// ErrNewer says that a record was written by a newer version of snapmerge. It
	// is left alone.
	ErrNewer = errors.New("snapshot record of a newer version of snapmerge")
)

var idPattern = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$`)

// CheckID returns an error that wraps ErrInvalidID unless the id is made of 1 to
// 128 letters, digits, dots, dashes and underscores, the first a letter or digit.
func CheckID(id string) error {
	if !idPattern.MatchString(id) {
		return fmt.Errorf("%w %q: want 1 to 128 of A–Z a–z 0–9 . _ -, the first a letter or a digit", ErrInvalidID, id)
	}
	return nil
}

// check checks a record whose version is recordVersion. id is that of its
// directory.
func (r *Record) check(id string) error {
	switch {
	case r.ID != id:
		return fmt.Errorf("id is %q", r.ID)
	case r.Size < 0:
		return fmt.Errorf("size is %d", r.Size)
	case r.State != Pending && r.State != Ready && r.State != Failed:
		return fmt.Errorf("state is %q", r.State)
	case (r.State == Ready) != (r.COW != nil):
		return fmt.Errorf("state is %q, COW is %v", r.State, r.COW)
	}
	return nil
}

func (r *Record) encode() ([]byte, error) {
	b, err := json.MarshalIndent(r, "", "  ")
	return append(b, '\n'), err
}

// decodeRecord reads the record of the snapshot id. The version is looked at
// first: nothing is said about the rest of a newer record.
func decodeRecord(id string, b []byte) (Record, error) {
	var version struct {
		FormatVersion int `json:"formatVersion"`
	}
	if err := json.Unmarshal(b, &version); err != nil {
		return Record{}, fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	if v := version.FormatVersion; v > recordVersion {
		return Record{}, fmt.Errorf("%w: format version is %d, this one knows %d", ErrNewer, v, recordVersion)
	} else if v != recordVersion {
		return Record{}, fmt.Errorf("%w: format version is %d", ErrDamaged, v)
	}
	// A field that is not known would be lost when the record is written next.
	var r Record
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	err := d.Decode(&r)
	if err == nil {
		if _, end := d.Token(); end != io.EOF {
			err = errors.New("something follows the record")
		}
	}
	if err == nil {
		err = r.check(id)
	}
	if err != nil {
		return Record{}, fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	return r, nil
}
