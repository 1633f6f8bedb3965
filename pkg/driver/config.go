package driver

import (
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"strings"
	"time"

	"github.com/snapmerge/snapmerge/pkg/blockio"
	"github.com/snapmerge/snapmerge/pkg/kube"
	"github.com/snapmerge/snapmerge/pkg/readahead"
	"github.com/snapmerge/snapmerge/pkg/tracing"
)

// Config is how a node plugin is run.
type Config struct {
	// Endpoint is where the CSI services listen: unix:///path/to/socket, or the
	// path alone. Required.
	Endpoint string
	// NodeID is the node's name, as Kubernetes has it; at most 256 bytes. It is
	// the value of TopologyKey. Required.
	NodeID string
	// StateDir is the directory of volumes and snapshots. Required. It must not lie
	// on a device that we serve.
	StateDir string
	// Init marks an unmarked, empty StateDir instead of refusing it.
	Init bool
	// Transport is "auto" or the name of one; "" is "auto".
	Transport string
	// HandOver has new devices handed over to the base of their volume while there is
	// nothing above it.
	HandOver bool
	// KeeperSocket is the socket of the keeper. Without one all devices die with
	// this process, and with them the file systems of the pods.
	KeeperSocket string
	// KubeletDir is kubelet's root directory (usually /var/lib/kubelet). If it is
	// given the plugin registers itself with kubelet, and paths that lead out of it
	// are refused. Endpoint is then a path that kubelet sees under the same name.
	KubeletDir string
	// AdminSocket is where the status command connects to; "": nowhere.
	AdminSocket string
	// MetricsAddr is the host:port of /metrics and /healthz; "": none.
	MetricsAddr string
	// TracingEndpoint is the host:port of an OpenTelemetry collector that gets a span
	// of each CSI call, by gRPC without TLS; "": none.
	TracingEndpoint string
	// KubeAPI is whether merges are shown as objects and events of the Kubernetes
	// API, and orders taken there; "": kube.Off.
	KubeAPI kube.Mode
	// MergeRate is the default limit of each volume's merge in MiB/s; 0: none.
	MergeRate int
	// MergeConcurrency bounds the merges that run at once; 0: no bound.
	MergeConcurrency int
	// ReadAhead is how unmerged data is read ahead; its zero value stands for not at
	// all.
	ReadAhead readahead.Config
	// ReadPromotion has data that pods read merged before the rest.
	ReadPromotion bool
	// MergePacing has merges hold back while pods use the disk, down to MergeFloor
	// MiB/s each; 0: pacing.DefaultFloor.
	MergePacing bool
	MergeFloor  int
	// MergeStalledAfter is how long a merge may get nothing done before its volume's
	// health says MergeStalled; 0: volume.DefaultStalledAfter.
	MergeStalledAfter time.Duration
	// IO is the back end of the merges, and of reads of scattered places; "": the best
	// that works.
	IO blockio.Kind
	// Version of the program, for GetPluginInfo; "": unknown.
	Version string
}

// maxNodeID is CSI's limit, in bytes.
const maxNodeID = 256

// ErrConfig says that a Config cannot be used as it is.
var ErrConfig = errors.New("configuration")

// check completes the configuration and refuses what cannot work.
func (c *Config) check() error {
	socket, err := socketPath(c.Endpoint)
	if err != nil {
		return err
	}
	c.Endpoint = socket
	if c.Transport == "" {
		c.Transport = "auto"
	}
	if c.IO == "" {
		c.IO = blockio.Auto
	}
	if c.KubeAPI == "" {
		c.KubeAPI = kube.Off
	}
	if c.Version == "" {
		c.Version = "unknown"
	}
	if c.TracingEndpoint != "" {
		if err := tracing.CheckEndpoint(c.TracingEndpoint); err != nil {
			return fmt.Errorf("%w: %w", ErrConfig, err)
		}
	}
	if c.MetricsAddr != "" {
		if _, _, err := net.SplitHostPort(c.MetricsAddr); err != nil {
			return fmt.Errorf("%w: address of the metrics: %w", ErrConfig, err)
		}
	}
	switch {
	case c.NodeID == "" || len(c.NodeID) > maxNodeID:
		return fmt.Errorf("%w: the node id has %d bytes, want 1 to %d", ErrConfig, len(c.NodeID), maxNodeID)
	case c.StateDir == "":
		return fmt.Errorf("%w: no state directory is given", ErrConfig)
	case c.MergeRate < 0 || c.MergeConcurrency < 0:
		return fmt.Errorf("%w: negative merge rate or concurrency", ErrConfig)
	case c.ReadAhead.Memory < 0 || c.ReadAhead.Window < 0 || c.ReadAhead.MaxWindow < 0 || c.ReadAhead.Batch < 0:
		return fmt.Errorf("%w: negative size of the read-ahead", ErrConfig)
	case c.MergeFloor < 0 || c.MergeStalledAfter < 0:
		return fmt.Errorf("%w: negative floor of merges, or time until they are stalled", ErrConfig)
	case c.KubeletDir != "" && !filepath.IsAbs(c.KubeletDir):
		return fmt.Errorf("%w: kubelet directory %q is not absolute", ErrConfig, c.KubeletDir)
	}
	return nil
}

// maxSocket is the longest path of a socket, in bytes (sun_path of unix(7)).
const maxSocket = 107

// socketPath is the path of an endpoint, absolute.
func socketPath(endpoint string) (string, error) {
	path := endpoint
	if scheme, rest, ok := strings.Cut(endpoint, ":"); ok && scheme == "unix" {
		path = strings.TrimPrefix(rest, "//")
	}
	if path == "" || strings.Contains(path, "://") {
		return "", fmt.Errorf("%w: endpoint %q is not of the form unix:///path", ErrConfig, endpoint)
	}
	path, err := filepath.Abs(path)
	if err == nil && len(path) > maxSocket {
		err = fmt.Errorf("%w: socket path %q is longer than %d bytes", ErrConfig, path, maxSocket)
	}
	return path, err
}
