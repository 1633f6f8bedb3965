package driver

import (
	"context"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"k8s.io/klog/v2"

	"github.com/snapmerge/snapmerge/pkg/admin"
	"github.com/snapmerge/snapmerge/pkg/keeper"
	"github.com/snapmerge/snapmerge/pkg/kube"
	"github.com/snapmerge/snapmerge/pkg/tracing"
	"github.com/snapmerge/snapmerge/pkg/transport"
	"github.com/snapmerge/snapmerge/pkg/transport/choose"
	"github.com/snapmerge/snapmerge/pkg/transport/handover"
	"github.com/snapmerge/snapmerge/pkg/unixsocket"
	"github.com/snapmerge/snapmerge/pkg/volume"
	"github.com/snapmerge/snapmerge/pkg/volume/pacing"
)

const (
	// startLimit is how long to wait for an earlier process: its last I/O, and
	// the keeper.
	startLimit = 2 * time.Minute
	// stopLimit is how long calls and operations that are under way may take when
	// the plugin is to end.
	stopLimit = 20 * time.Second
	// tracingLimit is how long sending the last spans may take then.
	tracingLimit = 2 * time.Second
	// pollSocket is how often to look whether an earlier process has left its
	// socket.
	pollSocket = 100 * time.Millisecond
)

// Run is a node plugin until ctx ends or it fails.
//
// At the end, devices that are in service stay so if there is a keeper: their
// volumes are left as they are, flushed, for the next process to take over, which
// waits until this one is gone. Run must be followed by the end of the process
// then. If the keeper ends, too, the node goes down: see serveOut.
func Run(ctx context.Context, cfg Config) error {
	if err := cfg.check(); err != nil {
		return err
	}
	if err := checkStateDir(cfg.StateDir); err != nil {
		return err
	}
	p := newPlugin(cfg)
	var err error
	if p.reporter, err = kube.Open(cfg.KubeAPI, cfg.NodeID, cfg.Version, objects{p}); err != nil {
		return fmt.Errorf("%w: %w", ErrConfig, err)
	}
	return p.serve(ctx)
}

// serve runs everything. The CSI socket is there from the start, so that Probe
// can tell a start that takes its time from a plugin that hangs.
func (p *plugin) serve(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	tracer, err := p.startTracing(ctx)
	if err != nil {
		return err
	}
	defer p.closeTracing(tracer)
	csiServer := newServer(p, tracer.ServerOptions()...)
	if err := serveSocket(ctx, g, csiServer, p.cfg.Endpoint); err != nil {
		return err
	}
	if addr := p.cfg.MetricsAddr; addr != "" {
		l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", addr)
		if err != nil {
			csiServer.Stop()
			return errors.Join(err, g.Wait())
		}
		context.AfterFunc(ctx, func() { l.Close() })
		g.Go(func() error { p.serveMetrics(l); return nil })
	}
	g.Go(func() error {
		k, err := p.open(ctx)
		if err == nil {
			err = p.announce(ctx, g)
		}
		if err == nil {
			<-ctx.Done()
		}
		return errors.Join(err, p.stop(csiServer, k))
	})
	return g.Wait()
}

// startTracing makes what sends spans; nil if nobody wants any.
func (p *plugin) startTracing(ctx context.Context) (*tracing.Exporter, error) {
	if p.cfg.TracingEndpoint == "" {
		return nil, nil
	}
	return tracing.Start(ctx, p.cfg.TracingEndpoint, tracing.Source{Version: p.cfg.Version, Node: p.cfg.NodeID})
}

// closeTracing sends the last spans, if that can be done soon.
func (p *plugin) closeTracing(t *tracing.Exporter) {
	ctx, cancel := context.WithTimeout(context.Background(), p.tracingLimit)
	defer cancel()
	if err := t.Close(ctx); err != nil {
		klog.InfoS("The last spans were not sent", "err", err)
	}
}

// open opens the volumes: with the keeper, if there is one, and what an earlier
// process left there.
func (p *plugin) open(ctx context.Context) (*keeper.Client, error) {
	ctx, cancel := context.WithTimeout(ctx, startLimit)
	defer cancel()
	var k *keeper.Client
	if p.cfg.KeeperSocket == "" {
		klog.InfoS("WARNING: no keeper is configured: when this process ends, the devices of all volumes die, and their pods see I/O errors")
	} else {
		var err error
		if k, err = keeper.Dial(ctx, p.cfg.KeeperSocket); err != nil {
			return nil, err
		}
		p.freeze = freezeByKeeper(k)
	}
	t, err := p.openTransport(ctx, k)
	if err != nil {
		return k, err
	}
	var pace *pacing.Node
	if p.cfg.MergePacing {
		pace = pacing.NewNode(p.cfg.StateDir, p.cfg.MergeFloor)
	}
	p.volumes, err = volume.OpenManager(ctx, volume.ManagerConfig{
		FS: p.fs, StateDir: p.cfg.StateDir, Init: p.cfg.Init, Transport: p.handOver(t), IO: p.cfg.IO,
		MergeRate: p.cfg.MergeRate, MergeConcurrency: p.cfg.MergeConcurrency,
		Pacing: pace, StalledAfter: p.cfg.MergeStalledAfter, ReadAhead: p.cfg.ReadAhead, ReadPromotion: p.cfg.ReadPromotion, Log: klog.Background(),
	})
	if err != nil {
		return k, err
	}
	p.metrics.Show(p.volumes, p.used.silence)
	p.ready.Store(true)
	klog.InfoS("Node plugin is ready", "node", p.cfg.NodeID, "stateDir", p.cfg.StateDir, "transport", t.Name(), "volumes", len(p.volumes.IDs()))
	return k, nil
}

// openTransport chooses the transport.
func (p *plugin) openTransport(ctx context.Context, k *keeper.Client) (*choose.Set, error) {
	t, err := choose.Open(ctx, p.cfg.Transport, p.cfg.StateDir, k)
	if errors.Is(err, choose.ErrUnknown) {
		err = fmt.Errorf("%w: %w", ErrConfig, err)
	}
	if err != nil {
		return nil, err
	}
	if err := t.SurvivesRestart(); err != nil && k != nil {
		klog.ErrorS(err, "Devices do not survive a restart of the node plugin")
	}
	p.maxVolumes = t.MaxVolumes
	return t, nil
}

// handOver has devices handed over to the base when nothing is above it, if that is
// wanted and the machine can do it. Devices that an earlier process could hand over are
// taken over in any case.
func (p *plugin) handOver(t transport.Transport) transport.Transport {
	usable := errors.New("it is not switched on")
	if p.cfg.HandOver {
		if usable = handover.Available(); usable != nil {
			klog.InfoS("Volumes are not handed over to their base when they are merged", "reason", usable.Error())
		}
	}
	return handover.New(t, filepath.Join(p.cfg.StateDir, "native"), usable)
}

// announce makes the plugin known: to the status command, to the Kubernetes API, and
// to kubelet.
func (p *plugin) announce(ctx context.Context, g *errgroup.Group) error {
	if p.cfg.AdminSocket != "" {
		g.Go(func() error { return admin.Serve(ctx, p.cfg.AdminSocket, p.volumes) })
	}
	if p.reporter != nil {
		g.Go(func() error { p.reporter.Run(ctx); return nil })
	}
	if p.cfg.KubeletDir == "" {
		return nil
	}
	return serveSocket(ctx, g, newRegistration(p.cfg.Endpoint), registrationSocket(p.cfg.KubeletDir))
}

// serveSocket has the server listen at the path, which an earlier process may
// still be about to leave. What is under way when ctx ends may be carried to its
// end, for a while.
func serveSocket(ctx context.Context, g *errgroup.Group, s *grpc.Server, path string) error {
	l, err := unixsocket.Listen(ctx, "unix", path)
	for start := time.Now(); errors.Is(err, unixsocket.ErrServed) && time.Since(start) < startLimit; {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(pollSocket):
		}
		l, err = unixsocket.Listen(ctx, "unix", path)
	}
	if err != nil {
		return err
	}
	context.AfterFunc(ctx, func() { stopServer(s) })
	g.Go(func() error {
		if err := s.Serve(l); err != nil && !errors.Is(err, grpc.ErrServerStopped) {
			return fmt.Errorf("%s: %w", path, err)
		}
		return nil
	})
	return nil
}

func stopServer(s *grpc.Server) {
	t := time.AfterFunc(stopLimit, s.Stop)
	defer t.Stop()
	s.GracefulStop()
}

// stop ends what open has begun.
func (p *plugin) stop(csiServer *grpc.Server, k *keeper.Client) error {
	told := time.Now()
	stopServer(csiServer)
	if !p.ops.wait(stopLimit) {
		klog.InfoS("Operations are left behind that do not end")
	}
	if p.volumes == nil {
		return closeKeeper(k)
	}
	if left := p.inService(); len(left) > 0 {
		err := p.flush(left)
		if k == nil {
			klog.ErrorS(nil, "No keeper is configured: devices of volumes in use die now", "volumes", left)
			return err
		}
		if keeperStays(k, told) {
			// Their requests go on being answered until this process is gone; closing the
			// volumes would answer the last of them with errors.
			klog.InfoS("Devices stay in service for the next node plugin", "volumes", left)
			return errors.Join(err, p.flush(left))
		}
		if err := errors.Join(err, p.serveOut(k)); err != nil {
			klog.ErrorS(err, "The end was not in order")
		}
	}
	return errors.Join(p.volumes.Close(), closeKeeper(k))
}

func closeKeeper(k *keeper.Client) error {
	if k == nil {
		return nil
	}
	return k.Close()
}

// inService are the volumes that have devices.
func (p *plugin) inService() []string {
	var ids []string
	for _, id := range p.volumes.IDs() {
		if p.volumes.Device(id) != "" {
			ids = append(ids, id)
		}
	}
	return ids
}

// flush makes durable what was acknowledged.
func (p *plugin) flush(ids []string) error {
	var errs []error
	for _, id := range ids {
		if v, err := p.volumes.Get(id); err == nil {
			errs = append(errs, v.Flush())
		}
	}
	return errors.Join(errs...)
}
