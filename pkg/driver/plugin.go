package driver

import (
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
	"k8s.io/mount-utils"
	utilexec "k8s.io/utils/exec"

	"github.com/snapmerge/snapmerge/pkg/blockio"
	"github.com/snapmerge/snapmerge/pkg/kube"
	"github.com/snapmerge/snapmerge/pkg/metrics"
	"github.com/snapmerge/snapmerge/pkg/volume"
)

// plugin is what the three services share.
type plugin struct {
	cfg Config
	// volumes is set before ready is.
	volumes *volume.Manager
	ready   atomic.Bool
	metrics *metrics.Metrics
	ops     operations
	used    usages
	staged  stagings
	watched sync.Map // ids of volumes that abortUnused watches
	growing sync.Map // ids of volumes whose mounted file system a tool is growing

	reporter   *kube.Reporter // nil: the Kubernetes API is not used
	maxVolumes func() (int64, error)
	freeze     freezer

	// What the tests put something else in place of.
	fs        blockio.FS
	mounter   mount.Interface
	exec      utilexec.Interface
	statfs    func(path string, st *unix.Statfs_t) error
	hangLimit atomic.Int64 // nanoseconds; what runs in the background reads it, too
	// tracingLimit is how long sending the last spans may take at the end.
	tracingLimit time.Duration
	// shutdownLimit is how long devices are served on when the node goes down.
	shutdownLimit time.Duration
	// growsMounted: this process may grow an ext4 that is mounted.
	growsMounted bool
}

func newPlugin(cfg Config) *plugin {
	p := &plugin{
		cfg:          cfg,
		metrics:      metrics.New(cfg.Version),
		maxVolumes:   func() (int64, error) { return 0, nil },
		freeze:       freezeHere,
		fs:           blockio.OS(),
		mounter:      mount.NewWithoutSystemd(""),
		exec:         utilexec.New(),
		statfs:       unix.Statfs,
		tracingLimit: tracingLimit,

		shutdownLimit: shutdownLimit,

		growsMounted: mayResize(),
	}
	p.hangLimit.Store(int64(hangLimit))
	return p
}
