package merge

import (
	"errors"
	"fmt"
	"io/fs"

	"github.com/google/uuid"

	"github.com/snapmerge/snapmerge/pkg/blockio"
)

// claimXattr is the extended attribute that a file base carries while a merge
// into it is unfinished: the id of the journal, without which nothing may touch
// the base.
const claimXattr = "user.snapmerge.journal"

// mergedXattr is the attribute that names the journal of the last merge that was
// completed, so that a finished journal beside another base is noticed.
const mergedXattr = "user.snapmerge.merged"

// probeXattr is set and taken away at once, to see whether a base can carry marks.
// It says nothing if a process dies in between.
const probeXattr = "user.snapmerge.probe"

// Claim tells which journal a base needs: uuid.Nil if none, or if the base
// cannot carry the mark (a device, a file system without extended attributes).
func Claim(base blockio.File) (uuid.UUID, error) {
	v, err := base.Xattr(claimXattr)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, errors.ErrUnsupported) {
		return uuid.Nil, nil
	}
	if err != nil {
		return uuid.Nil, err
	}
	id, err := uuid.ParseBytes(v)
	if err != nil {
		return uuid.Nil, fmt.Errorf("%w: attribute %s of %s is not a journal id: %q", ErrMismatch, claimXattr, base.Name(), v)
	}
	return id, nil
}

// CheckUnclaimed refuses a base in the middle of a merge whose journal is not
// at hand.
func CheckUnclaimed(base blockio.File) error {
	id, err := Claim(base)
	if err == nil && id != uuid.Nil {
		err = fmt.Errorf("%w: %s is half merged and needs journal %v", ErrMismatch, base.Name(), id)
	}
	return err
}

// ClaimBase marks the base, durably, as merged into under the journal. A base
// that another journal has marked is refused, and so is an unmarked one if the
// journal is in the middle of a merge: then that is into another base.
func ClaimBase(base blockio.File, j *Journal) error {
	if base.Size() < j.baseSize {
		return fmt.Errorf("%w: %s has %d bytes, journal %s is of a base of %d", ErrMismatch, base.Name(), base.Size(), j.f.Name(), j.baseSize)
	}
	id, err := Claim(base)
	switch {
	case err != nil:
		return err
	case id == j.id:
		return base.Flush() // who set the mark may have died before this
	case id != uuid.Nil:
		return fmt.Errorf("%w: %s is half merged and needs journal %v, %s is %v", ErrMismatch, base.Name(), id, j.f.Name(), j.id)
	}
	// Refused before it is marked: a mark that stayed would let it in the next time.
	mark := claimXattr
	if j.InProgress() {
		mark = probeXattr
	}
	err = base.SetXattr(mark, []byte(j.id.String()))
	switch {
	case errors.Is(err, errors.ErrUnsupported):
		return nil
	case err != nil:
		return err
	case mark == probeXattr:
		return errors.Join(fmt.Errorf("%w: journal %s is in the middle of a merge into a base that carries its mark, %s does not",
			ErrMismatch, j.f.Name(), base.Name()), base.RemoveXattr(probeXattr))
	}
	return base.Flush()
}

// MarkMerged notes on a base that the journal's merge into it is complete. It must
// come before ReleaseBase. Bases that cannot carry the mark are left as they are.
func MarkMerged(base blockio.File, j *Journal) error {
	if err := base.SetXattr(mergedXattr, []byte(j.id.String())); !errors.Is(err, errors.ErrUnsupported) {
		return err
	}
	return nil
}

// CheckMerged refuses a base that a finished journal is not the journal of. A
// journal that never merged anything, because the COW said that all was done, has
// nothing to say of the base.
func CheckMerged(base blockio.File, j *Journal) error {
	if j.cur.seq <= 1 {
		return nil
	}
	for _, name := range []string{claimXattr, mergedXattr} { // the first: MarkMerged or ReleaseBase was not reached
		v, err := base.Xattr(name)
		switch {
		case errors.Is(err, errors.ErrUnsupported), err == nil && string(v) == j.id.String():
			return nil
		case err != nil && !errors.Is(err, fs.ErrNotExist):
			return err
		}
	}
	return fmt.Errorf("%w: journal %s is of a merge that is complete, but not into %s", ErrMismatch, j.f.Name(), base.Name())
}

// ReleaseBase takes the mark away when the merge is done, or was given up with
// the base.
func ReleaseBase(base blockio.File) error {
	err := base.RemoveXattr(claimXattr)
	if errors.Is(err, errors.ErrUnsupported) {
		return nil
	}
	if err != nil {
		return err
	}
	return base.Flush()
}
