package driver

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"sync"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"

	"github.com/snapmerge/snapmerge/pkg/health"
	"github.com/snapmerge/snapmerge/pkg/volume"
)

// statLimit is how long to wait for a file system to tell its usage.
const statLimit = 1500 * time.Millisecond

// usages remembers what volumes have told of their usage.
type usages struct {
	mu   sync.Mutex
	last map[string][]*csi.VolumeUsage
	// asking is since when a file system has not answered, by volume; nobody else
	// asks it meanwhile.
	asking map[string]time.Time
}

func (s nodeServer) NodeGetVolumeStats(ctx context.Context, req *csi.NodeGetVolumeStatsRequest) (*csi.NodeGetVolumeStatsResponse, error) {
	id, path := req.GetVolumeId(), req.GetVolumePath()
	switch {
	case id == "":
		return nil, invalid("volume id is missing")
	case path == "":
		return nil, invalid("volume_path is missing")
	}
	st, err := s.volumes.Status(id)
	if err != nil {
		return nil, err
	}
	if _, err := s.volumes.Get(id); err != nil && st.Device == "" {
		st.DeviceDown = true // it cannot be opened: the pod has lost it
	}
	usage, err := s.usage(ctx, id, path, st)
	var silent *silentError
	switch {
	case errors.As(err, &silent):
		st.DeviceDown, st.Error = true, err.Error()
	case err != nil:
		return nil, err
	}
	r := &csi.NodeGetVolumeStatsResponse{Usage: usage}
	health.SetCondition(r, health.ConditionOf(st))
	return r, nil
}

func (s nodeServer) NodeGetVolumeHealth(_ context.Context, req *csi.NodeGetVolumeHealthRequest) (*csi.NodeGetVolumeHealthResponse, error) {
	id := req.GetVolumeId()
	if id == "" {
		return nil, invalid("volume id is missing")
	}
	st, err := s.volumes.Status(id)
	if err != nil {
		return nil, err
	}
	if err := s.used.silence(id); err != nil {
		st.DeviceDown, st.Error = true, err.Error()
	}
	return &csi.NodeGetVolumeHealthResponse{VolumeHealth: health.HealthOf(st)}, nil
}

// silentError says that a file system does not answer.
type silentError struct{ since time.Time }

func (e *silentError) Error() string {
	return fmt.Sprintf("the file system has not answered for %s", time.Since(e.since).Round(time.Second))
}

// silence returns an error if the volume's file system has been asked and has
// not answered in time.
func (u *usages) silence(id string) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	if since, ok := u.asking[id]; ok && time.Since(since) >= statLimit {
		return &silentError{since}
	}
	return nil
}

// usage asks what is at the path for its usage. If it does not answer in time,
// the answer before is returned with a silentError.
func (p *plugin) usage(ctx context.Context, id, path string, st volume.Status) ([]*csi.VolumeUsage, error) {
	u := &p.used
	if !u.begin(id) {
		return u.known(id, st), u.silence(id)
	}
	type result struct {
		usage []*csi.VolumeUsage
		err   error
	}
	done := make(chan result, 1)
	go func() {
		var r result
		r.err = guard("stat of "+path, func() (err error) {
			r.usage, err = p.measure(path, st)
			return err
		})
		u.end(id, r.usage)
		done <- r
	}()
	select {
	case r := <-done:
		if r.err != nil && st.DeviceDown && !errors.Is(r.err, errNotFound) {
			return u.known(id, st), nil // the condition says what is wrong
		}
		return r.usage, r.err
	case <-time.After(statLimit):
		return u.known(id, st), u.silence(id)
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// begin notes that the volume is being asked; false: it is already.
func (u *usages) begin(id string) bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	if _, ok := u.asking[id]; ok {
		return false
	}
	if u.asking == nil {
		u.asking, u.last = map[string]time.Time{}, map[string][]*csi.VolumeUsage{}
	}
	u.asking[id] = time.Now()
	return true
}

// forget forgets a volume that is gone.
func (u *usages) forget(id string) {
	u.mu.Lock()
	defer u.mu.Unlock()
	delete(u.last, id)
}

func (u *usages) end(id string, usage []*csi.VolumeUsage) {
	u.mu.Lock()
	defer u.mu.Unlock()
	delete(u.asking, id)
	if usage != nil {
		u.last[id] = usage
	}
}

// known is the usage that was told last, or what is known without asking:
// kubelet takes no reply without any. CSI demands the total, so there is none
// where nothing is known.
func (u *usages) known(id string, st volume.Status) []*csi.VolumeUsage {
	u.mu.Lock()
	defer u.mu.Unlock()
	if last := u.last[id]; last != nil {
		return last
	}
	if st.Size == 0 {
		return nil
	}
	return []*csi.VolumeUsage{{Unit: csi.VolumeUsage_BYTES, Total: st.Size}}
}

// measure asks the file system, or the device, at the path.
func (p *plugin) measure(path string, st volume.Status) ([]*csi.VolumeUsage, error) {
	var at unix.Stat_t
	if err := unix.Stat(path, &at); err != nil {
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) {
			return nil, fmt.Errorf("volume %s at %s: %w", st.ID, path, errNotFound)
		}
		return nil, &os.PathError{Op: "stat", Path: path, Err: err}
	}
	if st.DeviceDown {
		return nil, fmt.Errorf("what is at %s is not volume %s", path, st.ID)
	}
	block := at.Mode&unix.S_IFMT == unix.S_IFBLK
	on := at.Dev
	if block {
		on = at.Rdev
	}
	if number, err := blockNumber(st.Device); err != nil || number != on {
		return nil, fmt.Errorf("volume %s at %s: %w", st.ID, path, errNotFound)
	}
	if block {
		return []*csi.VolumeUsage{{Unit: csi.VolumeUsage_BYTES, Total: st.Size}}, nil
	}
	var f unix.Statfs_t
	if err := p.statfs(path, &f); err != nil {
		return nil, &os.PathError{Op: "statfs", Path: path, Err: err}
	}
	return []*csi.VolumeUsage{
		{
			Unit: csi.VolumeUsage_BYTES, Available: int64(f.Bavail) * f.Bsize, Total: int64(f.Blocks) * f.Bsize,
			Used: int64(f.Blocks-f.Bfree) * f.Bsize,
		},
		{
			Unit: csi.VolumeUsage_INODES, Available: int64(f.Ffree), Total: int64(f.Files),
			Used: int64(f.Files - f.Ffree),
		},
	}, nil
}
