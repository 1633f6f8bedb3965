package ublk

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
	"strconv"
	"strings"
)

// record says which device is a volume's: that which carries the tag. It is
// written before the device is made, so there is never a device without one; it
// means nothing after a reboot, for then there is no device with its tag.
type record struct {
	Version int    `json:"version"` // recordVersion
	Volume  string `json:"volume"`
	Tag     uint64 `json:"tag"` // random, not 0
}

const (
	recordVersion = 1
	recordSuffix  = ".json"
)

// records are those of a directory, which is made with the first of them.
type records struct{ dir string }

func (r records) path(volume string) string {
	h := sha256.Sum256([]byte(volume))
	return filepath.Join(r.dir, hex.EncodeToString(h[:8])+recordSuffix)
}

func newTag() uint64 {
	var b [8]byte
	_, _ = rand.Read(b[:]) // never fails
	return binary.NativeEndian.Uint64(b[:]) | 1
}

// put writes a record. After a power cut, which the device does not survive, it
// need not be there, but it is never seen half written, which a rename alone
// would not give.
func (r records) put(volume string, tag uint64) error {
	b, err := json.Marshal(record{recordVersion, volume, tag})
	if err != nil {
		return err
	}
	if err := os.MkdirAll(r.dir, 0o700); err != nil {
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

// get returns the tag, or fs.ErrNotExist.
func (r records) get(volume string) (uint64, error) {
	rec, err := readRecord(r.path(volume))
	if err == nil && rec.Volume != volume {
		err = fmt.Errorf("%s is of volume %q", r.path(volume), rec.Volume)
	}
	return rec.Tag, err
}

func readRecord(path string) (rec record, err error) {
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

func (r records) drop(volume string) error {
	err := os.Remove(r.path(volume))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// list returns all records, and the errors of files that are none.
func (r records) list() (recs []record, err error) {
	entries, err := os.ReadDir(r.dir)
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
		rec, err := readRecord(filepath.Join(r.dir, e.Name()))
		if err != nil {
			errs = append(errs, err)
			continue
		}
		recs = append(recs, rec)
	}
	return recs, errors.Join(errs...)
}

// charClass lists the character devices of all ublk devices.
const charClass = "/sys/class/ublk-char"

// devicesByTag looks at all ublk devices of the machine.
func devicesByTag(c *control) (map[uint64]devInfo, error) {
	entries, err := os.ReadDir(charClass)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	found := map[uint64]devInfo{}
	for _, e := range entries {
		n, ok := strings.CutPrefix(e.Name(), "ublkc")
		id, err := strconv.ParseUint(n, 10, 32)
		if !ok || err != nil {
			continue
		}
		// One that is gone meanwhile, or another user's, is not ours.
		if info, err := c.info(uint32(id)); err == nil {
			found[info.tag] = info
		}
	}
	return found, nil
}
