package dmuser

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/snapmerge/snapmerge/pkg/transport"
)

// Probe makes a small device, reads it and takes it away again. The kernel loads
// the module dm_user for it if it has one.
func (t *Transport) Probe() error {
	err := tryMapping(func(ctx context.Context, b transport.Backend, o transport.Options) (transport.Device, error) {
		return New(nil).create(ctx, "probe "+rand.Text(), b, o)
	})
	if err != nil {
		return fmt.Errorf("dm-user: %w", err)
	}
	return nil
}

// SurvivesRestart says why devices would not survive a restart of this process,
// or nil.
func (t *Transport) SurvivesRestart() error {
	if t.keeper == nil {
		return errors.New("dm-user: no keeper is configured")
	}
	return nil
}

// fdsPerVolume is what a volume needs in this process: channels, a spare one and
// their memory, duplicates of them for the keeper, and as many again for its files.
const fdsPerVolume = 3 * (channels + 3)

// oldMinors is how many control nodes a kernel before 6.2 has numbers for, at the
// least.
const oldMinors = 64

// MaxVolumes is how many devices this process could have at a time: bounded by
// descriptors and, before kernel 6.2, by the numbers of misc devices.
func (t *Transport) MaxVolumes() (int64, error) {
	files, err := transport.FilesFor(fdsPerVolume)
	if err != nil {
		return 0, err
	}
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return 0, os.NewSyscallError("uname", err)
	}
	var major, minor int
	if _, err := fmt.Sscanf(unix.ByteSliceToString(u.Release[:]), "%d.%d", &major, &minor); err != nil {
		return 0, fmt.Errorf("kernel release %q: %w", u.Release, err)
	}
	if major > 6 || major == 6 && minor >= 2 {
		return files, nil
	}
	others := 0
	all, err := filepath.Glob("/sys/class/misc/*")
	for _, name := range all {
		if !strings.HasPrefix(filepath.Base(name), "dm-user!"+namePrefix) {
			others++
		}
	}
	return max(0, min(files, int64(oldMinors-others))), err
}
