package driver

import (
	"context"
	"encoding/hex"
	"net"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	collector "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	common "go.opentelemetry.io/proto/otlp/common/v1"
	"go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"

	"github.com/snapmerge/snapmerge/pkg/tracing"
)

// spanCollector is an OpenTelemetry collector that hands on what it gets.
type spanCollector struct {
	collector.UnimplementedTraceServiceServer
	got chan *collector.ExportTraceServiceRequest
}

func (c *spanCollector) Export(_ context.Context, r *collector.ExportTraceServiceRequest) (*collector.ExportTraceServiceResponse, error) {
	c.got <- r
	return &collector.ExportTraceServiceResponse{}, nil
}

func attribute(all []*common.KeyValue, key string) string {
	for _, a := range all {
		if a.Key == key {
			return a.Value.GetStringValue()
		}
	}
	return ""
}

// TestTracing: spans of calls arrive at a collector with what they were about,
// how they ended and who called; Probe has none. The end of the plugin sends what
// is left.
func TestTracing(t *testing.T) {
	needDevices(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	c := &spanCollector{got: make(chan *collector.ExportTraceServiceRequest, 100)}
	s := grpc.NewServer()
	collector.RegisterTraceServiceServer(s, c)
	go s.Serve(l) // until Stop
	defer s.Stop()

	n := makeNode(t, func(cfg *Config) { cfg.TracingEndpoint, cfg.Version = l.Addr().String(), "v1" })
	n.start(func(p *plugin) { p.tracingLimit = patience })
	const caller = "0af7651916cd43dd8448eb211c80319c"
	ctx := metadata.AppendToOutgoingContext(t.Context(), "traceparent", "00-"+caller+"-b7ad6b7169203331-01")
	if _, err := n.NodeGetInfo(ctx, &csi.NodeGetInfoRequest{}); err != nil {
		t.Fatal(err)
	}
	_, err = n.NodeGetVolumeHealth(t.Context(), &csi.NodeGetVolumeHealthRequest{VolumeId: "nobody's"})
	wantCode(t, err, codes.NotFound, "")
	if err := n.stop(); err != nil {
		t.Fatal(err)
	}

	spans := map[string]*v1.Span{}
	for len(c.got) > 0 {
		for _, r := range (<-c.got).ResourceSpans {
			from := r.Resource.Attributes
			if attribute(from, "service.name") != "snapmerge" || attribute(from, "service.version") != "v1" || attribute(from, "k8s.node.name") != n.cfg.NodeID {
				t.Errorf("spans from %v", from)
			}
			for _, sc := range r.ScopeSpans {
				for _, span := range sc.Spans {
					spans[span.Name] = span
				}
			}
		}
	}
	info, health := spans["csi.v1.Node/NodeGetInfo"], spans["csi.v1.Node/NodeGetVolumeHealth"]
	if len(spans) != 2 || info == nil || health == nil {
		t.Fatalf("spans %v", spans)
	}
	if got := info.TraceId; len(info.ParentSpanId) == 0 || hex.EncodeToString(got) != caller {
		t.Errorf("the span is not the caller's: %v", info)
	}
	if attribute(health.Attributes, "csi.volume_id") != "nobody's" || info.EndTimeUnixNano <= info.StartTimeUnixNano {
		t.Errorf("spans %v", spans)
	}
}

// TestTracingNobodyThere: a collector that is not there stops nothing, and the
// end of the plugin does not wait for it long.
func TestTracingNobodyThere(t *testing.T) {
	needDevices(t)
	l, err := net.Listen("tcp", "127.0.0.1:0") // and nobody answers
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	n := newNode(t, func(cfg *Config) { cfg.TracingEndpoint = l.Addr().String() })
	if _, err := n.NodeGetInfo(t.Context(), &csi.NodeGetInfoRequest{}); err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	if err := n.stop(); err != nil {
		t.Error(err)
	}
	if took := time.Since(start); took > tracingLimit+patience/2 {
		t.Errorf("the plugin took %v to end", took)
	}
}

// TestTracingOff: who wants no spans has nothing in the way of calls.
func TestTracingOff(t *testing.T) {
	p := newPlugin(Config{})
	e, err := p.startTracing(t.Context())
	if err != nil || e != nil || len(e.ServerOptions()) != 0 {
		t.Errorf("%v, %v", e, err)
	}
	for _, bad := range []string{"collector", ":4317", "host:", "http://host:4317"} {
		if tracing.CheckEndpoint(bad) == nil {
			t.Errorf("%q was taken", bad)
		}
	}
}
