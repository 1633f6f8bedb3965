// Package rig brings up a cluster that has snapmerge installed, as its users
// install it: from deploy/snapmerge.yaml, with images of the names given there.
package rig

import (
	"context"
	"fmt"
	"log"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"github.com/snapmerge/snapmerge/test/e2e/internal/binary"
	"github.com/snapmerge/snapmerge/test/e2e/internal/cluster"
)

// Lines are the lines of Kubernetes that there are, and the module files in
// test/e2e/kube that make them.
var Lines = map[string]string{
	"1.36": "go.mod",   // the last that reads VolumeCondition
	"1.37": "1.37.mod", // the first that calls NodeGetVolumeHealth
}

const (
	// Busybox is the image of the pods in tests and examples.
	Busybox = "busybox:1.37"
	// Namespace is snapmerge's.
	Namespace = "snapmerge"
	// Release is its name as Helm knows it.
	Release = "snapmerge"

	registry = "docker.io/" // where names without a host are
)

// packages are what is taken from the distribution.
var packages = []string{"containerd", "runc", "containernetworking-plugins", "busybox-static"}

// Up builds all that is needed and brings the cluster up with the snapshot
// controller and, installed in the way given, snapmerge in it. repo is the root of
// the source. Down of the cluster must be called if it isn't nil.
func Up(ctx context.Context, repo, line string, how Installer) (*cluster.Cluster, error) {
	modfile := Lines[line]
	if modfile == "" {
		return nil, fmt.Errorf("there is no Kubernetes %s", line)
	}
	module := filepath.Join(repo, "test", "e2e", "kube")
	version, err := binary.Output(ctx, module, "go", "list", "-modfile="+modfile, "-m", "-f", "{{.Version}}", "k8s.io/kubernetes")
	if err != nil {
		return nil, err
	}
	kube, err := binary.Build(ctx, module, modfile, []string{
		"k8s.io/component-base/version.gitVersion=" + version, "k8s.io/client-go/pkg/version.gitVersion=" + version,
	}, ".")
	if err != nil {
		return nil, err
	}
	sidecars, err := binary.Build(ctx, filepath.Join(repo, "test", "e2e", "sidecars"), "go.mod", nil, "tool")
	if err != nil {
		return nil, err
	}
	debian, err := binary.Debian(ctx, packages...)
	if err != nil {
		return nil, err
	}
	cache, err := binary.Cache()
	if err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp(cache, "run-")
	if err != nil {
		return nil, err
	}
	start := time.Now()
	c, err := cluster.Up(ctx, dir, cluster.Config{Kube: kube, Debian: debian, Gates: "CSIVolumeHealth=true"})
	if err != nil {
		return c, err
	}
	images := images{ctx: ctx, c: c, repo: repo, dir: filepath.Join(dir, "images"), debian: debian, sidecars: sidecars}
	if err := images.load(); err != nil {
		return c, err
	}
	if err := c.Ready(ctx); err != nil {
		return c, err
	}
	log.Printf("Kubernetes %s is up after %s, its files are in %s", version, time.Since(start).Round(time.Second), dir)
	start = time.Now()
	if err := install(ctx, c, repo, how); err != nil {
		return c, err
	}
	log.Printf("snapmerge is ready after %s", time.Since(start).Round(time.Second))
	return c, nil
}

// Manifest is the file that snapmerge is installed from.
func Manifest(repo string) string { return filepath.Join(repo, "deploy", "snapmerge.yaml") }

// install installs the snapshot controller and snapmerge.
func install(ctx context.Context, c *cluster.Cluster, repo string, how Installer) error {
	e2e := filepath.Join(repo, "test", "e2e")
	client, err := binary.Output(ctx, filepath.Join(e2e, "sidecars"), "go", "list", "-m", "-f", "{{.Dir}}",
		"github.com/kubernetes-csi/external-snapshotter/client/v8")
	if err != nil {
		return err
	}
	apply := []string{"apply"}
	for _, kind := range []string{"volumesnapshotclasses", "volumesnapshotcontents", "volumesnapshots"} {
		apply = append(apply, "--filename", filepath.Join(client, "config", "crd", "snapshot.storage.k8s.io_"+kind+".yaml"))
	}
	controller, err := filepath.Abs(filepath.Join(e2e, "manifests", "snapshot-controller.yaml"))
	if err != nil {
		return err
	}
	for _, args := range [][]string{
		apply,
		{"wait", "--for=condition=Established", "--timeout=30s", "crd", "--all"},
		{"apply", "--filename", controller},
	} {
		if _, err := c.Output(ctx, "kubectl", args...); err != nil {
			return err
		}
	}
	if err := how(ctx, c, repo); err != nil {
		return err
	}
	for _, args := range [][]string{
		{"--namespace", Namespace, "wait", "--for=jsonpath={.status.numberReady}=1", "--timeout=3m", "daemonset/snapmerge-keeper"},
		{"--namespace", Namespace, "rollout", "status", "--timeout=3m", "daemonset/snapmerge-node"},
		{"--namespace", Namespace, "rollout", "status", "--timeout=3m", "deployment/snapmerge-resizer"},
		{"--namespace", "kube-system", "rollout", "status", "--timeout=3m", "deployment/snapshot-controller"},
		{"wait", "--for=jsonpath={.spec.drivers[0].name}=csi.snapmerge.io", "--timeout=1m", "csinode/" + cluster.Node},
	} {
		if _, err := c.Output(ctx, "kubectl", args...); err != nil {
			return err
		}
	}
	return nil
}

// images makes images and gives them to the cluster.
type images struct {
	ctx                         context.Context
	c                           *cluster.Cluster
	repo, dir, debian, sidecars string
}

var imageName = regexp.MustCompile(`(?m)^\s*(?:- )?image: "?([^\s"]+)`)

// load loads what the manifests name, busybox, and the sandboxes' image.
func (i *images) load() error {
	if err := os.Mkdir(i.dir, 0o755); err != nil {
		return err
	}
	defer os.RemoveAll(i.dir)
	names := map[string]bool{}
	for _, file := range []string{Manifest(i.repo), filepath.Join(i.repo, "test", "e2e", "manifests", "snapshot-controller.yaml")} {
		b, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		for _, m := range imageName.FindAllStringSubmatch(string(b), -1) {
			names[m[1]] = true
		}
	}
	for name := range names {
		var err error
		if strings.HasPrefix(name, "snapmerge/") {
			err = i.product(registry + name)
		} else {
			err = i.sidecar(name)
		}
		if err != nil {
			return err
		}
	}
	return i.busybox()
}
