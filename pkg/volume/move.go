package volume

import (
	"errors"
	"path"

	"github.com/snapmerge/snapmerge/pkg/blockio"
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

// dropCached has who opens the logs next find what the disk has of them. After a failed
// flush the page cache may have more, as clean: a later flush would leave that out and
// succeed. Base and journal are always opened so.
func (v *Volume) dropCached() error {
	for _, l := range v.Record().Layers {
		if l.Log == nil {
			continue
		}
		f, err := v.cfg.FS.Open(v.path(l.File), blockio.Direct)
		if err != nil {
			return err
		}
		if err := f.Close(); err != nil {
			return err
		}
	}
	return nil
}

// discard ends all work and closes the files of a volume that is to be removed, or
// opened anew; nothing is flushed.
func (v *Volume) discard() error {
	v.Stop()
	v.pacer.Close()
	v.gate.Lock()
	defer v.gate.Unlock()
	return v.closeFiles()
}
