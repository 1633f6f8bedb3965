// Package cluster runs a Kubernetes of one node in namespaces of its own: mount,
// network, PID, IPC and host name. No registry, no Docker, no proxy and no DNS are
// involved. It needs root, iproute2 and util-linux.
//
// All processes of the cluster are in one PID namespace, whose first process
// (Init) ends with who started the cluster; what is left then are cgroups, loop
// devices of volumes that were in use, and a few settings of the kernel, which Down
// takes care of.
package cluster

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Config is what a cluster is made of.
type Config struct {
	// Kube is a directory with a program "kube" that is all of Kubernetes and etcd.
	Kube string
	// Debian is a tree with containerd, runc and the CNI plugins.
	Debian string
	// Gates are feature gates for the API server, as in its flag.
	Gates string
}

// Cluster is one that runs.
type Cluster struct {
	dir, kube, debian, gates, cgroup string

	init   *exec.Cmd
	alive  io.Closer     // Init ends when it is closed
	ended  chan struct{} // closed when Init has ended
	failed chan error    // the first component that ended
}

// Up starts a cluster with its files in dir, which must not exist. Down must be
// called, even after an error.
func Up(ctx context.Context, dir string, cfg Config) (*Cluster, error) {
	c := &Cluster{
		dir: dir, kube: cfg.Kube, debian: cfg.Debian, gates: cfg.Gates, cgroup: "snapmerge-e2e-" + strings.TrimPrefix(filepath.Base(dir), "run-"),
		ended: make(chan struct{}), failed: make(chan error, 16),
	}
	keepSettings()
	for _, sub := range []string{"logs", "containerd"} {
		if err := os.MkdirAll(filepath.Join(dir, sub), 0o755); err != nil {
			return c, err
		}
	}
	if err := c.writeConfig(); err != nil {
		return c, err
	}
	if err := makeCgroup(c.cgroup); err != nil {
		return c, err
	}
	if err := c.startInit(); err != nil {
		return c, err
	}
	for _, args := range c.components() {
		if args[0] == "kube-controller-manager" {
			if err := c.wait(ctx, time.Minute, "the API", "kubectl", "get", "--raw=/readyz"); err != nil {
				return c, err
			}
		}
		if err := c.start(args); err != nil {
			return c, err
		}
	}
	return c, c.wait(ctx, time.Minute, "containerd", "ctr", "version")
}

// startInit makes the namespaces.
func (c *Cluster) startInit() error {
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), initEnv+"="+c.dir)
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &unix.SysProcAttr{
		Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWNET | unix.CLONE_NEWPID | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS,
		Setpgid:    true, // Ctrl-C is for us alone
	}
	alive, err := cmd.StdinPipe()
	if err != nil {
		return err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("namespaces: %w", err)
	}
	c.init, c.alive = cmd, alive
	line, _ := bufio.NewReader(out).ReadString('\n')
	go func() { defer close(c.ended); cmd.Wait() }()
	if line != "ready\n" {
		return errors.New("namespaces: not made")
	}
	return nil
}

// Kubeconfig is the file that leads an administrator to the API, from inside.
func (c *Cluster) Kubeconfig() string { return filepath.Join(c.dir, "kubeconfig") }

// Dir has the cluster's files.
func (c *Cluster) Dir() string { return c.dir }

// StateDir is the node's directory of volumes and snapshots, as it is seen from
// outside while the cluster runs.
func (c *Cluster) StateDir() string {
	return fmt.Sprintf("/proc/%d/root%s", c.init.Process.Pid, StateDir)
}

// disk is the file with the node's disk for volumes.
func (c *Cluster) disk() string { return filepath.Join(c.dir, diskName) }

// Cgroup is the name of the cgroup that the pods are in.
func (c *Cluster) Cgroup() string { return c.cgroup }

// Command is a program of the cluster, or one of the machine, that is to run in
// the cluster's namespaces.
func (c *Cluster) Command(ctx context.Context, name string, args ...string) *exec.Cmd {
	all := []string{"--target", strconv.Itoa(c.init.Process.Pid), "--mount", "--net", "--pid", "--ipc", "--uts", "--"}
	switch name {
	case "kubectl", "kubelet", "etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler":
		all = append(all, filepath.Join(c.kube, "kube"))
	}
	cmd := exec.CommandContext(ctx, "nsenter", append(append(all, name), args...)...)
	bin := filepath.Join(c.debian, "usr")
	cmd.Env = append(os.Environ(), "KUBECONFIG="+c.Kubeconfig(),
		fmt.Sprintf("PATH=%s/bin:%s/sbin:%s", bin, bin, os.Getenv("PATH")))
	cmd.SysProcAttr = &unix.SysProcAttr{Setpgid: true}
	return cmd
}

// Link makes a link to a program of Kubernetes for others to call it by, and
// returns its path.
func (c *Cluster) Link(name string) (string, error) {
	path := filepath.Join(c.dir, name)
	return path, os.Symlink(filepath.Join(c.kube, "kube"), path)
}

// Output runs a program in the cluster and returns what it prints.
func (c *Cluster) Output(ctx context.Context, name string, args ...string) (string, error) {
	return c.Input(ctx, "", name, args...)
}

// Input is Output with something to read for the program.
func (c *Cluster) Input(ctx context.Context, stdin, name string, args ...string) (string, error) {
	cmd := c.Command(ctx, name, args...)
	var out, errs bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &out, &errs
	err := cmd.Run()
	if err != nil {
		err = fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, strings.TrimSpace(errs.String()))
	}
	return strings.TrimSpace(out.String()), err
}

// start starts a component with a log of its own.
func (c *Cluster) start(args []string) error {
	f, err := os.Create(c.Log(args[0]))
	if err != nil {
		return err
	}
	defer f.Close()
	cmd := c.Command(context.Background(), args[0], args[1:]...)
	cmd.Stdout, cmd.Stderr = f, f
	if err := cmd.Start(); err != nil {
		return err
	}
	go func() {
		err := cmd.Wait()
		c.failed <- fmt.Errorf("%s ended (%v), see %s", args[0], err, f.Name())
	}()
	return nil
}

// Log is the file with a component's log.
func (c *Cluster) Log(component string) string {
	return filepath.Join(c.dir, "logs", component+".log")
}

// wait runs the program until it succeeds.
func (c *Cluster) wait(ctx context.Context, limit time.Duration, what, name string, args ...string) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	for {
		_, err := c.Output(ctx, name, args...)
		if err == nil {
			return nil
		}
		select {
		case failed := <-c.failed:
			return failed
		case <-ctx.Done():
			return fmt.Errorf("no %s after %s: %w", what, limit, err)
		case <-time.After(200 * time.Millisecond):
		}
	}
}

// Import gives an image archive to containerd.
func (c *Cluster) Import(ctx context.Context, file string) error {
	_, err := c.Output(ctx, "ctr", "--namespace=k8s.io", "images", "import", file)
	return err
}

// Ready waits for the node.
func (c *Cluster) Ready(ctx context.Context) error {
	return c.wait(ctx, 2*time.Minute, "node", "kubectl", "wait", "--for=condition=Ready", "--timeout=10s", "node/"+Node)
}

// Down ends the cluster and takes back what it changed. The cluster's directory
// is left for who wants to look at it.
func (c *Cluster) Down() error {
	var errs []error
	var volumes []string
	if c.init != nil {
		// Afterwards the disk is not there any more.
		left, err := os.ReadDir(filepath.Join(c.StateDir(), "volumes"))
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, err)
		}
		for _, v := range left {
			volumes = append(volumes, v.Name())
		}
		c.alive.Close()
		select {
		case <-c.ended:
		case <-time.After(30 * time.Second):
			errs = append(errs, fmt.Errorf("process %d, the first of the cluster, does not end", c.init.Process.Pid))
		}
	}
	errs = append(errs, restoreSettings())
	errs = append(errs, removeCgroup(c.cgroup))
	loops, err := c.detachLoops(volumes)
	if len(loops) > 0 {
		log.Printf("loop devices were left, and are detached: %v", loops)
	}
	return errors.Join(append(errs, err)...)
}
