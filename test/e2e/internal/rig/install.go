package rig

import (
	"context"
	"os"
	"path/filepath"

	"github.com/snapmerge/snapmerge/test/e2e/internal/binary"
	"github.com/snapmerge/snapmerge/test/e2e/internal/cluster"
)

// Installer is a way in which users install snapmerge.
type Installer func(ctx context.Context, c *cluster.Cluster, repo string) error

// Plain applies the manifest with kubectl.
func Plain(ctx context.Context, c *cluster.Cluster, repo string) error {
	manifest, err := filepath.Abs(Manifest(repo))
	if err == nil {
		_, err = c.Output(ctx, "kubectl", "apply", "--filename", manifest)
	}
	return err
}

// Chart installs the chart with Helm.
func Chart(ctx context.Context, c *cluster.Cluster, repo string) error {
	return Helm(ctx, c, repo, "install", "--create-namespace")
}

// Helm runs install or upgrade of the chart, with more arguments.
func Helm(ctx context.Context, c *cluster.Cluster, repo, command string, more ...string) error {
	chart, err := filepath.Abs(filepath.Join(repo, "charts", "snapmerge"))
	if err != nil {
		return err
	}
	return helm(ctx, c, repo, append([]string{command, Release, chart}, more...)...)
}

// Uninstall removes what Chart has installed, and waits until it is gone.
func Uninstall(ctx context.Context, c *cluster.Cluster, repo string) error {
	return helm(ctx, c, repo, "uninstall", Release, "--wait", "--timeout=2m")
}

func helm(ctx context.Context, c *cluster.Cluster, repo string, args ...string) error {
	tools, err := binary.Build(ctx, filepath.Join(repo, "test", "e2e", "helm"), "go.mod", nil, "tool")
	if err != nil {
		return err
	}
	_, err = c.Output(ctx, filepath.Join(tools, "helm"), append([]string{"--namespace", Namespace}, args...)...)
	return err
}

// LoadProduct gives the cluster snapmerge's image with another tag, as if it were
// another version.
func LoadProduct(ctx context.Context, c *cluster.Cluster, repo, tag string) error {
	i := images{ctx: ctx, c: c, repo: repo, dir: filepath.Join(c.Dir(), "images")}
	if err := os.Mkdir(i.dir, 0o755); err != nil {
		return err
	}
	defer os.RemoveAll(i.dir)
	return i.product(registry + "snapmerge/snapmerge:" + tag)
}
