package cluster

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// Loops are the loop devices of the node's disk and of the volumes with those ids:
// the backing file of these has a hash of the id in its name.
func (c *Cluster) Loops(volumes []string) ([]string, error) {
	files := map[string]bool{c.disk(): true}
	for _, v := range volumes {
		sum := sha256.Sum256([]byte(v))
		files["/disk-"+hex.EncodeToString(sum[:8])] = true
	}
	bound, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		return nil, err
	}
	var found []string
	for _, file := range bound {
		b, err := os.ReadFile(file)
		if err == nil && files[strings.TrimSpace(string(b))] {
			found = append(found, "/dev/"+strings.Split(file, "/")[3])
		}
	}
	return found, nil
}

// detachLoops detaches those that are left of the volumes. Nobody serves them any
// more.
func (c *Cluster) detachLoops(volumes []string) ([]string, error) {
	loops, err := c.Loops(volumes)
	for _, path := range loops {
		err = errors.Join(err, detach(path))
	}
	return loops, err
}

func detach(path string) error {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: path, Err: err}
	}
	defer unix.Close(fd)
	if err := unix.IoctlSetInt(fd, unix.LOOP_CLR_FD, 0); err != nil {
		return fmt.Errorf("LOOP_CLR_FD %s: %w", path, err)
	}
	return nil
}
