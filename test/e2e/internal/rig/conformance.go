package rig

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"

	"github.com/snapmerge/snapmerge/test/e2e/internal/binary"
	"github.com/snapmerge/snapmerge/test/e2e/internal/cluster"
	"github.com/snapmerge/snapmerge/test/e2e/internal/image"
)

// The images that Kubernetes' suite names, at the versions of
// k8s.io/kubernetes/test/utils/image in line 1.36.
const (
	suiteBusybox = "registry.k8s.io/e2e-test-images/busybox:1.37.0-1"
	suiteNginx   = "registry.k8s.io/e2e-test-images/nginx:1.15-4" // for its shell
	// suiteDebian is meant for tests of DNS; the storage suite uses its dd, which
	// has flags that busybox's lacks.
	suiteDebian = "registry.k8s.io/e2e-test-images/glibc-dns-testing:2.0.0"
	agnhost     = "registry.k8s.io/e2e-test-images/agnhost:2.63.0"
)

// Suite is Kubernetes' suite of tests for storage drivers.
type Suite struct {
	ginkgo, tests, path string
}

// LoadSuite builds the suite and gives the images that it uses to the cluster.
func LoadSuite(ctx context.Context, c *cluster.Cluster, repo string) (*Suite, error) {
	module := filepath.Join(repo, "test", "e2e", "conformance")
	tests, err := binary.Test(ctx, module)
	if err != nil {
		return nil, err
	}
	tools, err := binary.Build(ctx, module, "go.mod", nil, "tool")
	if err != nil {
		return nil, err
	}
	debian, err := binary.Debian(ctx, packages...)
	if err != nil {
		return nil, err
	}
	i := images{ctx: ctx, c: c, repo: repo, dir: filepath.Join(c.Dir(), "images"), debian: debian}
	if err := os.Mkdir(i.dir, 0o755); err != nil {
		return nil, err
	}
	defer os.RemoveAll(i.dir)
	if err := i.suite(filepath.Join(tools, "agnhost")); err != nil {
		return nil, err
	}
	return &Suite{filepath.Join(tools, "ginkgo"), filepath.Join(tests, "conformance.test"), c.Dir()}, nil
}

// suite makes the images of the suite. Agnhost is its program with the shell and
// the tools that tests call in it, which in the original are Alpine's: busybox, too.
func (i *images) suite(program string) error {
	root := filepath.Join(i.dir, "suite")
	if err := i.busyboxTree(root); err != nil {
		return err
	}
	for _, name := range []string{suiteBusybox, suiteNginx} {
		if err := i.give(root, name, image.Config{Env: busyboxEnv}); err != nil {
			return err
		}
	}
	if err := os.Link(program, filepath.Join(root, "agnhost")); err != nil {
		return err
	}
	if err := i.give(root, agnhost, image.Config{Entrypoint: []string{"/agnhost"}, Cmd: []string{"pause"}, Env: busyboxEnv}); err != nil {
		return err
	}
	for _, name := range []string{"dd", "sh"} { // busybox's shell would go on with its own dd
		if err := i.hostProgram(root, name); err != nil {
			return err
		}
	}
	return i.give(root, suiteDebian, image.Config{Env: busyboxEnv})
}

var libraries = regexp.MustCompile(`/\S+`)

// hostProgram puts a program of this machine, with its libraries, into a tree.
func (i *images) hostProgram(root, name string) error {
	path, err := exec.LookPath(name)
	if err != nil {
		return err
	}
	// Lines are "libx.so.1 => /path (address)" or, the loader's, "/path (address)".
	out, err := binary.Output(i.ctx, i.dir, "ldd", path)
	if err != nil {
		return err
	}
	to := filepath.Join(root, "bin", name)
	if err := os.Remove(to); err != nil { // busybox has it, too
		return err
	}
	if _, err := binary.Output(i.ctx, i.dir, "cp", "--dereference", path, to); err != nil {
		return err
	}
	for _, lib := range libraries.FindAllString(out, -1) {
		if err := os.MkdirAll(filepath.Join(root, filepath.Dir(lib)), 0o755); err != nil {
			return err
		}
		if _, err := binary.Output(i.ctx, i.dir, "cp", "--dereference", lib, filepath.Join(root, lib)); err != nil {
			return err
		}
	}
	return nil
}

// Command is the suite with flags for ginkgo and for the tests, to be run in the
// cluster.
func (s *Suite) Command(ctx context.Context, c *cluster.Cluster, ginkgo, tests []string) *exec.Cmd {
	args := append(append([]string{}, ginkgo...), s.tests, "--")
	return c.Command(ctx, s.ginkgo, append(append(args, "-kubeconfig="+c.Kubeconfig(), "-provider=local"), tests...)...)
}
