package main

import (
	"slices"

	"github.com/spf13/cobra"
	"k8s.io/klog/v2"

	"github.com/snapmerge/snapmerge/pkg/admin"
	"github.com/snapmerge/snapmerge/pkg/blockio"
	"github.com/snapmerge/snapmerge/pkg/driver"
	"github.com/snapmerge/snapmerge/pkg/kube"
	"github.com/snapmerge/snapmerge/pkg/readahead"
	"github.com/snapmerge/snapmerge/pkg/volume"
	"github.com/snapmerge/snapmerge/pkg/volume/pacing"
)

func newNode() *cobra.Command {
	var (
		cfg   driver.Config
		kind  string
		api   string
		ahead string
		early = volume.PromotionOff
		pace  = "on"
	)
	cfg.MergeFloor = pacing.DefaultFloor
	c := &cobra.Command{
		Use:   "node --endpoint unix:///PATH --node-id ID --state-dir DIR",
		Short: "Run the CSI node plugin",
		Long: `Run the CSI node plugin (identity, controller and node service) until interrupted.

Volumes and snapshots lie in the state directory. Devices stay in service over a
restart if a keeper runs (snapmerge keeper); without one they end with this process.`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			outliveReaders()
			warnUnprepared()
			cfg.ReadAhead.Mode = readahead.Mode(ahead)
			cfg.ReadPromotion = early == volume.PromotionOn
			cfg.MergePacing = pace == "on"
			cfg.IO, cfg.KubeAPI, cfg.Version = blockio.Kind(kind), kube.Mode(api), version
			return driver.Run(c.Context(), cfg)
		},
	}
	f := c.Flags()
	f.StringVar(&cfg.Endpoint, "endpoint", "", "where to serve CSI: unix:///path/to/socket")
	f.StringVar(&cfg.NodeID, "node-id", "", "name of this node, as Kubernetes has it")
	f.StringVar(&cfg.StateDir, "state-dir", "", "directory of volumes and snapshots; it must exist")
	f.BoolVar(&cfg.Init, "init", false, "mark an empty state directory as one; without it an unmarked directory is refused, lest a disk that is not mounted look like no volumes")
	f.StringVar(&cfg.KeeperSocket, "keeper", "", "socket of the keeper (default: none, devices end with this process)")
	f.StringVar(&cfg.KubeletDir, "kubelet-dir", "", "kubelet's directory, usually /var/lib/kubelet: register there, and refuse paths that lead out of it (default: neither)")
	f.StringVar(&cfg.AdminSocket, "admin-socket", admin.DefaultSocket, `where to listen for status, pause, resume and rate; "": nowhere`)
	f.StringVar(&cfg.MetricsAddr, "metrics-addr", "", "HOST:PORT to serve /metrics and /healthz at (default: nowhere)")
	f.StringVar(&cfg.TracingEndpoint, "tracing-endpoint", "", "HOST:PORT of an OpenTelemetry collector (OTLP, gRPC without TLS) that gets a span of each CSI call (default: none)")
	f.StringVar(&api, "kube-api", string(kube.Auto), "show merges as VolumeMerge objects and events, and obey the objects: on, off, or auto (if there is access, as in a pod)")
	f.BoolVar(&cfg.HandOver, "hand-over", true, "hand volumes that are merged over to their base, so that no I/O passes through this process; where device-mapper and loop devices can be used")
	f.Var(rateFlag{&cfg.MergeRate}, "merge-rate", "most MiB/s of a volume's merge, unless the volume has a rate of its own; 0: no limit")
	addReadAhead(c, &ahead, &cfg.ReadAhead)
	f.Var(&choice{&early, []string{volume.PromotionOn, volume.PromotionOff}}, "read-promotion", "on: what pods read is merged before the rest; off: in the order of the snapshot; unless the volume has its own")
	f.IntVar(&cfg.MergeConcurrency, "merge-concurrency", volume.DefaultMergeConcurrency, "most merges at a time, which take turns; 0: no limit")
	f.Var(&choice{&pace, []string{"on", "off"}}, "merge-pacing", "on: merges hold back while pods use the disk; off: they hold back for nothing but their rate")
	f.Var(rateFlag{&cfg.MergeFloor}, "merge-floor", "MiB/s that each merge gets done at least while it holds back; 0: the default")
	f.DurationVar(&cfg.MergeStalledAfter, "merge-stalled-after", volume.DefaultStalledAfter, "how long a merge may get nothing done before its volume is stalled")
	required(c, "endpoint", "node-id", "state-dir")
	addTransport(c, &cfg.Transport)
	addIO(c, &kind)
	return c
}

// prepared is why the process is not as ready for serving devices as it could
// be, or nil.
var prepared error

// prepare readies the process if it is to serve devices. It may execute the
// program anew, so it comes first.
func prepare(args []string) {
	if slices.ContainsFunc(args, func(a string) bool { return a == "node" || a == "attach" || a == "read" }) { // read: as a node would serve it
		prepared = driver.Prepare()
	}
}

// warnUnprepared logs what prepare could not do, once the log is set up.
func warnUnprepared() {
	if prepared != nil {
		klog.InfoS("WARNING: the process is not as ready as it could be", "why", prepared)
	}
}
