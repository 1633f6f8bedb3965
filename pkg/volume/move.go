package volume

import (
	"errors"
	"path"
)

// moveTo gives the volume's directory another name while it is open, durably.
func (v *Volume) moveTo(dir string) error {
	v.changing.Lock()
	defer v.changing.Unlock()
	v.recMu.Lock()
	defer v.recMu.Unlock()
	old := v.dirName()
	if err := v.cfg.FS.Rename(old, dir); err != nil {
		return err
	}
	v.dir.Store(&dir)
	return errors.Join(v.cfg.FS.SyncDir(path.Dir(dir)), v.cfg.FS.SyncDir(path.Dir(old)))
}

// discard ends all work and closes the files of a volume that is to be removed;
// nothing is flushed.
func (v *Volume) discard() error {
	v.Stop()
	v.pacer.Close()
	v.gate.Lock()
	defer v.gate.Unlock()
	return v.closeFiles()
}
