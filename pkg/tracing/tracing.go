// Package tracing sends a span for each gRPC call to an OpenTelemetry collector
// (OTLP over gRPC, https://opentelemetry.io/docs/specs/otlp/).
package tracing

import (
	"context"
	"fmt"
	"net"
	"strings"

	"go.opentelemetry.io/contrib/instrumentation/google.golang.org/grpc/otelgrpc"
	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracegrpc"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/sdk/resource"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/trace"
	"google.golang.org/grpc"
	"google.golang.org/grpc/stats"
	"k8s.io/klog/v2"
)

// Source says where spans come from.
type Source struct {
	Version, Node string
}

// Exporter sends spans. A nil one sends none and costs nothing.
type Exporter struct {
	provider *sdktrace.TracerProvider
}

// CheckEndpoint checks the address of a collector: HOST:PORT.
func CheckEndpoint(endpoint string) error {
	if host, port, err := net.SplitHostPort(endpoint); err != nil || host == "" || port == "" {
		return fmt.Errorf("address of a tracing collector %q is not HOST:PORT", endpoint)
	}
	return nil
}

// Start makes an Exporter to the collector at the endpoint, HOST:PORT, without
// TLS. The collector need not be there: spans are kept for a while, up to a
// number, and dropped then. What is sampled, and more, can be set by the SDK's
// variables of the environment, such as OTEL_TRACES_SAMPLER.
func Start(ctx context.Context, endpoint string, s Source) (*Exporter, error) {
	if err := CheckEndpoint(endpoint); err != nil {
		return nil, err
	}
	otel.SetErrorHandler(otel.ErrorHandlerFunc(func(err error) { klog.V(2).InfoS("Tracing", "err", err) }))
	out, err := otlptracegrpc.New(ctx, otlptracegrpc.WithEndpoint(endpoint), otlptracegrpc.WithInsecure())
	if err != nil {
		return nil, fmt.Errorf("tracing: %w", err)
	}
	from := resource.NewSchemaless(
		attribute.String("service.name", "snapmerge"), attribute.String("service.version", s.Version),
		attribute.String("k8s.node.name", s.Node))
	return &Exporter{sdktrace.NewTracerProvider(sdktrace.WithBatcher(out), sdktrace.WithResource(from))}, nil
}

// ServerOptions makes a gRPC server give each call a span, below that of its
// caller if there is one. Calls of Probe, which come every few seconds and do
// nothing, have none.
func (e *Exporter) ServerOptions() []grpc.ServerOption {
	if e == nil {
		return nil
	}
	return []grpc.ServerOption{grpc.StatsHandler(otelgrpc.NewServerHandler(
		otelgrpc.WithTracerProvider(e.provider), otelgrpc.WithPropagators(propagation.TraceContext{}),
		otelgrpc.WithFilter(func(i *stats.RPCTagInfo) bool { return !strings.HasSuffix(i.FullMethodName, "/Probe") }),
	))}
}

// Note adds to the span of ctx, if there is one, what a call is about.
func Note(ctx context.Context, key, value string) {
	if span := trace.SpanFromContext(ctx); value != "" && span.IsRecording() {
		span.SetAttributes(attribute.String(key, value))
	}
}

// Close sends what is left, as long as ctx allows.
func (e *Exporter) Close(ctx context.Context) error {
	if e == nil {
		return nil
	}
	return e.provider.Shutdown(ctx)
}
