package cluster

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// initEnv marks the process that is to become the first of the cluster's PID
// namespace; its value is the cluster's directory.
const initEnv = "SNAPMERGE_E2E_INIT"

// Init is what the first process of the cluster's namespaces does, and does
// nothing in any other process. Programs that start clusters call it first: they
// run themselves again for it.
//
// It prepares the namespaces, says so with a line on stdout, and then reaps
// orphans until stdin ends. With it all processes of the cluster end, so a cluster
// never outlives who started it.
func Init() {
	dir := os.Getenv(initEnv)
	if dir == "" {
		return
	}
	if err := prepare(dir); err != nil {
		fmt.Fprintln(os.Stderr, "cluster:", err)
		os.Exit(1)
	}
	go reap()
	fmt.Println("ready")
	io.Copy(io.Discard, os.Stdin)
	os.Exit(0)
}

func reap() {
	died := make(chan os.Signal, 1)
	signal.Notify(died, unix.SIGCHLD)
	for range died {
		for {
			pid, err := unix.Wait4(-1, nil, unix.WNOHANG, nil)
			if err == nil && pid == 0 || err != nil && !errors.Is(err, unix.EINTR) {
				break
			}
		}
	}
}

// prepare makes the namespaces those of a node of its own: nothing that is
// written to the usual places of kubelet and containerd, or mounted there, is seen
// outside.
func prepare(dir string) error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("private mounts: %w", err)
	}
	if err := leave(); err != nil {
		return err
	}
	// Volumes propagate from containers to pods, as on every node.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SHARED, ""); err != nil {
		return fmt.Errorf("shared mounts: %w", err)
	}
	if err := unix.Mount("proc", "/proc", "proc", 0, ""); err != nil {
		return fmt.Errorf("mount of /proc: %w", err)
	}
	for _, path := range []string{"/run", "/var/lib", "/var/log"} {
		if strings.HasPrefix(dir+"/", path+"/") {
			return fmt.Errorf("%s is in %s, which the cluster covers", dir, path)
		}
		if err := unix.Mount("tmpfs", path, "tmpfs", 0, "mode=755"); err != nil {
			return fmt.Errorf("mount of %s: %w", path, err)
		}
	}
	if err := mountDisk(filepath.Join(dir, diskName)); err != nil {
		return err
	}
	if err := bind(filepath.Join(dir, "containerd"), "/var/lib/containerd"); err != nil {
		return err
	}
	if err := unix.Sethostname([]byte(Node)); err != nil {
		return fmt.Errorf("host name: %w", err)
	}
	return network()
}

// leave lets go of the mounts of loop devices: as long as they were here, too,
// nobody could take those devices down.
func leave() error {
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(mounts)) {
		device, rest, _ := strings.Cut(line, " ")
		path, _, _ := strings.Cut(rest, " ")
		if !strings.HasPrefix(device, "/dev/loop") || path == "/" {
			continue
		}
		// It may be gone with one that it lies below.
		if err := unix.Unmount(path, unix.MNT_DETACH); err != nil && err != unix.EINVAL && err != unix.ENOENT {
			return fmt.Errorf("unmount of %s: %w", path, err)
		}
	}
	return nil
}

// bind makes a directory of the disk appear at a path on a tmpfs.
func bind(from, to string) error {
	for _, path := range []string{from, to} {
		if err := os.MkdirAll(path, 0o755); err != nil {
			return err
		}
	}
	if err := unix.Mount(from, to, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("bind of %s to %s: %w", from, to, err)
	}
	return nil
}

// The node's disk for volumes is a sparse file of diskSize bytes.
const (
	diskName = "disk.img"
	diskSize = 64 << 30
)

// mountDisk gives the node a disk of its own for volumes, which can be full without
// anything else being.
func mountDisk(file string) error {
	if err := os.MkdirAll(StateDir, 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		return err
	}
	if err := os.Truncate(file, diskSize); err != nil {
		return err
	}
	for _, args := range [][]string{
		{"mkfs.ext4", "-q", "-m", "0", file},
		{"mount", "-o", "loop", file, StateDir}, // the loop device goes with the mount
	} {
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			return fmt.Errorf("%s: %w: %s", args, err, out)
		}
	}
	return nil
}

// network gives the node a bridge for the pods. The address of the Kubernetes
// service is one of the node's own, so that pods reach the API without any proxy.
func network() error {
	for _, args := range []string{
		"link set lo up",
		"address add " + apiAddress + "/32 dev lo",
		// With an address of its own: else it has that of one of its ports and changes it when
		// pods come and go, and for half a minute the others send to nobody.
		"link add " + bridge + " address 02:00:0a:f4:00:01 type bridge",
		"address add " + nodeAddress + "/24 dev " + bridge,
		"link set " + bridge + " up",
		// Kubernetes chooses its address by the default route.
		"route add default dev " + bridge,
	} {
		if out, err := exec.Command("ip", strings.Fields(args)...).CombinedOutput(); err != nil {
			return fmt.Errorf("ip %s: %w: %s", args, err, out)
		}
	}
	return nil
}
