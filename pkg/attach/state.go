package attach

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"

	"github.com/google/uuid"

	"github.com/snapmerge/snapmerge/pkg/blockio"
	"github.com/snapmerge/snapmerge/pkg/cow"
)

const (
	argumentsName   = "attach.json"
	argumentsFormat = 1
	lockName        = "attach.lock"
	volumeName      = "volume"
)

// ErrState says that a state directory cannot be used for what is to be
// attached.
var ErrState = errors.New("state directory does not fit")

// arguments are what was attached, as long as the state directory lives. Layers
// that are merged leave the volume's record, so it cannot tell.
type arguments struct {
	Format   int           `json:"format"`
	ID       string        `json:"id"` // of the volume
	Base     string        `json:"base"`
	COWs     []cowArgument `json:"cows"`
	ReadOnly bool          `json:"readOnly,omitempty"`
}

// cowArgument names a COW.
type cowArgument struct {
	Path   string  `json:"path"`
	Label  *uint64 `json:"label,omitempty"`
	Length int64   `json:"length"` // bytes
	CRC    uint32  `json:"crc"`    // see cow.Identity
}

// asked are the arguments of cfg. A COW that is not there has no identity.
func (cfg *Config) asked() (a arguments, err error) {
	a = arguments{Format: argumentsFormat, ReadOnly: cfg.ReadOnly}
	if a.Base, err = filepath.Abs(cfg.Base); err != nil {
		return a, err
	}
	for i, name := range cfg.COWs {
		c := cowArgument{}
		if c.Path, err = filepath.Abs(name); err != nil {
			return a, err
		}
		if i == len(cfg.COWs)-1 {
			c.Label = cfg.Label
		}
		id, err := identity(c)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return a, fmt.Errorf("%s: %w", name, err)
		}
		c.Length, c.CRC = id.Length, id.CRC
		a.COWs = append(a.COWs, c)
	}
	return a, nil
}

func identity(c cowArgument) (cow.Identity, error) {
	f, err := blockio.OS().Open(c.Path, blockio.ReadOnly)
	if err != nil {
		return cow.Identity{}, err
	}
	defer f.Close()
	file, err := cow.Open(f, f.Size(), cow.OpenOptions{Label: c.Label})
	if err != nil {
		return cow.Identity{}, err
	}
	return file.Identity()
}

// state reads the arguments of the state directory, or writes them if there is
// no volume in it yet. The lock is held.
func (cfg *Config) state() (arguments, error) {
	asked, err := cfg.asked()
	if err != nil {
		return asked, err
	}
	have, err := cfg.readState()
	known := !errors.Is(err, fs.ErrNotExist)
	made, existsErr := blockio.OS().Exists(filepath.Join(cfg.volumeDir(), "volume.json"))
	if existsErr != nil {
		return asked, existsErr
	}
	switch {
	case known && made && err == nil:
		return have, have.check(asked)
	case known && made:
		return have, err
	case !known:
		// Making a volume removes what an earlier try has left: it must be ours.
		if ok, err := blockio.OS().Exists(cfg.volumeDir()); err != nil || ok {
			return asked, errors.Join(err, fmt.Errorf("%w: there is %s, but no %s", ErrState, cfg.volumeDir(), argumentsName))
		}
	}
	asked.ID = "attach-" + uuid.NewString()
	b, err := json.MarshalIndent(asked, "", "  ")
	if err != nil {
		return asked, err
	}
	return asked, blockio.WriteFileAtomic(blockio.OS(), filepath.Join(cfg.StateDir, argumentsName), append(b, '\n'))
}

func (cfg *Config) readState() (a arguments, err error) {
	name := filepath.Join(cfg.StateDir, argumentsName)
	b, err := blockio.OS().ReadFile(name)
	if err != nil {
		return a, err
	}
	if err := json.Unmarshal(b, &a); err != nil {
		return a, fmt.Errorf("%w: %s: %w", ErrState, name, err)
	}
	if a.Format != argumentsFormat || a.ID == "" {
		return a, fmt.Errorf("%w: %s has format %d, this program knows %d", ErrState, name, a.Format, argumentsFormat)
	}
	return a, nil
}

// check compares what the state directory is of with what is asked for. A COW
// that is merged may be gone.
func (a *arguments) check(asked arguments) error {
	differ := func(format string, args ...any) error {
		return fmt.Errorf("%w: %s", ErrState, fmt.Sprintf(format, args...))
	}
	switch {
	case a.Base != asked.Base:
		return differ("it is of base %s, not %s", a.Base, asked.Base)
	case a.ReadOnly != asked.ReadOnly:
		return differ("it was made with read-only %v", a.ReadOnly)
	case len(a.COWs) != len(asked.COWs):
		return differ("it is of %d COWs, not %d", len(a.COWs), len(asked.COWs))
	}
	for i, c := range asked.COWs {
		h := a.COWs[i]
		switch {
		case h.Path != c.Path:
			return differ("COW %d is %s, not %s", i+1, h.Path, c.Path)
		case (h.Label == nil) != (c.Label == nil) || h.Label != nil && *h.Label != *c.Label:
			return differ("%s was opened at another label", h.Path)
		case c.Length != 0 && (h.Length != c.Length || h.CRC != c.CRC):
			return differ("%s has changed: it had %d bytes (checksum %08x), now %d (checksum %08x)", h.Path, h.Length, h.CRC, c.Length, c.CRC)
		}
	}
	return nil
}

func (cfg *Config) volumeDir() string { return filepath.Join(cfg.StateDir, volumeName) }
