module github.com/snapmerge/snapmerge

go 1.26.0

require (
	github.com/dustin/go-humanize v1.1.0 // sizes: parsing and printing
	github.com/kubernetes-csi/csi-lib-utils v0.25.0 // protosanitizer: CSI secrets out of the log
	github.com/kubernetes-csi/csi-test/v5 v5.6.0 // csi-sanity, in tests
	github.com/prometheus/client_golang v1.25.0 // metrics
	k8s.io/api v0.37.2 // the kind Event
	k8s.io/apimachinery v0.37.2 // objects of the Kubernetes API
	k8s.io/client-go v0.37.2 // client of the Kubernetes API: watch, patch, events
	k8s.io/kubelet v0.37.2 // plugin registration API
	k8s.io/mount-utils v0.37.2 // mount, umount, list of mounts, with fakes
	k8s.io/utils v0.0.0-20260707023825-cf1189d6abe3 // exec, with fakes
)

require (
	github.com/andybalholm/brotli v1.2.8 // brotli of COW files
	github.com/container-storage-interface/spec v1.13.0 // CSI messages and services (fixed)
	github.com/go-logr/logr v1.4.4 // a logger for packages that klog hands out
	github.com/google/uuid v1.6.0 // identities of volumes and snapshots
	github.com/hashicorp/golang-lru/v2 v2.0.7 // bounded cache of decoded blocks
	github.com/klauspost/compress v1.20.3 // zstd, gzip (zlib) of COW files
	github.com/mdlayher/genetlink v1.3.2 // generic netlink, for the NBD driver
	github.com/mdlayher/netlink v1.7.2 // its attributes
	github.com/onsi/ginkgo/v2 v2.32.1 // csi-sanity's runner, in tests
	github.com/onsi/gomega v1.42.1 // csi-sanity's assertions, in tests
	github.com/pawelgaczynski/giouring v0.0.0-20230826085535-69588b89acb9 // io_uring (fixed), with -tags giouring
	github.com/pierrec/lz4/v4 v4.1.33 // lz4 of COW files
	github.com/schollz/progressbar/v3 v3.19.1 // progress bars
	github.com/spf13/cobra v1.10.2 // commands and flags
	github.com/tidwall/btree v1.8.2 // ordered map of extents in the write log
	go.opentelemetry.io/contrib/instrumentation/google.golang.org/grpc/otelgrpc v0.72.0 // tracing: a span for each CSI call
	go.opentelemetry.io/otel v1.47.0 // tracing: attributes, propagation
	go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracegrpc v1.47.0 // tracing: to a collector
	go.opentelemetry.io/otel/sdk v1.47.0 // tracing: sampling, batches
	go.opentelemetry.io/otel/trace v1.47.0 // tracing: spans
	go.opentelemetry.io/proto/otlp v1.11.0 // tracing: a collector, in tests
	golang.org/x/sync v0.24.0 // errgroup
	golang.org/x/sys v0.49.0 // system calls
	golang.org/x/term v0.47.0 // is this a terminal
	golang.org/x/time v0.16.0 // rate limits
	google.golang.org/grpc v1.85.0 // gRPC (fixed)
	google.golang.org/protobuf v1.36.12 // well-known types of CSI messages
	k8s.io/klog/v2 v2.140.0 // logging (fixed)
)

require (
	github.com/Masterminds/semver/v3 v3.4.0 // indirect
	github.com/beorn7/perks v1.0.1 // indirect
	github.com/cenkalti/backoff/v5 v5.0.3 // indirect
	github.com/cespare/xxhash/v2 v2.3.0 // indirect
	github.com/davecgh/go-spew v1.1.2-0.20180830191138-d8f796af33cc // indirect
	github.com/fxamacker/cbor/v2 v2.9.3 // indirect
	github.com/go-logr/stdr v1.2.2 // indirect
	github.com/go-openapi/jsonpointer v1.0.0 // indirect
	github.com/go-openapi/jsonreference v1.0.1 // indirect
	github.com/go-openapi/swag v0.29.1 // indirect
	github.com/go-openapi/swag/cmdutils v0.29.1 // indirect
	github.com/go-openapi/swag/conv v0.29.1 // indirect
	github.com/go-openapi/swag/fileutils v0.29.1 // indirect
	github.com/go-openapi/swag/jsonutils v0.29.1 // indirect
	github.com/go-openapi/swag/loading v0.29.1 // indirect
	github.com/go-openapi/swag/mangling v0.29.1 // indirect
	github.com/go-openapi/swag/netutils v0.29.1 // indirect
	github.com/go-openapi/swag/pools v0.29.1 // indirect
	github.com/go-openapi/swag/stringutils v0.29.1 // indirect
	github.com/go-openapi/swag/typeutils v0.29.1 // indirect
	github.com/go-openapi/swag/yamlutils v0.29.1 // indirect
	github.com/go-task/slim-sprig/v3 v3.0.0 // indirect
	github.com/google/gnostic-models v0.7.1 // indirect
	github.com/google/go-cmp v0.7.0 // indirect
	github.com/google/pprof v0.0.0-20260402051712-545e8a4df936 // indirect
	github.com/grpc-ecosystem/grpc-gateway/v2 v2.30.0 // indirect
	github.com/inconshreveable/mousetrap v1.1.0 // indirect
	github.com/josharian/native v1.1.0 // indirect
	github.com/json-iterator/go v1.1.12 // indirect
	github.com/mdlayher/socket v0.4.1 // indirect
	github.com/mitchellh/colorstring v0.0.0-20190213212951-d06e56a500db // indirect
	github.com/moby/sys/mountinfo v0.7.2 // indirect
	github.com/modern-go/concurrent v0.0.0-20180306012644-bacd9c7ef1dd // indirect
	github.com/modern-go/reflect2 v1.0.3-0.20250322232337-35a7c28c31ee // indirect
	github.com/munnerz/goautoneg v0.0.0-20191010083416-a7dc8b61c822 // indirect
	github.com/pmezard/go-difflib v1.0.1-0.20181226105442-5d4384ee4fb2 // indirect
	github.com/prometheus/client_model v0.6.3 // indirect
	github.com/prometheus/common v0.72.0 // indirect
	github.com/prometheus/procfs v0.22.0 // indirect
	github.com/rivo/uniseg v0.4.7 // indirect
	github.com/spf13/pflag v1.0.10 // indirect
	github.com/x448/float16 v0.8.4 // indirect
	go.opentelemetry.io/auto/sdk v1.2.1 // indirect
	go.opentelemetry.io/otel/exporters/otlp/otlptrace v1.47.0 // indirect
	go.opentelemetry.io/otel/log v1.47.0 // indirect
	go.opentelemetry.io/otel/metric v1.47.0 // indirect
	go.uber.org/mock v0.6.0 // indirect
	go.yaml.in/yaml/v2 v2.4.4 // indirect
	go.yaml.in/yaml/v3 v3.0.5 // indirect
	golang.org/x/mod v0.41.0 // indirect
	golang.org/x/net v0.60.0 // indirect
	golang.org/x/oauth2 v0.37.0 // indirect
	golang.org/x/text v0.42.0 // indirect
	golang.org/x/tools v0.49.0 // indirect
	google.golang.org/genproto/googleapis/api v0.0.0-20260928230214-8a89bd6388cc // indirect
	google.golang.org/genproto/googleapis/rpc v0.0.0-20260928230214-8a89bd6388cc // indirect
	gopkg.in/evanphx/json-patch.v4 v4.13.0 // indirect
	gopkg.in/inf.v0 v0.9.1 // indirect
	gopkg.in/yaml.v2 v2.4.0 // indirect
	k8s.io/kube-openapi v0.0.0-20260821135717-be32def86098 // indirect
	sigs.k8s.io/json v0.0.0-20250730193827-2d320260d730 // indirect
	sigs.k8s.io/randfill v1.0.0 // indirect
	sigs.k8s.io/structured-merge-diff/v6 v6.4.2 // indirect
	sigs.k8s.io/yaml v1.6.0 // indirect
)
