package transport

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// Record says which device is a volume's: that which carries the tag. It is
// written before the device is made, so there is never a device without one; it
// means nothing after a reboot, for then there is no device with its tag.
type Record struct {
	Version int    `json:"version"` // recordVersion
	Volume  string `json:"volume"`
	Tag     uint64 `json:"tag"` // random, not 0
}

const (
	recordVersion = 1
	recordSuffix  = ".json"
)

// Records are those of a directory, which is made with the first of them.
type Records struct{ Dir string }

func (r Records) path(volume string) string {
	h := sha256.Sum256([]byte(volume))
	return filepath.Join(r.Dir, hex.EncodeToString(h[:8])+recordSuffix)
}

// NewTag draws a tag.
func NewTag() uint64 {
	var b [8]byte
	_, _ = rand.Read(b[:]) // never fails
	return binary.NativeEndian.Uint64(b[:]) | 1
}

// Put writes a record. After a power cut, which the device does not survive, it
// need not be there, but it is never seen half written, which a rename alone
// would not give.
func (r Records) Put(volume string, tag uint64) error {
	b, err := json.Marshal(Record{recordVersion, volume, tag})
	if err != nil {
		return err
	}
	if err := os.MkdirAll(r.Dir, 0o700); err != nil {
		return err
	}
	tmp := r.path(volume) + ".new"
	if err := writeSync(tmp, append(b, '\n')); err != nil {
		return err
	}
	return os.Rename(tmp, r.path(volume))
}

func writeSync(name string, b []byte) error {
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err == nil {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}

// Get returns the tag, or fs.ErrNotExist.
func (r Records) Get(volume string) (uint64, error) {
	rec, err := readRecord(r.path(volume))
	if err == nil && rec.Volume != volume {
		err = fmt.Errorf("%s is of volume %q", r.path(volume), rec.Volume)
	}
	return rec.Tag, err
}

func readRecord(path string) (rec Record, err error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return rec, err
	}
	if err := json.Unmarshal(b, &rec); err != nil {
		return rec, fmt.Errorf("%s: %w", path, err)
	}
	if rec.Version != recordVersion || rec.Volume == "" || rec.Tag == 0 {
		return rec, fmt.Errorf("%s: not a record of version %d: %s", path, recordVersion, b)
	}
	return rec, nil
}

// Drop removes the record; an absent one is no error.
func (r Records) Drop(volume string) error {
	err := os.Remove(r.path(volume))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// List returns all records, and the errors of files that are none.
func (r Records) List() (recs []Record, err error) {
	entries, err := os.ReadDir(r.Dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var errs []error
	for _, e := range entries {
		if !strings.HasSuffix(e.Name(), recordSuffix) {
			continue
		}
		rec, err := readRecord(filepath.Join(r.Dir, e.Name()))
		if err != nil {
			errs = append(errs, err)
			continue
		}
		recs = append(recs, rec)
	}
	return recs, errors.Join(errs...)
}
