# snapmerge. `make help` lists the targets.

GO        ?= go
BIN       := bin/snapmerge
VERSION   ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
LDFLAGS   := -s -w -X main.version=$(VERSION)
DURATION  ?= 10m
FUZZTIME  ?= 60s
RUNS      ?= 5
# Virtual machines at a time: each takes up to a processor and 3 GiB, and often waits.
VMS       ?= 3
RING_TAGS := -tags giouring -ldflags=-checklinkname=0

STATICCHECK := honnef.co/go/tools/cmd/staticcheck@v0.8.2

.DEFAULT_GOAL := help

.PHONY: help
help: ## this list
	@grep -hE '^[a-z][a-z0-9-]*:.*##' $(MAKEFILE_LIST) | sort | sed -E 's/:.*## /\t/' | expand -t 16

.PHONY: build
build: ## the static binary bin/snapmerge
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags '$(LDFLAGS)' -o $(BIN) ./cmd/snapmerge

.PHONY: build-giouring
build-giouring: ## the same with the giouring rings, bin/snapmerge-giouring
	CGO_ENABLED=0 $(GO) build -trimpath -tags giouring -ldflags '$(LDFLAGS) -checklinkname=0' -o $(BIN)-giouring ./cmd/snapmerge

.PHONY: test
test: ## everything this machine can test; as root also devices and mounts
	hack/setup.sh test
	$(GO) vet ./...
	$(GO) test -timeout 30m ./...
	cd test/csi112 && $(GO) test ./...
	$(MAKE) test-chart test-race test-giouring

.PHONY: test-race
test-race: ## the short tests under the race detector (and checkptr)
	$(GO) test -race -short -timeout 30m ./...

.PHONY: test-giouring
test-giouring: ## the tests of everything that uses rings, with giouring
	$(GO) vet $(RING_TAGS) ./pkg/uring ./pkg/blockio
	$(GO) test $(RING_TAGS) -short -timeout 20m ./pkg/uring ./pkg/blockio/... ./pkg/merge ./pkg/volume

.PHONY: test-chart
test-chart: ## the Helm chart, and that deploy/ is made from it
	cd test/chart && $(GO) vet ./... && $(GO) test -count=1 ./...

.PHONY: test-e2e
test-e2e: ## a real Kubernetes with snapmerge in it (root, Debian or Ubuntu)
	cd test/e2e && $(GO) vet ./... && $(GO) test -count=1 -timeout 90m -v .

.PHONY: test-conformance
test-conformance: ## Kubernetes' own suite for storage drivers, in that Kubernetes (FOCUS=)
	cd test/e2e && SNAPMERGE_CONFORMANCE=$(or $(SNAPMERGE_CONFORMANCE),1) FOCUS='$(FOCUS)' $(GO) test -count=1 -timeout 120m -v -run TestConformance .

.PHONY: deploy-manifests
deploy-manifests: ## deploy/snapmerge.yaml and monitoring.yaml from the chart
	cd test/chart && $(GO) test -count=1 -run TestPlain . -args -update

.PHONY: crash
crash: ## random crash images for DURATION (default 10m)
	SNAPMERGE_CRASH=$(DURATION) $(GO) test -count=1 -timeout 0 -v -run 'CrashLong' ./pkg/merge ./pkg/volume

.PHONY: test-vm
test-vm: ## kernel transports and power cuts in virtual machines (COUNT= kills and cuts, SEED=, KERNEL_MODULES=dm-user.ko, VMS=3 at a time)
	test/vm/setup.sh
	SNAPMERGE_VM=1 COUNT=$(COUNT) SEED=$(SEED) KERNEL_MODULES="$(abspath $(KERNEL_MODULES))" nice -n 10 $(GO) test -count=1 -timeout 0 -parallel $(VMS) -v ./test/vm

.PHONY: bench-vm
bench-vm: ## speed of the transports beside a loop device, in a virtual machine
	test/vm/setup.sh
	SNAPMERGE_VM=speed KERNEL_MODULES="$(abspath $(KERNEL_MODULES))" $(GO) test -count=1 -timeout 30m -v -run "TestSpeed|TestDmSnapshot" ./test/vm

.PHONY: fuzz
fuzz: ## every fuzz target for FUZZTIME (default 60s)
	GO=$(GO) hack/fuzz.sh $(FUZZTIME)

.PHONY: demo
demo: ## the whole mission on this machine, through the real CSI socket (root)
	hack/setup.sh demo
	$(MAKE) build
	$(BIN) demo

.PHONY: bench
bench: ## measures merges (RUNS=5) and writes the tables of docs/performance.md
	hack/setup.sh bench
	$(MAKE) build
	hack/bench.sh $(BIN) docs/performance.md $(RUNS)

.PHONY: bench-foreground
bench-foreground: ## what pods feel of a merge: fio and pgbench beside qemu, 10 minutes (root)
	hack/setup.sh bench-foreground
	$(MAKE) build
	TMPDIR=$${TMPDIR:-/var/tmp} $(BIN) bench foreground --load fio --pairs $(RUNS)
	TMPDIR=$${TMPDIR:-/var/tmp} $(BIN) bench foreground --load pgbench --pairs $(RUNS)

.PHONY: bench-read
bench-read: ## measures reads before the merge (RUNS=5, 12 minutes, root, fio) and writes the tables of docs/performance.md
	hack/setup.sh demo
	$(MAKE) build
	hack/bench-read.sh $(BIN) docs/performance.md $(RUNS)

.PHONY: bench-memory
bench-memory: ## memory of a node with 50 volumes of 10 GiB, 5 minutes (root)
	hack/setup.sh demo
	$(MAKE) build
	TMPDIR=$${TMPDIR:-/var/tmp} $(BIN) bench memory --limit 512MiB

.PHONY: bench-go
bench-go: ## Go benchmarks of reading, packing, queues and devices
	hack/setup.sh test
	$(GO) test -run '^$$' -bench . -benchtime 1x -count 3 ./...

.PHONY: lint
lint: ## gofmt, vet, staticcheck, shellcheck, layering
	@out=$$(gofmt -l $$(git ls-files '*.go')); test -z "$$out" || { echo "gofmt would change: $$out"; exit 1; }
	$(GO) vet ./...
	$(GO) run $(STATICCHECK) ./...
	$(GO) test ./test/layering
	@if command -v shellcheck >/dev/null; then shellcheck hack/*.sh .ci/run; else echo "shellcheck is not installed: scripts not checked"; fi

.PHONY: clean
clean: ## what was built
	rm -rf bin
