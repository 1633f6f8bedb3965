package driver

import (
	"context"
	"strings"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/kubernetes-csi/csi-lib-utils/protosanitizer"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"k8s.io/klog/v2"

	"github.com/snapmerge/snapmerge/pkg/tracing"
)

// Levels of the log of calls: those that change something, and the others.
const (
	callLevel  klog.Level = 3
	queryLevel klog.Level = 5
)

// newServer has the plugin's services.
func newServer(p *plugin, more ...grpc.ServerOption) *grpc.Server {
	s := grpc.NewServer(append(more, grpc.UnaryInterceptor(p.intercept))...)
	csi.RegisterIdentityServer(s, identityServer{plugin: p})
	csi.RegisterControllerServer(s, controllerServer{plugin: p})
	csi.RegisterNodeServer(s, nodeServer{plugin: p})
	return s
}

// intercept is around every call: it logs it without secrets, survives its
// panics, and gives its error a code.
func (p *plugin) intercept(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (resp any, err error) {
	method := info.FullMethod[strings.LastIndexByte(info.FullMethod, '/')+1:]
	level := levelOf(method)
	if klog.V(level).Enabled() {
		klog.V(level).InfoS("Call", "method", method, "request", protosanitizer.StripSecrets(req).String())
	}
	start, end := time.Now(), p.metrics.Call(method)
	defer func() { end(code(err)) }()
	tracing.Note(ctx, "csi.volume_id", subjectOf(req))
	err = guard(method, func() (err error) {
		if !p.ready.Load() && !strings.HasPrefix(info.FullMethod, "/csi.v1.Identity/") {
			return errStarting
		}
		resp, err = handler(ctx, req)
		return err
	})
	if err != nil {
		err = toStatus(err)
		logFailure(method, req, err, time.Since(start))
		return nil, err
	}
	if klog.V(level).Enabled() {
		klog.V(level).InfoS("Done", "method", method, "took", time.Since(start), "response", protosanitizer.StripSecrets(resp).String())
	}
	return resp, nil
}

// subjectOf is the id of the volume that a request is about, or "".
func subjectOf(req any) string {
	if r, ok := req.(interface{ GetVolumeId() string }); ok {
		return r.GetVolumeId()
	}
	return ""
}

// levelOf is higher for calls that come every few seconds and change nothing.
func levelOf(method string) klog.Level {
	for _, query := range []string{"Probe", "Get", "List", "Validate"} {
		if strings.Contains(method, query) {
			return queryLevel
		}
	}
	return callLevel
}

// logFailure logs a call that failed; one that will be repeated while something
// else goes on is no news.
func logFailure(method string, req any, err error, took time.Duration) {
	c, volume := code(err), subjectOf(req)
	if c == codes.Aborted || c == codes.Unimplemented {
		klog.V(callLevel).InfoS("Call failed", "method", method, "volume", volume, "code", c, "err", err)
		return
	}
	klog.ErrorS(err, "Call failed", "method", method, "volume", volume, "code", c, "took", took)
}
