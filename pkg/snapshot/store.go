package snapshot

import (
	"errors"
	"fmt"
	"io/fs"
	"path"
	"strings"
	"sync"

	"github.com/snapmerge/snapmerge/pkg/blockio"
)

const (
	recordName    = "snapshot.json"
	newPrefix     = ".new-"
	deletedPrefix = ".deleted-"
)

// Store is a directory of snapshots. It keeps nothing in memory and is safe for
// concurrent use, by one process at a time. All changes are durable when the
// method that makes them returns.
type Store struct {
	fsys blockio.FS
	dir  string
	mu   sync.Mutex // one change at a time
}

// OpenStore opens the store in dir, which is made if it is absent, and removes
// what cut-off creations and removals left. What is there is durable then. Records
// are not read: one that is damaged keeps nothing but its own snapshot from being
// used.
func OpenStore(fsys blockio.FS, dir string) (*Store, error) {
	s := &Store{fsys: fsys, dir: dir}
	if err := s.open(); err != nil {
		return nil, fmt.Errorf("open the snapshots in %s: %w", dir, err)
	}
	return s, nil
}

func (s *Store) open() error {
	err := s.fsys.Mkdir(s.dir)
	if err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	// Also if it was there: it may be the work of a process that died before
	// this step.
	if err := s.fsys.SyncDir(path.Dir(s.dir)); err != nil {
		return err
	}
	// The process that worked here before may have died between a change and the
	// sync after it. What this one sees shall be there after a power cut too: a
	// snapshot that is taken for ready lets the view go that it was made from. Nor
	// must what was renamed to be removed come back under its name, emptied.
	if err := s.fsys.SyncDir(s.dir); err != nil {
		return err
	}
	names, err := s.fsys.ReadDir(s.dir)
	if err != nil {
		return err
	}
	for _, name := range names {
		if strings.HasPrefix(name, newPrefix) || strings.HasPrefix(name, deletedPrefix) {
			err = s.fsys.RemoveAll(path.Join(s.dir, name))
		} else if ok, existsErr := s.fsys.Exists(s.recordPath(name)); ok && existsErr == nil {
			err = s.fsys.SyncDir(s.Path(name))
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// sweepLocked removes what an earlier change has left in its way; mu must be
// held.
func (s *Store) sweepLocked(name string) error {
	exists, err := s.fsys.Exists(name)
	if err != nil || !exists {
		return err
	}
	if err := s.fsys.SyncDir(s.dir); err != nil { // see open
		return err
	}
	return s.fsys.RemoveAll(name)
}

// Path is the directory of a snapshot. The id must have passed CheckID, as those
// of all records have.
func (s *Store) Path(id string) string { return path.Join(s.dir, id) }

// COWPath is the name of the COW of a snapshot; the same holds for the id.
func (s *Store) COWPath(id string) string { return path.Join(s.dir, id, cowName) }

func (s *Store) recordPath(id string) string { return path.Join(s.dir, id, recordName) }

// Create adds a pending snapshot: ID, Name, SourceVolumeID, Size, CreatedAt,
// FSType and Blank are those of r. Errors: ErrInvalidID, ErrExists.
func (s *Store) Create(r Record) (Record, error) {
	if err := CheckID(r.ID); err != nil {
		return Record{}, err
	}
	r.FormatVersion, r.State, r.Message, r.COW = recordVersion, Pending, "", nil
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.createLocked(r); err != nil {
		return Record{}, fmt.Errorf("create snapshot %s: %w", r.ID, err)
	}
	return r, nil
}

// createLocked: mu must be held.
func (s *Store) createLocked(r Record) error {
	b, err := r.encode()
	if err != nil {
		return err
	}
	final, made := s.Path(r.ID), path.Join(s.dir, newPrefix+r.ID)
	if exists, err := s.fsys.Exists(final); err != nil {
		return err
	} else if exists {
		return ErrExists
	}
	if err := s.sweepLocked(made); err != nil {
		return err
	}
	err = s.fsys.Mkdir(made)
	if err == nil {
		err = blockio.WriteFileAtomic(s.fsys, path.Join(made, recordName), b)
	}
	if err == nil {
		err = s.fsys.Rename(made, final)
	}
	if err != nil {
		return errors.Join(err, s.fsys.RemoveAll(made))
	}
	if err := s.fsys.SyncDir(s.dir); err != nil {
		// Then it is not there for this process either; swept later.
		return errors.Join(err, s.fsys.Rename(final, made))
	}
	return nil
}

// Get reads the record of a snapshot. Errors: ErrNotFound (also for an id that is
// not valid), ErrDamaged, ErrNewer.
func (s *Store) Get(id string) (Record, error) {
	r, err := s.get(id)
	if err != nil {
		return Record{}, fmt.Errorf("snapshot %q: %w", id, err)
	}
	return r, nil
}

func (s *Store) get(id string) (Record, error) {
	if CheckID(id) != nil {
		return Record{}, ErrNotFound
	}
	b, err := s.fsys.ReadFile(s.recordPath(id))
	if errors.Is(err, fs.ErrNotExist) {
		if exists, dirErr := s.fsys.Exists(s.Path(id)); dirErr == nil && !exists {
			return Record{}, ErrNotFound
		}
		// A directory never has its name before it has a record.
		return Record{}, fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	if err != nil {
		return Record{}, err
	}
	return decodeRecord(id, b)
}

// List reads all records, sorted by id. Snapshots whose records cannot be read
// are returned apart, as errors by id; they say what Get would.
func (s *Store) List() (records []Record, unreadable map[string]error, err error) {
	names, err := s.fsys.ReadDir(s.dir)
	if err != nil {
		return nil, nil, fmt.Errorf("list snapshots: %w", err)
	}
	unreadable = map[string]error{}
	for _, id := range names {
		if CheckID(id) != nil {
			continue
		}
		r, err := s.Get(id)
		switch {
		case err == nil:
			records = append(records, r)
		case !errors.Is(err, ErrNotFound): // not deleted meanwhile
			unreadable[id] = err
		}
	}
	return records, unreadable, nil
}

// Update changes a record: change gets it and may set Name, FSType, State,
// Message and COW. Its error ends the update and is wrapped.
func (s *Store) Update(id string, change func(*Record) error) (Record, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	r, err := s.Get(id)
	if err != nil {
		return Record{}, err
	}
	if err := s.updateLocked(&r, change); err != nil {
		return Record{}, fmt.Errorf("update snapshot %s: %w", id, err)
	}
	return r, nil
}

// updateLocked: mu must be held.
func (s *Store) updateLocked(r *Record, change func(*Record) error) error {
	id := r.ID
	if err := change(r); err != nil {
		return err
	}
	r.FormatVersion = recordVersion
	if err := r.check(id); err != nil {
		return err
	}
	b, err := r.encode()
	if err != nil {
		return err
	}
	return blockio.WriteFileAtomic(s.fsys, s.recordPath(id), b)
}

// SetReady says that the snapshot is encoded.
func (s *Store) SetReady(id string, info Info) (Record, error) {
	return s.Update(id, func(r *Record) error {
		r.State, r.Message, r.COW = Ready, "", &info
		return nil
	})
}

// SetFailed says that the snapshot will never be encoded, and why.
func (s *Store) SetFailed(id, message string) (Record, error) {
	return s.Update(id, func(r *Record) error {
		r.State, r.Message, r.COW = Failed, message, nil
		return nil
	})
}

// Delete removes a snapshot; links to its files that volumes hold stay. One that
// is not there is no error, and one with a damaged record is removed as well, but
// not one of a newer version (ErrNewer). After another error it may be there or
// not; Delete can be called again.
func (s *Store) Delete(id string) error {
	if CheckID(id) != nil {
		return nil // no snapshot has such an id
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.deleteLocked(id); err != nil {
		return fmt.Errorf("delete snapshot %s: %w", id, err)
	}
	return nil
}

// deleteLocked: mu must be held.
func (s *Store) deleteLocked(id string) error {
	if _, err := s.get(id); errors.Is(err, ErrNewer) {
		return err
	}
	trash := path.Join(s.dir, deletedPrefix+id)
	if err := s.sweepLocked(trash); err != nil {
		return err
	}
	if err := s.fsys.Rename(s.Path(id), trash); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return err
	}
	// Nothing is taken out of it before it is gone for good: it is deleted or
	// whole.
	if err := s.fsys.SyncDir(s.dir); err != nil {
		return err
	}
	return s.fsys.RemoveAll(trash)
}
