package transport

import (
	"errors"
	"fmt"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// Registry is the volumes that a process has devices of, or is making them. The
// zero value is ready.
type Registry struct {
	mu      sync.Mutex
	volumes map[string]struct{}
}

// ErrLeftover says that a device cannot be created.
var ErrLeftover = errors.New("an earlier process has left its device; it must be adopted")

// Make has do create or adopt the volume's device for a backend, and makes sure that
// there is one per volume: while do runs and, if it succeeds, until Forget. what
// begins the text of errors, such as "nbd: create".
func (r *Registry) Make(what, volume string, b Backend, do func() (Device, error)) (Device, error) {
	d, err := r.makeDevice(volume, b, do)
	if err != nil {
		return nil, fmt.Errorf("%s device of volume %q: %w", what, volume, err)
	}
	return d, nil
}

func (r *Registry) makeDevice(volume string, b Backend, do func() (Device, error)) (Device, error) {
	if err := CheckSize(b.Size()); err != nil {
		return nil, err
	}
	if err := r.reserve(volume); err != nil {
		return nil, err
	}
	d, err := do()
	if err != nil {
		r.Forget(volume)
	}
	return d, err
}

func (r *Registry) reserve(volume string) error {
	if volume == "" {
		return errors.New("empty volume id")
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if _, ok := r.volumes[volume]; ok {
		return errors.New("this process has a device of the volume already")
	}
	if r.volumes == nil {
		r.volumes = make(map[string]struct{})
	}
	r.volumes[volume] = struct{}{}
	return nil
}

// Forget says that the device is gone.
func (r *Registry) Forget(volume string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.volumes, volume)
}

// Has tells whether the volume is reserved.
func (r *Registry) Has(volume string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	_, ok := r.volumes[volume]
	return ok
}

// Unserved lists the volumes that keys with the prefix name and that have no device
// here.
func (r *Registry) Unserved(keys []string, prefix string) (volumes []string) {
	for _, key := range keys {
		if volume, ok := strings.CutPrefix(key, prefix); ok && !r.Has(volume) {
			volumes = append(volumes, volume)
		}
	}
	return volumes
}

// Len is the number of volumes reserved.
func (r *Registry) Len() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.volumes)
}

// Unique is a name of the volume that no other node plugin of the machine has:
// devices are the machine's, and another plugin, in another container perhaps, may
// have a volume of the same id. within is the directory in which the volumes are
// kept; without one the id is the name.
func Unique(within, volume string) string {
	if within == "" {
		return volume
	}
	var st unix.Stat_t
	if err := unix.Stat(within, &st); err != nil {
		return within + "/" + volume
	}
	return fmt.Sprintf("%d:%d/%s", st.Dev, st.Ino, volume) // containers may all call theirs the same
}

// BlockSize is what the size of every device is a multiple of, in bytes.
const BlockSize = 4096

// CheckSize refuses sizes that no device can have.
func CheckSize(size int64) error {
	if size <= 0 || size%BlockSize != 0 {
		return fmt.Errorf("size of %d bytes is not a multiple of %d", size, BlockSize)
	}
	return nil
}
